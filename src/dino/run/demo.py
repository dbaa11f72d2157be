"""``dino demo``: built-in images, a small ViT, a few minutes on a CPU, and what it learnt in numbers and pictures."""

import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dino import recipes
from dino.augment.multicrop import MultiCrop
from dino.config import IMAGENET_MEAN, IMAGENET_STD, Config, replace
from dino.data.decode import Canvas
from dino.data.sources import Source, open_source
from dino.encoder.attention import mass_masks
from dino.encoder.encoder import Encoder, open_encoder
from dino.encoder.neighbors import nearest_neighbors
from dino.encoder.sizes import whole_patches
from dino.evaluation import attention_segmentation, knn
from dino.machine.device import peak_rss_gib
from dino.machine.randomness import generator
from dino.method.learner import make_learner
from dino.options import AttentionSegmentationOptions, KnnOptions
from dino.pictures.attention import attention_sheet
from dino.pictures.crops import crop_sheet
from dino.pictures.neighbors import neighbor_sheet
from dino.run.pretrain import pretrain
from dino.run.report import write_report

DATA = "shapes:2000x48"
K = 20  # Neighbours that vote.
_ATTENTION_SIZE = 96  # Pixels a side, at which attention is looked at.


def demo(out: Path, *, seed: int = 0, quiet: bool = False) -> dict[str, Any]:
    """Trains on the built-in shapes and compares raw pixels, the untrained and the trained network.

    Writes the run folder, ``crops.png``, ``attention.png``, ``neighbors.png`` and ``results.json``:
    ``{"knn": {"raw_pixels", "untrained", "trained"}, "attention_jaccard": {"untrained", "trained"},
    "seconds": {"train", "total"}, "peak_rss_gib"}``; accuracies and Jaccard indices from 0 to 1.
    """
    began = time.perf_counter()
    console = Console(quiet=quiet)
    train, val = (open_source(DATA, part) for part in ("train", "val"))
    config = replace(recipes.demo(recipes.Facts(len(train), train.median_side(), accelerator=False)), run__seed=seed)
    console.print(
        f"{len(train)} images without labels to learn from, {len(val)} to be judged by: {', '.join(train.classes)}"
    )

    untrained = make_learner(config, torch.device("cpu")).teacher.backbone
    start = time.perf_counter()
    pretrain(train, out, config, val=val, quiet=quiet)
    seconds = time.perf_counter() - start
    settings = {"size": config.data.canvas, "resize": config.data.canvas, "progress": False}  # Whole, as they are.
    before, after = open_encoder(untrained, **settings), open_encoder(out, **settings, device="cpu")

    bank, queries = _pixels(train), _pixels(val)
    results: dict[str, Any] = {
        "knn": {
            "raw_pixels": _accuracy(bank, train.labels, queries, val.labels),
            "untrained": _encoder_accuracy(before, train, val),
            "trained": _encoder_accuracy(after, train, val),
        },
        "attention_jaccard": {
            "untrained": _attention_jaccard(before, val),
            "trained": _attention_jaccard(after, val),
        },
    }
    _pictures(out, config, before, after, train, val)
    write_report(out)
    results["seconds"] = {"train": round(seconds, 1), "total": round(time.perf_counter() - began, 1)}
    results["peak_rss_gib"] = round(peak_rss_gib(), 2)
    (out / "results.json").write_text(json.dumps(results, indent=2))
    console.print(_table(results))
    console.print(f"Pictures and report: {out}/crops.png, attention.png, neighbors.png, report.html")
    return results


def _pixels(source: Source) -> Tensor:
    """The images themselves as features, normalised as for a backbone and of length 1."""
    images = _images(source, list(range(len(source))))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return F.normalize(((images - mean) / std).flatten(1), dim=1)


def _accuracy(bank: Tensor, bank_labels: Tensor | None, queries: Tensor, query_labels: Tensor | None) -> float:
    assert bank_labels is not None
    assert query_labels is not None
    return knn.knn_classify(bank, bank_labels, queries, query_labels, ks=(K,))[f"knn_{K}_top1"] / 100


def _encoder_accuracy(encoder: Encoder, train: Source, val: Source) -> float:
    return knn.run(encoder, train, val, KnnOptions(k=(K,)))[f"knn_{K}_top1"] / 100


def _images(source: Source, indices: list[int]) -> Tensor:
    return torch.stack([source.load(i) for i in indices]) / 255


def _attention_jaccard(encoder: Encoder, val: Source) -> float:
    """Mean Jaccard index of the best head's mask; images at twice their size, for a grid of 12 x 12 patches."""
    masks = val.masks
    assert masks is not None
    samples = ((val.load(i) / 255, masks[i].long()) for i in range(len(val)))
    return (
        attention_segmentation.run(encoder, samples, AttentionSegmentationOptions(resize=_ATTENTION_SIZE))[
            "attention_jaccard"
        ]
        / 100
    )


def _pictures(out: Path, config: Config, before: Encoder, trained: Encoder, train: Source, val: Source) -> None:
    """``crops.png``, ``attention.png`` and ``neighbors.png``."""
    multicrop = MultiCrop(config.crops)
    image = train.load(4)
    sizes = torch.tensor([image.shape[1:]])
    draws = multicrop.sample(sizes, generator(config.run.seed, "picture"))
    crops = multicrop.apply(Canvas(image[None], sizes), draws)
    crop_sheet(
        image / 255,
        draws.boxes[0],
        crops.global_crops[0],
        crops.local_crops[0],
        mean=config.crops.mean,
        std=config.crops.std,
    ).save(out / "crops.png")

    chosen = list(range(10, 18))
    images, masks = _images(val, chosen), val.masks
    assert masks is not None
    seen = torch.stack([whole_patches(image, trained.patch_size, _ATTENTION_SIZE) for image in images])
    after = trained.attention(seen)
    attention_sheet(
        images,
        after,
        untrained=before.attention(seen),
        masks=mass_masks(after),
        true_masks=masks[chosen],
        captions=[val.classes[i % 10] for i in chosen],
    ).save(out / "attention.png")

    bank = trained.features(train).features
    queries = trained.features(val.subset(chosen)).features
    similarities, indices = nearest_neighbors(queries, bank, k=7)
    assert train.labels is not None
    neighbor_sheet(
        list(images),
        [list(_images(train, row)) for row in indices.tolist()],
        similarities,
        query_classes=[val.classes[i % 10] for i in chosen],
        neighbor_classes=[[train.classes[train.labels[i]] for i in row] for row in indices.tolist()],
    ).save(out / "neighbors.png")


def _table(results: dict[str, Any]) -> Table:
    table = Table("", f"k-NN accuracy (k = {K})", "attention Jaccard", title="What was learnt without labels")
    names = {"raw_pixels": "raw pixels", "untrained": "untrained network", "trained": "trained network"}
    for key, name in names.items():
        jaccard = results["attention_jaccard"].get(key)
        table.add_row(name, f"{results['knn'][key]:.1%}", "" if jaccard is None else f"{jaccard:.2f}")
    return table
