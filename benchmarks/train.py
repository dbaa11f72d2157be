"""End to end: JPEG files to trained steps, ours beside the plain form and lightly.

    python benchmarks/train.py FOLDER [--task tiny4] [--device cuda] [--batch N] [--runs 5]

FOLDER holds JPEGs in one folder a class. The others read with worker processes. What ours spends on decoding all
images once (its cache) is measured too and spread over the steps of one epoch, as if there were no second one.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from contenders import NAMES, TASKS, make_batches, make_step
from side_by_side import available, compare, save, show


def make(name: str, options: dict[str, Any]) -> Callable[[], int]:
    start = time.perf_counter()
    batches = make_batches(name, options)
    step = make_step(name, options)
    next(batches)  # Decodes all images (ours), or starts the workers.
    began = time.perf_counter() - start
    images = sum(1 for path in Path(options["folder"]).rglob("*") if path.is_file())
    share = began / images if name == "dino" else 0.0  # Seconds an image of an epoch; network and imports included.

    def run() -> int:
        for _ in range(options["steps"]):
            step(next(batches))
        time.sleep(share * options["batch"] * options["steps"])
        return options["batch"] * options["steps"]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--task", choices=TASKS, default="tiny4")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--steps", type=int, help="a round; default 1, on CUDA 20")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0, help="of the others; default: one a core")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    batch, steps = args.batch or (256 if cuda else TASKS[args.task]["batch"]), args.steps or (20 if cuda else 1)
    options = {"task": args.task, "device": args.device, "batch": batch, "steps": steps, "workers": args.workers}
    rows = compare(make, available(NAMES), {**options, "folder": str(args.folder)}, args.runs, alone=True)
    show(f"JPEG files to trained steps, {args.task}, batch {batch}, {args.device}, {args.runs} rounds", rows)
    save("train", {args.task: {"options": options, "runs": args.runs, "contenders": rows}}, args.device)


if __name__ == "__main__":
    main()
