"""What each of our speed-ups is worth: the training step with all of them, and with one left out or added.

    python benchmarks/ablation.py [--task tiny8] [--runs 5] [--busy]

``--busy``: beside another process that keeps one core busy, as on a shared machine.
"""

import argparse
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import step as plain_step
from side_by_side import compare, save, show

VARIANTS = {
    "all": "as it is",
    "without oneDNN": "products by torch's default",
    "without malloc thresholds": "glibc gives memory back at every free",
    "without packed tokens": "one pass a resolution, the last block for all tokens",
    "with torch.compile": "Inductor, block by block",
    "GOMP_SPINCOUNT=1000": "threads wait without spinning",
}


def make(name: str, options: dict[str, Any]) -> Callable[[], int]:
    from dino.machine import device as hardware
    from dino.machine import private_calls
    from dino.models.vision_transformer import VisionTransformer

    if name == "without oneDNN":
        private_calls.onednn_linear.usable = False
    if name == "without malloc thresholds":
        hardware.prepare = lambda *_: None
    if name == "without packed tokens":
        del VisionTransformer.cls_tokens
    return plain_step.make("dino", {**options, "compile": name == "with torch.compile"})


def keep_busy() -> None:
    while True:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="tiny8")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--busy", action="store_true")
    args = parser.parse_args()
    other = multiprocessing.get_context("spawn").Process(target=keep_busy, daemon=True)
    if args.busy:
        other.start()
    options = {"task": args.task, "device": "cpu", "batch": args.batch, "steps": 1}
    rows = compare(make, args.only, options, args.runs)
    busy = ", beside a busy process" if args.busy else ""
    show(f"training step, {args.task}, batch {args.batch}, {args.runs} rounds{busy}", rows)
    results = {"options": options, "runs": args.runs, "busy": args.busy, "cores": os.cpu_count(), "contenders": rows}
    save("ablation-busy" if args.busy else "ablation", results, "cpu")


if __name__ == "__main__":
    main()
