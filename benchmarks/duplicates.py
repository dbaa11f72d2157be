"""How well copies are found among photos: precision and recall over thresholds, for raw pixels and for weights.

    python benchmarks/duplicates.py DATA --weights NAME=WEIGHTS ... [--images 200] [--copies 40]

Of DATA 200 images are drawn by seed, and of 40 of them a copy is planted: a quarter each resized to a half, saved
again as JPEG of quality 30, cropped to 90 % of both sides, and flipped. A pair counts as found when its distance
(1 - cosine) is at most a share of the usual distance, as ``dino duplicates`` counts.
"""

import argparse
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

import dino
from dino.data.sources import Source, open_source
from dino.encoder.groups import COPY, USUAL_K, usual_distance
from dino.encoder.neighbors import neighbors_of_all

SHARES = [0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.3, 0.5]
KINDS = ["resized", "recompressed", "cropped", "flipped"]


def copy_of(image: Image.Image, kind: str) -> Image.Image:
    """The image as a copy of this kind.

    >>> copy_of(Image.new("RGB", (100, 50)), "cropped").size
    (90, 45)
    """
    width, height = image.size
    if kind == "resized":
        return image.resize((width // 2, height // 2), Image.Resampling.BICUBIC)
    if kind == "recompressed":
        file = io.BytesIO()
        image.save(file, "JPEG", quality=30)
        return Image.open(file).convert("RGB")
    if kind == "cropped":
        left, top = round(width * 0.05), round(height * 0.05)
        return image.crop((left, top, left + round(width * 0.9), top + round(height * 0.9)))
    return ImageOps.mirror(image)


def plant(source: Source, images: int, copies: int, folder: Path, seed: int) -> Source:
    """Writes the images, numbered, and behind them the copies, the i-th of image i, as lossless files."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = random.Random(seed).sample(range(len(source)), images)
    for i, number in enumerate(chosen):
        image = Image.fromarray(source.load(number).permute(1, 2, 0).numpy())
        image.save(folder / f"{i:05}.png")
        if i < copies:
            copy_of(image, KINDS[i % len(KINDS)]).save(folder / f"{images + i:05}.png")
    return open_source(folder)


def pixels(source: Source, side: int = 32) -> Tensor:
    """Raw pixels of a small square, less their mean: what a hash of pixels compares."""
    rows = [
        np.array(
            Image.fromarray(source.load(i).permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.BICUBIC)
        )
        for i in range(len(source))
    ]
    values = torch.from_numpy(np.stack(rows)).float().flatten(1)
    return F.normalize(values - values.mean(1, keepdim=True), dim=1)


def judge(features: Tensor, images: int, copies: int) -> dict[str, Any]:
    """Precision and recall of the pairs at every share; the average precision; recall of each kind at the default."""
    rows, columns = torch.triu_indices(len(features), len(features), 1)
    usual = usual_distance(neighbors_of_all(features, USUAL_K)[0])
    relative = (1 - features @ features.mT)[rows, columns] / usual
    true = (columns == rows + images) & (rows < copies)
    found = {str(share): relative <= share for share in SHARES}
    table = {
        share: {
            "precision": round((chosen & true).sum().item() / max(1, chosen.sum().item()), 4),
            "recall": round((chosen & true).sum().item() / copies, 4),
            "pairs": int(chosen.sum()),
        }
        for share, chosen in found.items()
    }
    order = relative.argsort()
    hits = true[order].float()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    kinds = {
        kind: round((true & (rows % len(KINDS) == i) & (relative <= COPY)).sum().item() / (copies // len(KINDS)), 4)
        for i, kind in enumerate(KINDS)
    }
    return {
        "average_precision": round((precision * hits).sum().item() / copies, 4),
        "usual_distance": round(usual, 4),
        "shares": table,
        "recall_by_kind_at_default": kinds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--weights", nargs="+", default=[], metavar="NAME=WEIGHTS")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--copies", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True, help="where images and copies are written")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    source = plant(open_source(args.data), args.images, args.copies, args.folder, args.seed)
    features = {"raw pixels, 32 x 32": pixels(source)}
    for given in args.weights:
        name, _, weights = given.partition("=")
        features[name] = dino.encoder(weights).features(source).features
    results = {name: judge(values, args.images, args.copies) for name, values in features.items()}
    for name, result in results.items():
        print(f"\n{name}: average precision {result['average_precision']:.3f}")
        print("share      precision  recall  pairs")
        for share, row in result["shares"].items():
            print(f"{share:<10} {row['precision']:<10.3f} {row['recall']:<7.3f} {row['pairs']}")
        print("recall at the default, by kind:", result["recall_by_kind_at_default"])
    if args.out:
        settings = {"images": args.images, "copies": args.copies, "seed": args.seed, "kinds": KINDS}
        args.out.write_text(json.dumps({"settings": settings, "torch": torch.__version__, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
