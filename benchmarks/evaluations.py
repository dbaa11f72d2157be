"""Every protocol on one trained network, the same network untrained, and pixels without a network, in one table.

    python benchmarks/evaluations.py RUN --images imagenette-*.tar --davis davis2016-4seq.tar

RUN: a run folder of ``dino pretrain``. ``--images``: labelled images with train and val parts. ``--davis``: videos with
masks. Images are shown at the size of the run's global crops, videos with their shorter side at ``--side`` pixels.
Writes ``results/evaluations.json`` and prints the table of docs/evaluation.md.
"""

import argparse
import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino.config import Config, Preprocessing
from dino.data.davis import open_davis
from dino.data.masks import boxes_around, open_masks
from dino.data.sources import open_source
from dino.evaluation import attention_segmentation, discovery, knn, linear, lowshot, retrieval, video_segmentation
from dino.machine.device import choose_device, prepare
from dino.method.learner import make_learner
from dino.models.backbone import Tokens
from dino.models.weights import load, save_backbone
from side_by_side import RESULTS, environment

GRID = 16  # Pixels without a network: the image as 16 x 16 colours.


class Pixels(nn.Module):
    """A backbone without a network: the image made small stands for the [CLS] token, its own pixels for each patch."""

    embed_dim = 3 * GRID * GRID

    def __init__(self, patch_size: int):
        super().__init__()
        self.patch_size = patch_size

    def forward(self, images: Tensor) -> Tokens:
        small = F.adaptive_avg_pool2d(images, GRID).flatten(1)
        height, width = (side - side % self.patch_size for side in images.shape[-2:])
        patches = F.pixel_unshuffle(images[..., :height, :width], self.patch_size).permute(0, 2, 3, 1)
        return Tokens(small, patches)


def frames(davis: str, side: int, every: int) -> list[tuple[Tensor, Tensor]]:
    """Every n-th frame with its mask, shrunk so that the shorter side has ``side`` pixels."""
    found = []
    for item in open_masks(davis)[::every]:
        pixels, labels = item.labelled()
        scale = side / min(labels.shape)
        size = [round(n * scale) for n in labels.shape]
        image = F.interpolate(pixels[None] / 255, size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)
        found.append((image, F.interpolate(labels[None, None].float(), size=size, mode="nearest")[0, 0].long()))
    return found


def protocols(args: argparse.Namespace, config: Config, device: torch.device) -> dict[str, Callable[[nn.Module], Any]]:
    source = open_source(args.images)
    train, val = source.part("train"), source.part("val")
    size = config.crops.global_size
    shown: dict[str, Any] = {"resize": round(size * 256 / 224), "crop": size, "device": device, "progress": False}
    chosen_on = train.split(0.1, seed=0)
    videos, stills = open_davis(args.davis), frames(args.davis, args.side, args.every)
    boxes = [(image, boxes_around(labels)) for image, labels in stills]

    def linear_grid(backbone: nn.Module) -> dict[str, float]:
        choices = ((1,), (False,)) if isinstance(backbone, Pixels) else ((1, 4), (False, True))  # It has no blocks.
        probes = linear.paper_probes(int(backbone.embed_dim), linear.GRID, *choices)  # pyright: ignore
        return linear.run(backbone, *(chosen_on[0], val, chosen_on[1]), probes=probes, cached=True, **shown)

    return {
        "knn": lambda backbone: knn.run(backbone, train, val, **shown),
        "linear": linear_grid,
        "lowshot_10": lambda backbone: lowshot.run(backbone, train, val, fraction=0.1, **shown),
        "lowshot_1": lambda backbone: lowshot.run(backbone, train, val, fraction=0.01, **shown),
        "retrieval": lambda backbone: retrieval.run(backbone, val, side=size, device=device, progress=False),
        "discovery": lambda backbone: discovery.run(backbone, boxes, device=device),
        "attention": lambda backbone: attention_segmentation.run(backbone, stills, device=device),
        "video": lambda backbone: video_segmentation.run(
            video_segmentation.Colors(backbone.patch_size) if isinstance(backbone, Pixels) else backbone,
            videos,
            size=args.side,
            device=device,
            progress=False,
        ),
    }


# What the table shows: row, protocol, name of the result.
ROWS = [
    ("k-NN, k = 20, top-1 %", "knn", "knn_20_top1"),
    ("k-NN, k = 100, top-1 %", "knn", "knn_100_top1"),
    ("linear, best of 28 probes chosen on held-out train images, top-1 %", "linear", "linear_top1"),
    ("10 % of the labels, logistic regression, top-1 %", "lowshot_10", "lowshot_top1"),
    ("1 % of the labels, logistic regression, top-1 %", "lowshot_1", "lowshot_top1"),
    ("retrieval by class, mAP %", "retrieval", "retrieval_map"),
    ("object discovery, LOST, CorLoc %", "discovery", "corloc_lost"),
    ("object discovery, TokenCut, CorLoc %", "discovery", "corloc_tokencut"),
    ("object discovery, box around the whole frame, CorLoc %", "discovery", "corloc_whole_image"),
    ("attention segmentation, best head, Jaccard %", "attention", "attention_jaccard"),
    ("the same masks with their patches shuffled", "attention", "attention_jaccard_shuffled"),
    ("video segmentation, J&F %", "video", "j_and_f"),
    ("video segmentation, J mean %", "video", "j_mean"),
    ("video segmentation, F mean %", "video", "f_mean"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", nargs="+", required=True)
    parser.add_argument("--davis", required=True)
    parser.add_argument("--side", type=int, default=240)
    parser.add_argument("--every", type=int, default=4, help="take every n-th frame for stills")
    parser.add_argument("--only", nargs="+", help="protocols; the others keep what the file says")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = choose_device(args.device)
    prepare(device)
    config = Config.from_json((args.run / "config.json").read_text())
    untrained = make_learner(config, device).teacher.backbone.eval()
    save_backbone(untrained, args.run / "untrained.safetensors", config.model, Preprocessing.of(config))
    contenders = {"pixels": Pixels(config.model.patch_size), "untrained": untrained, "trained": load(args.run, device)}
    file = RESULTS / "evaluations.json"
    settings = {"side": args.side, "every": args.every, "config": json.loads(config.to_json())}
    before = json.loads(file.read_text()) if file.exists() else {}
    results: dict[str, dict[str, Any]] = before["results"] if before.get("settings") == settings else {}
    for name, run in protocols(args, config, device).items():
        if args.only and name not in args.only:
            continue
        results[name] = {}
        for who, backbone in contenders.items():
            start = time.perf_counter()
            with contextlib.suppress(ValueError) if name == "attention" else contextlib.nullcontext():
                results[name][who] = run(backbone)  # Pixels have no attention.
            print(f"{name}, {who}: {time.perf_counter() - start:.0f} s", flush=True)
        written = {"results": results, "settings": settings, "environment": environment(device.type)}
        file.write_text(json.dumps(written, indent=2) + "\n")
    print("\n| | " + " | ".join(contenders) + " |\n|---|" + "---|" * len(contenders))
    for title, name, key in ROWS:
        if name in results:
            found = [results[name].get(who, {}).get(key) for who in contenders]
            print(f"| {title} | " + " | ".join("" if x is None else f"{x:.1f}" for x in found) + " |")


if __name__ == "__main__":
    main()
