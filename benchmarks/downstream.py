"""What weights are worth downstream: fine-tuned and probed, patches segmented, anomalies found.

    python benchmarks/downstream.py run FOLDER --weights RUN [--what finetune segment anomaly] [--seeds 0 1 2]
    python benchmarks/downstream.py show          # the tables of results/downstream.json

FOLDER holds the archives of imagenette and DAVIS. A row that is there is not made again, and a fine-tuning that was
killed goes on from its checkpoint. RUN are weights trained without labels on imagenette; "untrained" is the same
network with random weights.

- finetune: 2,000 train images of imagenette drawn by seed, a tenth of them held out to choose by; judged on every
  fourth val image. Linear probes see the same images: the best of 28 on the held-out tenth.
- segment: every fourth frame of four videos of DAVIS, object or background; two videos to learn from, two to judge: all
  six pairs, by seed. A linear head.
- anomaly: one class of imagenette (by seed) is normal: its train images are the bank, val images of all classes are
  judged.
"""

import argparse
import dataclasses
import itertools
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import dino
from dino.data.mask_parts import open_classes
from dino.data.source import Source
from dino.encoder.encoder import Encoder
from dino.evaluation import anomaly, linear, segmentation
from dino.machine.randomness import derive_seed, generator
from dino.options import AnomalyOptions, LinearOptions, SegmentOptions
from learning_sets import keep_small
from side_by_side import read_rows, write_rows

RESULTS = Path(__file__).parent / "results" / "downstream.json"
TUNING: dict[str, Any] = {"epochs": 12, "warmup": 1, "lr": 0.01, "mixup": 0.0, "cutmix": 0.0, "erase": 0.0}
TUNING |= {"augment": "off"}
SEGMENTING = SegmentOptions(size=480, epochs=40, batch_size=1, lr=0.005)


def rows() -> list[dict[str, Any]]:
    return read_rows(RESULTS)


def add(row: dict[str, Any]) -> None:
    write_rows(RESULTS, [*rows(), row])
    print(row, flush=True)


def untrained(encoder: Encoder, seed: int) -> Encoder:
    """The same network with the weights that it has when it is built."""
    from dino.models.build import build_described
    from dino.models.weights import describe

    torch.manual_seed(derive_seed(seed, "untrained"))
    backbone = build_described(describe(encoder.backbone)).to(encoder.device).eval()
    return dataclasses.replace(encoder, backbone=backbone)


def drawn(source: Source, count: int, seed: int) -> Source:
    order = torch.randperm(len(source), generator=generator(seed, "downstream"))
    return source.subset(order[:count].sort().values)


def finetune(variant: str, encoder: Encoder, imagenette: Path, seed: int, work: Path) -> dict[str, Any]:
    train = drawn(dino.open_source(imagenette / "train"), 2000, seed)
    test = dino.open_source(imagenette / "val")
    test = test.subset(range(0, len(test), 4))
    fits, chooses = train.split(0.1, seed)
    if variant.startswith("probe"):
        options = LinearOptions(grid=True, cached=True, epochs=100, batch_size=256, seed=seed)
        found = linear.run(encoder, fits, test, chooses, options)
        return {"top1": found["linear_best_top1"], "chosen": found["linear_best_lr"]}
    whole = dataclasses.replace(fits, parts={"train": fits, "val": chooses})
    out = work / f"{variant.replace(' ', '-')}-{seed}"
    found = dino.finetune(encoder, whole, out, test, quiet=True, precision="float32", seed=seed, **TUNING)
    return {"top1": found["top1"], "chosen": found["best_epoch"]}


def segment(encoder: Encoder, davis: Path, seed: int) -> dict[str, Any]:
    items = [item for part in open_classes(str(davis), 0.5, 0) for item in part[::4]]
    videos = sorted({item.name.split("/")[0] for item in items})
    teachers = list(itertools.combinations(videos, 2))[seed % 6]
    train, val = ([item for item in items if (item.name.split("/")[0] in teachers) is t] for t in (True, False))
    options = dataclasses.replace(SEGMENTING, seed=seed)
    made = segmentation.fit(encoder, train, [0, 1], options)
    judges = sorted({item.name.split("/")[0] for item in val})
    return {**segmentation.score(encoder, made, val), "judges": judges}


def find_anomalies(encoder: Encoder, imagenette: Path, seed: int) -> dict[str, Any]:
    train, val = (dino.open_source(imagenette / part) for part in ("train", "val"))
    normal = (train.classes[seed % len(train.classes)],)
    images = drawn(train.subset(anomaly.of_class(train, normal).nonzero().flatten()), 300, seed)
    val = val.subset(range(0, len(val), 4))
    bank = anomaly.fit(encoder, images, AnomalyOptions(seed=seed))
    found = anomaly.score(encoder, val, bank)
    anomalous = ~anomaly.of_class(val, normal)[found.indices]
    return {"auroc": anomaly.auroc(found.scores, anomalous), "normal": normal[0], "images": len(anomalous)}


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    imagenette = keep_small("imagenette", args.folder, args.work)
    (davis,) = args.folder.glob("davis2016*.tar")
    trained = dataclasses.replace(dino.encoder(args.weights), progress=False)
    name = args.weights.name
    variants = {
        "finetune": ["probe, trained", "fine-tuned, trained", "probe, untrained", "fine-tuned, untrained"],
        "segment": ["trained", "untrained"],
        "anomaly": ["trained", "untrained"],
    }
    there = {(row["what"], row["variant"], row["seed"]) for row in rows() if row["weights"] == name}
    for seed in args.seeds:
        for what in args.what:
            for variant in variants[what]:
                if (what, variant, seed) in there or args.variants not in variant:
                    continue
                encoder = untrained(trained, seed) if variant.endswith("untrained") else trained
                began = time.process_time()
                if what == "finetune":
                    found = finetune(variant, encoder, imagenette, seed, args.work / "downstream")
                elif what == "segment":
                    found = segment(encoder, davis, seed)
                else:
                    found = find_anomalies(encoder, imagenette, seed)
                found = {key: round(value, 2) if isinstance(value, float) else value for key, value in found.items()}
                seconds = round(time.process_time() - began, 1)
                add({"what": what, "variant": variant, "seed": seed, "weights": name, **found, "cpu_seconds": seconds})


def show() -> None:
    """One line a variant and weights: the mean over seeds and every seed's number."""
    measures = {"finetune": "top1", "segment": "miou", "anomaly": "auroc"}
    for what, measure in measures.items():
        print(f"\n| {what} | weights | n | mean {measure}, % | each seed | CPU s |")
        print("|---|---|---|---|---|---|")
        found = sorted((row for row in rows() if row["what"] == what), key=lambda row: row["seed"])
        for weights, variant in sorted({(row["weights"], row["variant"]) for row in found}):
            mine = [row for row in found if (row["weights"], row["variant"]) == (weights, variant)]
            values = [row[measure] for row in mine]
            each = ", ".join(f"{value:.1f}" for value in values)
            seconds = mean(row["cpu_seconds"] for row in mine)
            print(f"| {variant} | {weights} | {len(mine)} | {mean(values):.1f} | {each} | {seconds:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["run", "show"])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("../shared/data"))
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--what", nargs="+", choices=["finetune", "segment", "anomaly"])
    parser.add_argument("--variants", default="", help="only those with this in their name")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "dino-downstream")
    args = parser.parse_args()
    if args.do == "show":
        show()
        return
    if args.weights is None:
        parser.error("--weights is needed")
    args.what = args.what or ["segment", "anomaly", "finetune"]
    run(args)


if __name__ == "__main__":
    main()
