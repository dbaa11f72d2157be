"""How cost grows with the work: time of a step over batch, crops and K, of k-NN over images, with fitted exponents.

    python benchmarks/scaling.py [--device cuda] [--runs 5] [--quick]

Each curve is measured in turns, all its points once, then again; medians. The exponent is the slope of a straight line
through the points in log-log scale, all of them and the upper half (where fixed costs are small).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from side_by_side import RESULTS, save

STEP = {"batch": 16, "local_count": 4, "out_dim": 4096}


def make_step(device: str, batch: int, local_count: int, out_dim: int) -> Callable[[], None]:
    """A training step of ViT-Ti/8 on crops of 64 and 32 pixels."""
    from dino.augment.multicrop import Crops
    from dino.config import Config, CropConfig, ModelConfig, OptimConfig
    from dino.machine import device as hardware
    from dino.method.learner import make_learner
    from dino.method.schedules import Now
    from dino.method.step import train_step

    hardware.prepare(torch.device(device))
    config = Config(
        crops=CropConfig(global_size=64, local_size=32, local_count=local_count),
        model=ModelConfig("vit_tiny", 8, drop_path=0.0, out_dim=out_dim),
        optim=OptimConfig(batch_size=batch),
    )
    learner = make_learner(config, torch.device(device))
    crops = Crops(
        torch.randn(batch, 2, 3, 64, 64, device=device), torch.randn(batch, local_count, 3, 32, 32, device=device)
    )
    autocast, now = hardware.autocast(torch.device(device), "auto"), Now(1e-4, 0.04, 0.996, 0.04)
    return lambda: train_step(learner, [(crops, None)], 1, now, config.optim, autocast, False) and None


def make_knn(device: str, images: int) -> Callable[[], None]:
    """1,000 queries among ``images`` features of 384 numbers."""
    from dino.encoder.neighbors import nearest_neighbors

    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(n, 384, generator=generator).to(device) for n in (images, 1000))
    return lambda: nearest_neighbors(queries, bank, 20) and None


def curves(device: str, quick: bool) -> dict[str, tuple[list[int], Callable[[int], Callable[[], None]]]]:
    short = slice(None, 3) if quick else slice(None)
    return {
        "batch (images)": ([8, 16, 32, 64][short], lambda n: make_step(device, **{**STEP, "batch": n})),
        "crops (2 global + local)": (
            [2, 4, 6, 8, 10, 12][short],
            lambda n: make_step(device, **{**STEP, "local_count": n - 2}),
        ),
        "K (prototypes)": (
            [1024, 4096, 16384, 65536, 262144][short],
            lambda n: make_step(device, **{**STEP, "out_dim": n}),
        ),
        "k-NN (images in the bank)": (
            [10_000, 31_623, 100_000, 316_228, 1_000_000][short],
            lambda n: make_knn(device, n),
        ),
    }


def measure(points: list[int], make: Callable[[int], Callable[[], None]], runs: int, device: str) -> list[float]:
    """Median seconds at each point. Points take turns, so that a drifting machine bends no curve."""
    work = {n: make(n) for n in points}
    seconds: dict[int, list[float]] = {n: [] for n in points}
    for turn in range(runs + 1):
        for n, run in work.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:  # The first is the warm-up.
                seconds[n].append(time.perf_counter() - start)
    return [statistics.median(seconds[n]) for n in points]


def exponent(points: list[int], seconds: list[float]) -> float:
    return float(np.polyfit(np.log(points), np.log(seconds), 1)[0])


def short(n: int) -> str:
    """262144 -> 262k"""
    return f"{n / 1e6:.3g}M" if n >= 1e6 else f"{n / 1e3:.0f}k" if n >= 1e3 else str(n)


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(3.2 * len(results), 3), layout="constrained")
    for axis, (name, curve) in zip(axes, results.items(), strict=True):
        axis.loglog(curve["points"], curve["seconds"], "o-", color="#2b6cb0")
        axis.set_title(name, fontsize=9)
        axis.set_xlabel(f"exponent {curve['exponent']:.2f}; upper half {curve['exponent_upper_half']:.2f}", fontsize=8)
        axis.set_xticks(curve["points"], [short(n) for n in curve["points"]])
        marked = [curve["seconds"][0], curve["seconds"][-1]]
        axis.set_yticks(marked, [f"{value:.2g}" for value in marked])
        axis.minorticks_off()
        axis.grid(True, alpha=0.2)
        axis.tick_params(labelsize=7)
    axes[0].set_ylabel("seconds", fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="three points a curve")
    parser.add_argument("--plot", type=Path, default=RESULTS.parents[1] / "docs" / "images" / "scaling.png")
    parser.add_argument("--replot", action="store_true", help="draw what was measured before")
    args = parser.parse_args()
    if args.replot:
        plot(json.loads((RESULTS / f"scaling-{args.device}.json").read_text())["curves"], args.plot)
        return
    results = {}
    for name, (points, make) in curves(args.device, args.quick).items():
        seconds = measure(points, make, args.runs, args.device)
        upper = len(points) // 2
        results[name] = {
            "points": points,
            "seconds": [float(f"{value:.4g}") for value in seconds],
            "exponent": round(exponent(points, seconds), 3),
            "exponent_upper_half": round(exponent(points[upper - 1 :], seconds[upper - 1 :]), 3),
        }
        print(name, results[name], flush=True)
    plot(results, args.plot)
    save("scaling", {"runs": args.runs, "base": STEP, "curves": results}, args.device)


if __name__ == "__main__":
    main()
