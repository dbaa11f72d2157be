"""Label propagation to one 480p frame: ours, plain nested loops, one dense matrix, and beside them the ViT-S/16 itself.

    python benchmarks/video.py [--device cuda] [--runs 5] [--threads 1]

The first table has 2 source frames, which is what nested loops can do in seconds; the second the 8 of the evaluation,
without them. Contenders take turns, A B C A B C; medians. They must agree on the labels.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dino.evaluation.propagation import propagate
from dino.models.vision_transformer import vit_small
from knn import hardware  # Beside this file.

RESULTS = Path(__file__).parent / "results"
GRID, DIM, OBJECTS, PATCH = (30, 52), 384, 3, 16  # A 480 x 832 frame.
RADIUS, TOPK, TEMPERATURE = 12, 5, 0.1


def nested_loops(target: Tensor, sources: Tensor, labels: Tensor) -> Tensor:
    """Patch by patch, over the frames, rows and columns of its window."""
    (f, h, w, _), out = sources.shape, torch.zeros(*target.shape[:2], labels.shape[-1])
    targets, candidates = target.cpu().numpy(), sources.cpu().numpy()
    known = labels.cpu()
    for y in range(h):
        for x in range(w):
            found = []
            for frame in range(f):
                for v in range(max(0, y - RADIUS), min(h, y + RADIUS + 1)):
                    for u in range(max(0, x - RADIUS), min(w, x + RADIUS + 1)):
                        found.append((float(targets[y, x].dot(candidates[frame, v, u])), frame, v, u))
            best = sorted(found, reverse=True)[:TOPK]
            weights = (torch.tensor([similar for similar, *_ in best]) / TEMPERATURE).softmax(0)
            for weight, (_, frame, v, u) in zip(weights, best, strict=True):
                out[y, x] += weight * known[frame, v, u]
    return out.to(labels.device)


def dense(target: Tensor, sources: Tensor, labels: Tensor, window: Tensor) -> Tensor:
    """All patches with all patches of all frames in one matrix, the window as a mask, the rest set to zero."""
    f, h, w, d = sources.shape
    similar = (target.view(-1, d) @ sources.view(f, -1, d).mT / TEMPERATURE).exp() * window  # (f, h w, h w)
    similar = similar.transpose(0, 1).reshape(h * w, -1)
    least = similar.topk(TOPK, dim=1).values[:, -1:]
    similar[similar < least] = 0
    return (similar / similar.sum(1, keepdim=True) @ labels.view(f * h * w, -1)).view(h, w, -1)


def seconds(work: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(frames: int, runs: int, device: str, with_loops: bool) -> dict[str, dict[str, float]]:
    random = torch.Generator().manual_seed(0)
    # Neighbouring patches are alike, as in a video: noise on a field that changes slowly.
    field = F.interpolate(torch.randn(frames + 1, DIM, 4, 6, generator=random), GRID, mode="bilinear")
    field = field + 0.5 * torch.randn(field.shape, generator=random)
    features = F.normalize(field.permute(0, 2, 3, 1), dim=-1).contiguous().to(device)
    target, sources = features[0], features[1:]
    labels = torch.rand(frames, *GRID, OBJECTS, generator=random).softmax(-1).to(device)
    y, x = (place.flatten() for place in torch.meshgrid(*map(torch.arange, GRID), indexing="ij"))
    apart = torch.maximum((y[:, None] - y).abs(), (x[:, None] - x).abs())
    window = (apart <= RADIUS).float().to(device)
    backbone = vit_small(PATCH).eval().to(device)
    image = torch.zeros(1, 3, PATCH * GRID[0], PATCH * GRID[1], device=device)

    contenders: dict[str, Callable[[], Tensor]] = {
        "dino": lambda: propagate(target, sources, labels, radius=RADIUS, topk=TOPK, temperature=TEMPERATURE),
        "dense matrix": lambda: dense(target, sources, labels, window),
        "ViT-S/16 forward": lambda: backbone(image).patch_tokens,
    }
    if with_loops:
        contenders["nested loops"] = lambda: nested_loops(target, sources, labels)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    with torch.inference_mode():
        ours = contenders["dino"]()
        for name, work in contenders.items():
            if name != "ViT-S/16 forward" and (difference := (work() - ours).abs().max().item()) > 1e-4:
                raise SystemExit(f"{name} gives other labels than dino: they differ by {difference}")
        contenders["ViT-S/16 forward"]()
        for _ in range(runs):
            for name, work in contenders.items():
                times[name].append(seconds(work, device))
    median = {name: statistics.median(spent) for name, spent in times.items()}
    return {
        name: {
            "seconds": round(median[name], 5),
            "fastest": round(min(spent), 5),
            "slowest": round(max(spent), 5),
            "times_of_dino": round(median[name] / median["dino"], 2),
        }
        for name, spent in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's default")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/video-DEVICE.json")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    results = {
        "grid": GRID,
        "dim": DIM,
        "runs": args.runs,
        "device": args.device,
        "threads": torch.get_num_threads(),
        "hardware": hardware(args.device),
        "versions": {"torch": version("torch")},
        "sources": {
            "2": compare(2, args.runs, args.device, with_loops=True),
            "8": compare(8, args.runs, args.device, with_loops=False),
        },
    }
    out = args.out or RESULTS / f"video-{args.device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=2) + "\n")
    for frames, rows in results["sources"].items():
        for name, row in rows.items():
            print(f"{frames} source frames  {name:<18} {row['seconds']:8.4f} s   {row['times_of_dino']:8.2f} x dino")


if __name__ == "__main__":
    main()
