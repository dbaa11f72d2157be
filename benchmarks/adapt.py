"""Adapting to other images: what is won on them, and what is lost on those that the weights came from.

    python benchmarks/adapt.py run FOLDER --weights RUN [--seeds 0 1 2] [--steps 600]
    python benchmarks/adapt.py show          # the table of results/adapt.json

RUN are weights trained without labels on imagenette; they are adapted to CIFAR-10 (10,000 train images, by which k-NN
classifies 2,000 val images). The anchor is one half of imagenette's val images, by leave-one-out k-NN; the other half,
which no guard has seen, is measured in the end too. FOLDER holds the archives of both sets. Every training takes the
same number of steps of 64 images; a run that was killed goes on from its checkpoint, a row that is there is not made
again.

- frozen: the weights as they are.
- adapt: the recipe, with a guard (--max-loss 1). Its row "at its end" is the last teacher, which a run without a guard
  would have left.
- adapt, faster: the same at four times the learning rate in every layer, without the pull.
- adapt, old images too: that on CIFAR-10's and imagenette's train images together.
- adapt, old images too, coding rate: that with --method.coding-rate 0.002.
- pretrain --init: the same weights without what the recipe adds: no pull, no layer-wise decay, no warm-up of the head,
  a rate four times as large.
- from scratch: random weights.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import dino
from dino.data.source import Source
from dino.encoder.encoder import Encoder, open_encoder
from dino.evaluation import knn
from dino.options import KnnOptions
from learning_sets import keep_small
from side_by_side import read_rows, write_rows

RESULTS = Path(__file__).parent / "results" / "adapt.json"
BOTH = "adapt, old images too"
SPREAD = "adapt, old images too, coding rate"
VARIANTS = ("frozen", "adapt", "adapt, faster", BOTH, SPREAD, "pretrain --init", "from scratch")


def rows() -> list[dict[str, Any]]:
    return read_rows(RESULTS)


def add(row: dict[str, Any]) -> None:
    write_rows(RESULTS, [*rows(), row])
    print(row, flush=True)


def halves(imagenette: Path, work: Path) -> tuple[Path, Path]:
    """The val images dealt in turn into two folders with their classes."""
    made = work / "anchor", work / "unseen"
    for path in sorted((imagenette / "val").rglob("*.png")) if not made[1].exists() else ():
        target = made[int(path.stem) % 2] / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return made


class Judge:
    """k-NN (20) on CIFAR-10, and leave-one-out on both halves of imagenette's val images."""

    def __init__(self, cifar: Path, anchor: Path, unseen: Path) -> None:
        self.train, self.val = dino.open_source(cifar / "train"), dino.open_source(cifar / "val")
        self.halves = {"anchor": dino.open_source(anchor), "unseen": dino.open_source(unseen)}

    def __call__(self, encoder: Encoder) -> dict[str, float]:
        def top1(train: Source, val: Source | None = None) -> float:
            return knn.run(encoder, train, val, KnnOptions(k=(20,)))["knn_20_top1"]

        found = {"cifar10": top1(self.train, self.val)}
        return found | {name: top1(source) for name, source in self.halves.items()}


def settings_of(variant: str, weights: Path, anchor: Path, steps: int, seed: int) -> tuple[str, dict[str, Any]]:
    """The recipe, and what differs from it."""
    tenth = f"{max(steps // 10, 1)} steps"
    values: dict[str, Any] = {"optim__length": f"{steps} steps", "optim__warmup": tenth, "run__seed": seed}
    values |= {"optim__batch_size": 64, "run__threads": 1, "run__save_every": "1 minutes", "run__knn_every": "0 epochs"}
    begins: dict[str, Any] = {"adapt__init": str(weights)}
    if variant.startswith("adapt"):
        if variant != "adapt":
            begins |= {"optim__base_lr": 0.006, "adapt__pull": 0.0, "adapt__layer_decay": 1.0}
        if variant == SPREAD:
            begins["method__coding_rate"] = 0.002
        measured = f"{max(steps // 4, 1)} steps"
        guarded = {"adapt__anchor": str(anchor), "adapt__max_loss": 1.0, "run__knn_every": measured}
        return "adapt", values | begins | guarded | {"adapt__warm_head": tenth}
    # At the size that the weights know, as adapt does it.
    shown = {"crops__global_size": 64, "crops__local_size": 32, "crops__blur_sigma": (0.1, 0.57), "data__canvas": 146}
    return "auto", values | shown | (begins if variant == "pretrain --init" else {})


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    cifar, imagenette = (keep_small(name, args.folder, args.work) for name in ("cifar10", "imagenette"))
    anchor, unseen = halves(imagenette, args.work)
    judge = Judge(cifar, anchor, unseen)
    there = {(row["variant"], row["seed"], row["steps"]) for row in rows() if row["weights"] == args.weights.name}
    for seed in args.seeds:
        for variant in args.variants:
            if (variant, 0 if variant == "frozen" else seed, 0 if variant == "frozen" else args.steps) in there:
                continue
            row: dict[str, Any] = {"variant": variant, "seed": seed, "steps": args.steps, "weights": args.weights.name}
            if variant == "frozen":
                if seed == args.seeds[0]:
                    found = judge(open_encoder(args.weights, progress=False))
                    add(row | {"seed": 0, "steps": 0} | rounded(found))
                continue
            recipe, values = settings_of(variant, args.weights, anchor, args.steps, seed)
            out = args.work / "adapt" / f"{variant.replace(' ', '-')}-{args.steps}-{seed}"
            began = time.process_time()
            val = judge.val if variant.startswith("adapt") else None
            train = judge.train
            if variant in (BOTH, SPREAD):
                train = dino.open_source([cifar / "train", imagenette / "train"])
            found = dino.pretrain(train, out, recipe, val=val, quiet=True, **values)
            row["cpu_seconds"] = round(time.process_time() - began, 1)
            if variant.startswith("adapt"):
                lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
                history = [line for line in lines if line.get("anchor") is not None]
                last = history[-1]
                at_end = {"cifar10": last["knn_20_top1"], "anchor": last["anchor"]}
                add(row | {"variant": f"{variant}, at its end", "stopped_after": last["step"]} | rounded(at_end))
                row |= {"kept_step": found["kept_step"], "kept_share": found["kept_share"]}
            add(row | rounded(judge(open_encoder(out, progress=False))))


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in values.items()}


def show() -> None:
    """One line a variant and length: means over seeds, with every seed's number."""
    print("| variant | steps | n | CIFAR-10 k-NN, % | anchor k-NN, % | unseen half, % | CPU s |")
    print("|---|---|---|---|---|---|---|")
    for steps, variant in dict.fromkeys((row["steps"], row["variant"]) for row in rows()):
        mine = [row for row in rows() if (row["steps"], row["variant"]) == (steps, variant)]

        def cell(name: str, mine: list[dict[str, Any]] = mine) -> str:
            values = [row[name] for row in mine if name in row]
            each = f" ({', '.join(f'{value:.1f}' for value in values)})" if len(values) > 1 else ""
            return f"{mean(values):.1f}{each}" if values else ""

        cells = [cell(name) for name in ("cifar10", "anchor", "unseen", "cpu_seconds")]
        print("|", " | ".join([variant, str(steps), str(len(mine)), *cells]), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["run", "show"])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("../shared/data"))
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "dino-downstream")
    args = parser.parse_args()
    if args.do == "show":
        show()
        return
    if args.weights is None:
        parser.error("--weights is needed")
    run(args)


if __name__ == "__main__":
    main()
