"""Every protocol on one trained network, the same network untrained, and pixels without a network, in one table.

    python benchmarks/evaluations.py WEIGHTS --images imagenette-*.tar --davis davis2016-4seq.tar

WEIGHTS: what ``dino.load`` takes. ``--images``: labelled images with train and val parts. ``--davis``: videos with
masks. Images are shown at the size that the weights know, videos with their shorter side at ``--side`` pixels. Writes
``results/evaluations.json`` and prints the table of docs/evaluation.md.
"""

import argparse
import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dino.data.davis import open_davis
from dino.data.masks import boxes_around, open_masks
from dino.data.sources import open_source
from dino.encoder.encoder import Encoder, open_encoder
from dino.evaluation import attention_segmentation, discovery, knn, linear, lowshot, retrieval, video_segmentation
from dino.machine.device import choose_device, prepare
from dino.models.backbone import Tokens
from dino.options import LinearOptions, LowshotOptions, RetrievalOptions, VideoSegmentationOptions
from downstream import untrained
from side_by_side import RESULTS, environment

GRID = 16  # Pixels without a network: the image as 16 x 16 colours.
FRAMES = 16  # Large images a forward pass.


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


def protocols(args: argparse.Namespace, size: int) -> dict[str, Callable[[Encoder], dict[str, float]]]:
    source = open_source(args.images)
    train, val = source.part("train"), source.part("val")
    learn_from, choose_by = train.split(0.1, seed=0)
    videos, stills = open_davis(args.davis), frames(args.davis, args.side, args.every)
    boxes = [(image, boxes_around(labels)) for image, labels in stills]

    def video(encoder: Encoder) -> dict[str, float]:
        if isinstance(encoder.backbone, Pixels):
            encoder = open_encoder(encoder, backbone=video_segmentation.PatchColors(encoder.patch_size))
        return video_segmentation.run(encoder, videos, VideoSegmentationOptions(size=args.side))

    grid = LinearOptions(grid=True, cached=True)
    return {
        "knn": lambda encoder: knn.run(encoder, train, val),
        "linear": lambda encoder: linear.run(encoder, learn_from, val, choose_by, grid),
        "lowshot_10": lambda encoder: lowshot.run(encoder, train, val, LowshotOptions(fraction=0.1)),
        "lowshot_1": lambda encoder: lowshot.run(encoder, train, val, LowshotOptions(fraction=0.01)),
        "retrieval": lambda encoder: retrieval.run(encoder, val, RetrievalOptions(side=size)),
        "discovery": lambda encoder: discovery.run(open_encoder(encoder, batch_size=FRAMES), boxes),
        "attention": lambda encoder: attention_segmentation.run(open_encoder(encoder, batch_size=FRAMES), stills),
        "video": video,
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
    parser.add_argument("weights")
    parser.add_argument("--images", nargs="+", required=True)
    parser.add_argument("--davis", required=True)
    parser.add_argument("--side", type=int, default=240)
    parser.add_argument("--every", type=int, default=4, help="take every n-th frame for stills")
    parser.add_argument("--only", nargs="+", help="protocols; the others keep what the file says")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = choose_device(args.device)
    prepare(device)
    trained = open_encoder(args.weights, device=device, progress=False)
    contenders = {
        "pixels": open_encoder(trained, backbone=Pixels(trained.patch_size)),
        "untrained": untrained(trained, seed=0),
        "trained": trained,
    }
    file = RESULTS / "evaluations.json"
    settings = {"side": args.side, "every": args.every, "weights": args.weights, **trained.settings}
    before = json.loads(file.read_text()) if file.exists() else {}
    results: dict[str, dict[str, Any]] = before["results"] if before.get("settings") == settings else {}
    for name, run in protocols(args, trained.size).items():
        if args.only and name not in args.only:
            continue
        results[name] = {}
        for who, encoder in contenders.items():
            start = time.perf_counter()
            with contextlib.suppress(ValueError) if name == "attention" else contextlib.nullcontext():
                results[name][who] = run(encoder)  # Pixels have no attention.
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
