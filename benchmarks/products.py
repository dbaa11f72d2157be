"""Float32 matrix products of a vision transformer on this CPU: torch's default (MKL on x86) beside oneDNN.

    python benchmarks/products.py [--runs 15]

Forward, gradient of the input and gradient of the weight of linear layers, in GFLOP/s, in turns, medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from dino.machine import private_calls
from dino.machine.device import prepare
from dino.models import products as ours
from side_by_side import save

# Rows (tokens of a batch), inputs, outputs.
SHAPES = {
    "ViT-Ti qkv, 32 images": (6336, 192, 576),
    "ViT-Ti fc1": (6336, 192, 768),
    "ViT-Ti fc2": (6336, 768, 192),
    "ViT-S fc1, 8 images": (5520, 384, 1536),
    "ViT-S fc2": (5520, 1536, 384),
    "prototypes, 80 crops": (80, 256, 65536),
}


def median_seconds(works: list[Callable[[], torch.Tensor]], runs: int) -> list[float]:
    seconds: list[list[float]] = [[] for _ in works]
    for turn in range(runs + 2):
        for found, work in zip(seconds, works, strict=True):
            start = time.perf_counter()
            work()
            if turn >= 2:
                found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    args = parser.parse_args()
    if not private_calls.onednn_linear.usable:
        raise SystemExit("this build of torch has no oneDNN to compare with")
    prepare(torch.device("cpu"))
    table = Table("layer", "rows x in x out", "forward", "input gradient", "weight gradient", "(default / oneDNN)")
    results = {}
    for name, (rows, inputs, outputs) in SHAPES.items():
        x, w, g = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
        pairs = {
            "forward": (lambda x=x, w=w: F.linear(x, w), lambda x=x, w=w: ours._onednn(x, w)),
            "input": (lambda g=g, w=w: g @ w, lambda g=g, w=w: ours._onednn(g, w.mT)),
            "weight": (lambda g=g, x=x: g.mT @ x, lambda g=g, x=x: ours._transposed_product(g, x)),
        }
        work = 2 * rows * inputs * outputs / 1e9
        speeds = {kind: [work / s for s in median_seconds(list(pair), args.runs)] for kind, pair in pairs.items()}
        results[name] = {kind: [round(s) for s in pair] for kind, pair in speeds.items()}
        table.add_row(name, f"{rows} x {inputs} x {outputs}", *(f"{a:.0f} / {b:.0f}" for a, b in speeds.values()))
    ratios = [b / a for row in results.values() for a, b in row.values()]
    Console(width=120).print(table)
    print(
        f"GFLOP/s, {torch.get_num_threads()} threads; oneDNN is {statistics.median(ratios):.2f} times as fast (median)"
    )
    save("products", {"gflops_default_and_onednn": results, "median_ratio": statistics.median(ratios)}, "cpu")


if __name__ == "__main__":
    main()
