"""How well a map keeps neighbourhoods: t-SNE (scikit-learn), as ``dino embed`` uses it, beside UMAP and PCA.

    python benchmarks/map.py WEIGHTS DATA [--images 2000]     (UMAP: pip install umap-learn)

Trustworthiness (Venna and Kaski 2001): 1 when neighbours on the map are neighbours among the features. Kept: the share
of each image's ten nearest that are among its ten nearest on the map. Class: how often the ten nearest on the map name
the class of an image.
"""

import argparse
import json
from pathlib import Path

import torch
from sklearn.manifold import trustworthiness
from torch import Tensor

import dino
from dino.data.sources import open_source
from dino.encoder.components import principal_components
from dino.encoder.map import map_2d
from dino.encoder.neighbors import neighbors_of_all
from dino.machine.randomness import generator


def judge(features: Tensor, places: Tensor, labels: Tensor | None) -> dict[str, float]:
    near = neighbors_of_all(features, 10)[1]
    on_map = torch.cdist(places, places).fill_diagonal_(torch.inf).topk(10, largest=False).indices
    kept = (near[:, :, None] == on_map[:, None]).any(2).float().mean().item()
    trust = trustworthiness(features.numpy(), places.numpy(), n_neighbors=10, metric="cosine")
    result = {"trustworthiness": round(float(trust), 4), "neighbours_kept": round(kept, 4)}
    if labels is not None:
        votes = labels[on_map].mode(1).values
        result["class"] = round((votes == labels).float().mean().item(), 4)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("data", nargs="+")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    source = open_source(args.data)
    chosen = torch.randperm(len(source), generator=generator(args.seed, "map benchmark"))[: args.images]
    features, labels, _ = dino.encoder(args.weights).features(source.subset(chosen.sort().values))
    maps = {"PCA": principal_components(features, 2).float(), "t-SNE": map_2d(features, args.seed)}
    try:
        from umap import UMAP  # pyright: ignore[reportMissingImports]
    except ImportError:
        print("umap-learn is not installed: without UMAP")
    else:
        for near in (15, 30):
            placed = UMAP(n_neighbors=near, metric="cosine", random_state=args.seed).fit_transform(features.numpy())
            maps[f"UMAP, {near} neighbours"] = torch.from_numpy(placed)
    results = {name: judge(features, places, labels) for name, places in maps.items()}
    for name, result in results.items():
        print(f"{name:<22}", result)
    if args.out:
        settings = {"images": len(features), "seed": args.seed, "torch": torch.__version__}
        args.out.write_text(json.dumps({"settings": settings, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
