"""The training step alone: ours beside the plain form and lightly, on crops that are already there.

    python benchmarks/step.py [--task vits16 tiny4] [--device cuda] [--batch N] [--runs 5]

A step is all of it: teacher, student, loss, backward, clip, optimizer, teacher and center update. Interleaved, each
contender in a process of its own; ``times as long`` is the median over rounds of its time over ours.
"""

import argparse
from collections.abc import Callable
from typing import Any

from contenders import NAMES, TASKS, make_step, random_crops, split_views
from side_by_side import available, compare, save, show


def make(name: str, options: dict[str, Any]) -> Callable[[], int]:
    crops: Any = random_crops(options)
    if name == "dino":
        from dino.augment.multicrop import Crops

        crops = Crops(*crops)
    else:
        crops = split_views(crops)
    step = make_step(name, options)

    def run() -> int:
        for _ in range(options["steps"]):
            step(crops)
        return options["batch"] * options["steps"]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=["vits16", "tiny4"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, help="images; default 8 (ViT-S/16) or 128 (ViT-Ti/4), on CUDA 256")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    args = parser.parse_args()
    results = {}
    for task in args.task:
        cuda = args.device == "cuda"
        batch = args.batch or (256 if cuda else TASKS[task]["batch"])
        options = {"task": task, "device": args.device, "batch": batch, "steps": 10 if cuda else 1}
        rows = compare(make, available(args.only), options, args.runs, warmup=2 if cuda else 1)
        show(f"training step, {task}, batch {batch}, {args.device}, {args.runs} rounds", rows)
        results[task] = {"options": options, "runs": args.runs, "contenders": rows}
    save("step", results, args.device)


if __name__ == "__main__":
    main()
