"""Head and loss at 65,536 prototypes, forward and backward: in chunks, whole, and as a loop over pairs of crops.

    python benchmarks/loss.py [--device cuda] [--images 64] [--crops 10] [--runs 5]

What memory the logits cost is the peak beyond weights and inputs of one pass, each in a fresh process; times are of
processes that take turns.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch

from side_by_side import compare, save, show

DIM, OUT_DIM = 384, 65536
FORMS = ("chunked", "whole", "pairs")


def make(name: str, options: dict[str, Any]) -> Callable[[], int]:
    from dino.machine.device import prepare
    from dino.method.loss import DINOLoss
    from dino.models.head import DINOHead

    device = torch.device(options["device"])
    prepare(device)
    b, s = options["images"], options["crops"]
    features = torch.randn(b, s, DIM, device=device, requires_grad=True)
    teacher_logits = torch.randn(b, 2, OUT_DIM, device=device)
    head, dino_loss = DINOHead(DIM, OUT_DIM).to(device), DINOLoss(OUT_DIM).to(device)

    def pairs() -> torch.Tensor:
        """As a loop writes it: a softmax for every pair."""
        students = (head(features) / 0.1).unbind(1)
        targets = ((teacher_logits - dino_loss.center) / 0.04).softmax(-1).unbind(1)
        losses = [
            torch.sum(-p * torch.log_softmax(z, -1), -1).mean()
            for t, p in enumerate(targets)
            for v, z in enumerate(students)
            if t != v
        ]
        return torch.stack(losses).mean()

    forms = {
        "chunked": lambda: dino_loss(head.product(features), teacher_logits, 0.04),
        "whole": lambda: dino_loss(head(features), teacher_logits, 0.04),
        "pairs": pairs,
    }

    def run() -> int:
        head.zero_grad()
        features.grad = None
        forms[name]().backward()
        return b

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--crops", type=int, default=10)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    options = {"device": args.device, "images": args.images, "crops": args.crops}
    rows = compare(make, FORMS, options, args.runs)
    show(f"head and loss, {args.images * args.crops} rows x {OUT_DIM}, {args.device}, {args.runs} rounds", rows)
    key = "cuda_peak_mib" if args.device == "cuda" else "added_mib"
    fresh = [compare(make, FORMS, options, runs=1, warmup=0) for _ in range(args.runs)]
    memory = {name: statistics.median(each[name][key] for each in fresh) for name in FORMS}
    for name in FORMS[1:]:
        share = memory["chunked"] / memory[name]
        print(f"chunked takes {share:.3f} of the memory of {name} ({memory['chunked']:.0f} / {memory[name]:.0f} MiB)")
    results = {"options": options, "runs": args.runs, "contenders": rows, "memory_of_one_pass_mib": memory}
    save("loss", results, args.device)


if __name__ == "__main__":
    main()
