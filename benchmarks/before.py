"""The training step of two checkouts of this repository, before and after a change, in turns in one run.

    python benchmarks/before.py BEFORE [AFTER] [--task vits16 tiny4] [--runs 5]

BEFORE and AFTER are folders with a checkout each (``git worktree add ../before v0.1``); AFTER is this one when it is
not given. Each is measured with its own ``benchmarks/step.py``, on crops that are already there, in float32.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from side_by_side import compare, save, show

HERE = Path(__file__).parents[1]
TASKS = {"vits16": 8, "tiny8": 32, "tiny4": 128}  # Images a batch.


def make(name: str, options: dict[str, Any]) -> Callable[[], int]:
    root = options["roots"][name]
    sys.path[:0] = [f"{root}/src", f"{root}/benchmarks"]
    import step  # That checkout's.

    return step.make("dino", options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path, nargs="?", default=HERE)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=["vits16", "tiny4"])
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    roots = {"before": str(args.before.resolve()), "after": str(args.after.resolve())}
    results = {}
    for task in args.task:
        options = {"task": task, "device": "cpu", "batch": TASKS[task], "steps": 1, "roots": roots}
        results[task] = compare(make, list(roots), options, args.runs, warmup=1)
        show(f"training step, {task}, batch {TASKS[task]}, cpu, {args.runs} rounds", results[task])
    save("before", results, "cpu")


if __name__ == "__main__":
    main()
