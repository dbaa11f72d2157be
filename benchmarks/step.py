"""The training step alone: ours beside the plain form and lightly, on crops that are already there.

    python benchmarks/step.py [--task vits16 tiny4] [--device cuda] [--batch N] [--runs 5]

A step is all of it: teacher, student, loss, backward, clip, optimizer, teacher and center update. Interleaved, each
contender in a process of its own; ``times as long`` is the median over rounds of its time over ours. On a CPU all are
in float32; ``--only dino dino-bfloat16 --task vits16 tiny8`` is what bfloat16 is worth there.
"""

import argparse
from collections.abc import Callable
from typing import Any

from contenders import BFLOAT16, NAMES, TASKS, make_step, random_crops, split_views
from side_by_side import available, compare, save, show


def make(name: str, options: dict[str, Any]) -> Callable[[], int]:
    crops: Any = random_crops(options)
    if name.startswith("dino"):
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


def gflop_per_image(task: dict[str, Any]) -> float:
    """What the paper's step multiplies and adds for one image: student forward and backward (3 x forward) on all crops,
    teacher forward on two. Every block for every token, whatever a contender leaves out."""
    patch, d, depth, _ = task["net"]
    (g, l), v, k = task["sizes"], task["local_count"], task["out_dim"]

    def crop(size: int) -> float:
        t = (size // patch) ** 2 + 1
        blocks = depth * (24 * t * d**2 + 4 * t**2 * d)  # qkv, proj and MLP; two products of the attention
        return blocks + 2 * t * 3 * patch**2 * d + 2 * (d * 2048 + 2048 * 2048 + 2048 * 256 + 256 * k)

    return (3 * (2 * crop(g) + v * crop(l)) + 2 * crop(g)) / 1e9


def peak_gflops(device: str) -> float:
    """What matrix products reach here: the best of ten of 4096 x 1024 x 1024, float32 on a CPU, bfloat16 on CUDA."""
    import time

    import torch

    from dino.machine.device import prepare
    from dino.models.products import linear

    prepare(torch.device(device))
    n = 8192 if device == "cuda" else 1024
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    x, w = (torch.randn(rows, n, device=device, dtype=kind) for rows in (4 * n, n))
    best = float("inf")
    with torch.no_grad():
        for _ in range(10):
            start = time.perf_counter()
            linear(x, w)
            if device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
    return 8 * n**3 / best / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=["vits16", "tiny4"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, help="images; default 8 (ViT-S/16) or 128 (ViT-Ti/4), on CUDA 256")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=[*NAMES, BFLOAT16], default=NAMES)
    args = parser.parse_args()
    results, peak = {}, peak_gflops(args.device)
    for task in args.task:
        cuda = args.device == "cuda"
        batch = args.batch or (256 if cuda else TASKS[task]["batch"])
        options = {"task": task, "device": args.device, "batch": batch, "steps": 10 if cuda else 1}
        rows = compare(make, available(args.only), options, args.runs, warmup=2 if cuda else 1)
        show(f"training step, {task}, batch {batch}, {args.device}, {args.runs} rounds", rows)
        work = gflop_per_image(TASKS[task])
        for row in rows.values():
            row["share_of_peak"] = round(row["images_per_second"] * work / peak, 3)
        shares = ", ".join(f"{name} {row['share_of_peak']:.0%}" for name, row in rows.items())
        print(f"{work:.1f} GFLOP an image; of the {peak:.0f} GFLOP/s that matrix products reach here: {shares}")
        results[task] = {"options": options, "runs": args.runs, "contenders": rows, "gflop_per_image": work}
        results[task]["peak_gflops"] = round(peak)
    save("bfloat16" if BFLOAT16 in args.only else "step", results, args.device)


if __name__ == "__main__":
    main()
