"""What learns more for the same compute: named variants of the settings, unlike sets of images, several seeds.

    python benchmarks/learning.py run FOLDER --data imagenette --variants resnet nano --seeds 0 1 2 [--tflop 10]
    python benchmarks/learning.py long FOLDER --tflop 270      # one long run and its curve: results/long.json
    python benchmarks/learning.py show          # the table of results/learning.json, and the plot beside it

FOLDER holds the archives that DATA names below. Every variant trains for the same number of operations of the networks
(counted, forward and backward); CPU seconds of the steps are measured beside it. A run is ``dino.pretrain`` in a folder
of its own under --work: one that was killed goes on from its checkpoint, one that has its row is not repeated.
``--device cuda`` trains the ViT-S/16 of the published anchor (imagenette, 200 epochs), in pieces of --minutes.
"""

import argparse
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2.functional import rgb_to_grayscale

from dino.augment.resample import resize_and_center_crop
from dino.config import Config, CropConfig, DataConfig, MethodConfig, ModelConfig, OptimConfig, RunConfig, replace
from dino.data.decode import to_canvas
from dino.data.loader import rows_of_step
from dino.data.sources import open_source
from dino.evaluation.knn import knn_classify
from dino.evaluation.metrics import rankme
from dino.evaluation.probes import Labelled, Probe, accuracies, train_probes
from dino.machine import device as hardware
from dino.machine import private_calls
from dino.machine.randomness import generator
from dino.method.learner import make_learner
from dino.method.schedules import Now
from dino.method.step import train_step
from dino.models.backbone import Tokens
from dino.models.weights import load
from dino.run import pretrain as running
from dino.run.interruption import Stopped
from learning_lightly import trained_by_lightly
from side_by_side import environment, read_rows, write_rows

RESULTS = Path(__file__).parent / "results" / "learning.json"
# Name -> pixels an image is kept at, and its parts: what ``open_source`` takes, files of FOLDER before "/".
SETS: dict[str, tuple[int, dict[str, list[str]]]] = {
    "imagenette": (128, {"train": ["imagenette-train-*.tar"], "val": ["imagenette-val.tar"]}),
    "imagenette-full": (224, {"train": ["imagenette-train-*.tar"], "val": ["imagenette-val.tar"]}),
    "cifar10": (32, {"train": ["cifar10-12k.zip"], "val": ["cifar10-12k.zip"]}),
    "shapes": (48, {"train": ["shapes:2000x48"], "val": ["shapes:2000x48"]}),
    "digits": (8, {"train": [], "val": []}),  # Of scikit-learn: 1,797 grey images, every fifth judges.
}
# Made of another: how many of its train images (all: None), and without colour or with.
PARTS_OF: dict[str, tuple[str, int | None, bool]] = {
    "imagenette-1k": ("imagenette", 1000, False),
    "imagenette-3k": ("imagenette", 3000, False),
    "imagenette-grey": ("imagenette", None, True),
}
PIXELS = "pixels"  # No network: what the images themselves give.
LIGHTLY = "lightly"  # ``learning_lightly.py``, beside the variant --like.
LRS = (0.001, 0.003, 0.01, 0.03, 0.1)  # Of the linear probes, for 256 images.


def cpu(**changes: Any) -> Config:
    """What the variants of a CPU have in common."""
    base = Config(
        data=DataConfig(canvas=512),
        crops=CropConfig(
            global_size=64,
            local_size=32,
            local_count=4,
            global_scale=(0.25, 1.0),
            local_scale=(0.05, 0.25),
            blur_sigma=(0.1, 0.6),
        ),
        model=ModelConfig("timm:test_resnet", 8, drop_path=0.0, out_dim=1024, hidden_dim=512, bottleneck_dim=128),
        method=MethodConfig(teacher_temp=0.02, warmup_teacher_temp=0.02, teacher_momentum=0.98, targets="sinkhorn"),
        optim=OptimConfig(batch_size=64, base_lr=0.006),
        run=RunConfig(precision="bfloat16"),
    )
    return replace(base, **changes)


_NANO = {"model__backbone": "vit_nano", "crops__global_size": 32, "crops__local_size": 16}
_CENTER = {"method__targets": "center", "method__teacher_temp": 0.015, "method__warmup_teacher_temp": 0.015}
_WARMER = {"method__teacher_temp": 0.04, "method__warmup_teacher_temp": 0.04}
_SMALL = {"crops__global_size": 32, "crops__local_size": 16}
_OLD = {  # ``auto`` of version 0.1 on a CPU.
    **_CENTER,
    "model__backbone": "vit_tiny",
    "model__use_bn": True,
    "run__precision": "float32",
    "optim__batch_size": 32,
    "method__teacher_momentum": 0.993,
}
VARIANTS: dict[str, Callable[[], Config]] = {
    "resnet": cpu,
    "resnet, center": lambda: cpu(**_CENTER),
    "resnet, center 0.04": lambda: cpu(**_CENTER | _WARMER),
    "resnet, BatchNorm in the head": lambda: cpu(model__use_bn=True),
    "resnet, momentum 0.99": lambda: cpu(method__teacher_momentum=0.99),
    "resnet, momentum 0.95": lambda: cpu(method__teacher_momentum=0.95),
    "resnet, teacher 0.04": lambda: cpu(method__teacher_temp=0.04, method__warmup_teacher_temp=0.04),
    "resnet, K 4096": lambda: cpu(model__out_dim=4096),
    "resnet, float32": lambda: cpu(run__precision="float32"),
    "resnet 32": lambda: cpu(**_SMALL, crops__blur_sigma=(0.1, 0.5)),
    "resnet 32, center": lambda: cpu(**_SMALL, **_CENTER, crops__blur_sigma=(0.1, 0.5)),
    "nano": lambda: cpu(**_NANO),
    "nano, Muon": lambda: cpu(**_NANO, optim__optimizer="muon"),
    "nano, center": lambda: cpu(**_NANO, **_CENTER),
    "resnet, batch 16": lambda: cpu(optim__batch_size=16),
    "resnet, batch 16, queue": lambda: cpu(optim__batch_size=16, method__queue=512),
    "resnet, coding rate 0.002": lambda: cpu(method__coding_rate=0.002),
    "resnet, coding rate 0.0005": lambda: cpu(method__coding_rate=0.0005),
    "resnet, queue": lambda: cpu(method__queue=512),
    "resnet, batch 128": lambda: cpu(optim__batch_size=128),
    "resnet, 2 local crops": lambda: cpu(crops__local_count=2),
    "resnet, lr 0.012": lambda: cpu(optim__base_lr=0.012),
    "resnet 48": lambda: cpu(crops__global_size=48, crops__local_size=24, crops__blur_sigma=(0.1, 0.5)),
    "old auto": lambda: cpu(**_OLD),
    "resnet, the old recipe": lambda: cpu(**{**_OLD, "model__backbone": cpu().model.backbone}),
    "old auto 32": lambda: cpu(**_OLD, **_SMALL, model__patch_size=4),
}


def anchor() -> Config:
    """The published anchor: ViT-S/16 on imagenette, 200 epochs (stable-pretraining: k-NN 83.8, linear 86.1 %)."""
    return Config(
        data=DataConfig(canvas=256),
        crops=CropConfig(global_scale=(0.25, 1.0), local_scale=(0.05, 0.25), local_count=6),
        model=ModelConfig("vit_small", 16, out_dim=4096),
        method=MethodConfig(teacher_momentum=0.99, targets="sinkhorn"),
        optim=OptimConfig(length="200 epochs", batch_size=256, base_lr=0.0005, warmup="10 epochs"),
        run=RunConfig(device="cuda", save_every="2 minutes"),
    )


def keep_small(name: str, folder: Path, work: Path) -> Path:
    """The set as small PNG files, one folder a class, and ``pixels.pt`` of the same: decoded once."""
    out = work / "data" / name
    if not (out / "pixels.pt").exists():
        if name in PARTS_OF:
            kept = _part_of(*PARTS_OF[name], folder, work)
        else:
            side, parts = SETS[name]
            kept = {part: _pixels(name, part, wanted, folder, side) for part, wanted in parts.items()}
        for part, (images, labels) in kept.items():
            _write_images(out / part, images, labels)
        torch.save(kept, out / "pixels.partial")
        os.replace(out / "pixels.partial", out / "pixels.pt")
    return out


def _part_of(whole: str, count: int | None, grey: bool, folder: Path, work: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Some train images of another set, drawn once for all seeds; its val images are the judges of all parts."""
    kept = torch.load(keep_small(whole, folder, work) / "pixels.pt")
    images, labels = kept["train"]
    rows = torch.randperm(len(labels), generator=generator(0, "part"))[:count]
    kept["train"] = images[rows], labels[rows]
    if grey:
        kept = {part: (rgb_to_grayscale(images, 3), labels) for part, (images, labels) in kept.items()}
    return kept


def _pixels(name: str, part: str, wanted: list[str], folder: Path, side: int) -> tuple[Tensor, Tensor]:
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        rows = (torch.arange(len(digits.target)) % 5 == 0) == (part == "val")
        images = (torch.from_numpy(digits.images)[rows] * 255 / 16).round().byte()
        return images[:, None].expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(digits.target)[rows].long()
    data = [str(path) for one in wanted for path in sorted(folder.glob(one))] or wanted
    source = open_source(data)
    source = source.parts.get(part, source)
    if source.labels is None:
        raise ValueError(f"{data} has no labels to judge by")
    images = []
    for i in range(len(source)):
        image = source.load(i, 2 * side)
        small = resize_and_center_crop(image[None], torch.tensor([image.shape[-2:]]), side, side)
        images.append((small[0] * 255).round().clamp(0, 255).byte())
    return torch.stack(images), source.labels


def _write_images(folder: Path, images: Tensor, labels: Tensor) -> None:
    from PIL import Image

    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        path = folder / str(label) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, compress_level=1)


def tflop_per_step(config: Config) -> float:
    """Operations of one training step (two a multiply-add), forward and backward, teacher and student; counted."""
    from torch.utils.flop_counter import FlopCounterMode

    small = replace(config, optim__batch_size=8, run__accumulate=1)
    learner = make_learner(small, torch.device("cpu"))
    c = small.crops
    crops: Any = (
        torch.randn(8, c.global_count, 3, c.global_size, c.global_size),
        torch.randn(8, c.local_count, 3, c.local_size, c.local_size),
    )
    now = Now(0.0, 0.0, 1.0, 0.04)
    private_calls.use_public_calls()  # The counter knows those.
    try:
        from dino.augment.multicrop import Crops

        with FlopCounterMode(display=False) as counter:
            train_step(
                learner, [(Crops(*crops), None)], 1, now, small.optim, torch.autocast("cpu", enabled=False), False
            )
        with FlopCounterMode(display=False) as optimizer:  # Muon multiplies too, whatever the batch.
            learner.optimizer.step()
    finally:
        private_calls.use_public_calls(False)
    operations = counter.get_total_flops() - optimizer.get_total_flops()
    return operations / 8 * config.optim.batch_size / 1e12


def planned(config: Config, tflop: float, images: int, seed: int) -> Config:
    """The same settings, as long as the budget allows."""
    steps = max(10, round(tflop / tflop_per_step(config)))
    batch = min(config.optim.batch_size, images)
    return replace(
        config,
        optim__length=f"{steps} steps",
        optim__batch_size=batch,
        optim__warmup=f"{max(steps // 10, 1)} steps",
        optim__freeze_last_layer=f"{max(steps // 20, 1)} steps",
        run__seed=seed,
        run__knn_every="0 epochs",
        run__save_every="1 minutes",
    )


def trained(
    data: Path, out: Path, config: Config, minutes: float | None = None, **besides: Any
) -> dict[str, Any] | None:
    """Trains (or goes on), and gives what the run measured; None where the time was over first. ``besides``: what
    ``dino.pretrain`` takes.

    CPU and wall-clock seconds are those of the steps (their crops included), also over several calls.
    """
    spent_file = out / "seconds.json"
    spent = json.loads(spent_file.read_text()) if spent_file.exists() else {"cpu": 0.0, "wall": 0.0, "steps": 0}
    real, began = train_step, time.perf_counter()

    def timed(*arguments: Any) -> Any:
        start, cpu_start = time.perf_counter(), time.process_time()
        outputs = real(*arguments)
        spent["wall"] += time.perf_counter() - start
        spent["cpu"] += time.process_time() - cpu_start
        spent["steps"] += 1
        if spent["steps"] % 25 == 0:
            spent_file.write_text(json.dumps(spent))
        if minutes is not None and time.perf_counter() - began >= 60 * minutes:
            os.kill(os.getpid(), signal.SIGTERM)  # The run saves itself and stops.
        return outputs

    running.train_step = timed
    try:
        running.pretrain(open_source(str(data / "train")), out, config, quiet=True, **besides)
    except Stopped as stopped:
        print(stopped)
        return None
    finally:
        running.train_step = real
        spent_file.write_text(json.dumps(spent))
    last = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    monitors = next(line for line in reversed(last) if "prototypes_used" in line)
    return {
        "cpu_seconds": round(spent["cpu"], 1),
        "wall_seconds": round(spent["wall"], 1),
        "steps_timed": spent["steps"],
        "prototypes_used": monitors["prototypes_used"],
        "entropy": round(monitors["teacher_entropy_ratio"], 3),
    }


class Pixels(nn.Module):
    """The images themselves as features."""

    def forward(self, images: Tensor) -> Tokens:
        return Tokens(images.flatten(1), images.flatten(1)[:, None, None])


@torch.inference_mode()
def judged(backbone: nn.Module, data: Path, config: Config, size: int, linear: bool = True) -> dict[str, float]:
    """k-NN(20) of the [CLS] token (or pooled features), linear probes on it and with the mean patch, RankMe."""
    device = hardware.choose_device(config.run.device)
    backbone.eval().to(device)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (config.crops.mean, config.crops.std))
    kept = torch.load(data / "pixels.pt")
    tokens, labels = [], []
    for part in ("train", "val"):
        rows = []
        for images in kept[part][0].split(256):
            canvas = to_canvas(list(images), *images.shape[-2:])
            shown = (resize_and_center_crop(*canvas, round(size * 256 / 224), size) - mean) / std
            found = backbone(shown.to(device))
            rows.append(torch.stack([found.cls_token, found.patch_tokens.flatten(1, 2).mean(1)], 1).float().cpu())
        tokens.append(torch.cat(rows))
        labels.append(kept[part][1])
    unit = [F.normalize(part[:, 0], dim=-1) for part in tokens]
    found = {
        "knn_20": knn_classify(unit[0], labels[0], unit[1], labels[1], ks=(20,))["knn_20_top1"],
        "rankme": float(rankme(unit[0])),
    }
    if linear:
        shift, scale = tokens[0].mean(0), tokens[0].std(0).clamp_min(1e-6)
        train, val = (Labelled((part - shift) / scale, known) for part, known in zip(tokens, labels, strict=True))
        found |= {"linear": _linear(train, val, False), "linear_mean": _linear(train, val, True)}
    return {name: round(value, 2) for name, value in found.items()}


def _linear(train: Labelled, val: Labelled, avgpool: bool, epochs: int = 30, batch: int = 512) -> float:
    """Probes of a grid of learning rates on stored, standardised features; a tenth of the train images chooses."""
    chooses = torch.rand(len(train.labels), generator=generator(0, "probe")) < 0.1
    fits, chosen_by = (Labelled(train.tokens[rows], train.labels[rows]) for rows in (~chooses, chooses))
    batch = min(batch, len(fits.labels))
    steps = len(fits.labels) // batch
    order = (rows_of_step(step, len(fits.labels), batch, 0) for step in range(steps * epochs))
    batches = (Labelled(fits.tokens[rows], fits.labels[rows]) for rows in order)
    probes = [Probe(lr, 1, avgpool) for lr in LRS]
    classes = int(train.labels.max()) + 1
    *_, weights = train_probes(
        batches, probes, epochs=epochs, steps_per_epoch=steps, batch_size=batch, num_classes=classes
    )
    best = int(accuracies(probes, weights, chosen_by)[:, 0].argmax())
    return float(accuracies([probes[best]], [weights[best]], val)[0, 0])


def rows() -> list[dict[str, Any]]:
    return read_rows(RESULTS)


def add_row(row: dict[str, Any]) -> None:
    row = row | {"cpu": environment("cpu")["cpu"]}  # Rows may come from several machines.
    write_rows(RESULTS, [other for other in rows() if _key(other) != _key(row)] + [row])


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["data"], row["variant"], row["tflop"], row["seed"]


def run(args: argparse.Namespace) -> None:
    from learning_tried import TRIED, as_it_is

    torch.set_num_threads(args.threads)
    hardware.prepare(torch.device("cpu"), args.threads)
    data = keep_small(args.data, args.folder, args.work)
    images = len(torch.load(data / "pixels.pt")["train"][1])
    for seed in args.seeds:
        for variant in args.variants:
            tflop = 0.0 if variant == PIXELS else args.tflop
            key = {"data": args.data, "variant": variant, "tflop": tflop, "seed": seed}
            if any(_key(row) == _key(key) for row in rows()):
                continue
            base, part = TRIED.get(variant, (args.like if variant in (PIXELS, LIGHTLY) else variant, as_it_is))
            config = planned(VARIANTS[base](), args.tflop, images, seed)
            size = args.size or config.crops.global_size
            out = args.work / "runs" / "-".join(f"{value}".replace(" ", "_").replace(",", "") for value in key.values())
            if variant == PIXELS:
                row = key | {"steps": 0, "size": size} | judged(Pixels(), data, config, size)
                add_row(row)
                print(json.dumps(row), flush=True)
                continue
            train = trained_by_lightly if variant == LIGHTLY else trained
            made = replace(VARIANTS[base](), run__threads=args.threads)
            with part(made, args.tflop, images, seed) as (config, besides):
                found = train(data, out, config, args.minutes, **besides)
            if found is None:
                return
            untrained = judged(make_learner(config, torch.device("cpu")).teacher.backbone, data, config, size)
            row = key | {"steps": int(config.optim.length.split()[0]), "batch": config.optim.batch_size, "size": size}
            row |= found | judged(load(out / "backbone.safetensors"), data, config, size)
            row |= {f"untrained_{name}": untrained[name] for name in ("knn_20", "linear", "linear_mean")}
            add_row(row)
            print(json.dumps(row), flush=True)


def cuda(args: argparse.Namespace) -> None:
    """The anchor, in pieces: the same command goes on until it prints the results."""
    data = keep_small("imagenette-full", args.folder, args.work)
    config = replace(anchor(), run__device=args.device, **json.loads(args.changes))
    found = trained(data, args.work / "anchor", config, args.minutes)
    if found is not None:
        backbone = load(args.work / "anchor" / "backbone.safetensors")
        print(json.dumps(found | judged(backbone, data, config, config.crops.global_size)))


def long(args: argparse.Namespace) -> None:
    """One variant for long: what it knows at ten moments, from the milestones that the run keeps; of a run that was
    stopped (--minutes), at those so far."""
    torch.set_num_threads(args.threads)
    hardware.prepare(torch.device("cpu"), args.threads)
    data = keep_small(args.data, args.folder, args.work)
    images = len(torch.load(data / "pixels.pt")["train"][1])
    (variant,), (seed,) = args.variants, args.seeds
    config = planned(VARIANTS[variant](), args.tflop, images, seed)
    size, steps = args.size or config.crops.global_size, int(config.optim.length.split()[0])
    config = replace(config, run__threads=args.threads, run__keep_every=f"{-(-steps // 10)} steps")
    out = args.work / "long" / f"{args.data}-{variant}-{args.tflop:g}-{seed}".replace(" ", "_").replace(",", "")
    found = trained(data, out, config, args.minutes)
    if found is None:
        spent = json.loads((out / "seconds.json").read_text())
        found = {"stopped_before_step": steps, "cpu_seconds": round(spent["cpu"], 1)}
    curve = [{"step": 0} | judged(make_learner(config, torch.device("cpu")).teacher.backbone, data, config, size)]
    for checkpoint in sorted((out / "checkpoints").glob("step_*.safetensors")):
        step = int(checkpoint.stem.removeprefix("step_"))
        curve.append({"step": step} | judged(load(checkpoint), data, config, size))
        print(json.dumps(curve[-1]), flush=True)
    result = {
        "data": args.data,
        "variant": variant,
        "tflop": args.tflop,
        "seed": seed,
        "batch": config.optim.batch_size,
    }
    text = json.dumps({**result, **found, "curve": curve, "environment": environment("cpu")}, indent=1)
    RESULTS.with_name("long.json").write_text(text + "\n")


def show() -> None:
    """The table: medians over seeds, and their range."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows():
        groups.setdefault((row["data"], row["tflop"], row["variant"]), []).append(row)
    print("| set | TFLOP | variant | n | steps | CPU s | k-NN(20) | linear | + mean patch | RankMe | prototypes used |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for (data, tflop, variant), found in sorted(groups.items(), key=lambda item: str(item[0])):
        cells = [_cell([row[name] for row in found]) for name in ("knn_20", "linear", "linear_mean", "rankme")]
        seconds, used = (
            f"{median(row[name] for row in found):.0f}" if name in found[0] else ""
            for name in ("cpu_seconds", "prototypes_used")
        )
        print(
            "|",
            " | ".join([data, f"{tflop:g}", variant, f"{len(found)}", f"{found[0]['steps']}", seconds, *cells, used]),
            "|",
        )
    ablation()
    plot()


MENDED = "resnet, mended convolutions"  # The winner once more, after the fault that docs/learning.md tells of.


def ablation(winner: str = "resnet") -> None:
    """One part changed: each seed's difference from the winner's same seed, from before or after its fault alike."""
    of_winner = {(row["variant"], row["data"], row["tflop"], row["seed"]): row for row in rows()}
    groups: dict[tuple[str, float, str], list[tuple[float, float]]] = {}
    for row in rows():
        like = (row["data"], row["tflop"], row["seed"])
        old = row.get("mended") is False or row["variant"] == MENDED or (MENDED, *like) not in of_winner
        base = of_winner.get((winner if old else MENDED, *like))
        if base is not None and row["variant"].startswith(f"{winner}, "):
            change = row["knn_20"] - base["knn_20"], row["linear"] - base["linear"]
            groups.setdefault((row["data"], row["tflop"], row["variant"]), []).append(change)
    print(f"\n| set | TFLOP | {winner}, but | n | k-NN(20) | linear |\n|---|---|---|---|---|---|")
    for (data, tflop, variant), changes in sorted(groups.items()):
        cells = [f"{mean(c):+.1f} ({min(c):+.1f} to {max(c):+.1f})" for c in zip(*changes, strict=True)]
        print(
            "|", " | ".join([data, f"{tflop:g}", variant.removeprefix(f"{winner}, "), f"{len(changes)}", *cells]), "|"
        )


def _cell(values: Sequence[float]) -> str:
    middle = f"{median(values):.1f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.1f}-{max(values):.1f})"


def plot() -> None:
    """k-NN over compute, one line a variant that was run at more than one budget, a point for the others."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    trained = [row for row in rows() if row["variant"] != PIXELS]
    variants = {name: sorted({row["variant"] for row in trained if row["data"] == name}) for name in SETS | PARTS_OF}
    names = [name for name, found in variants.items() if len(found) > 1]  # One variant alone compares nothing.
    figure, axes = plt.subplots(max(len(names), 1), 1, figsize=(9, 4 * max(len(names), 1)), squeeze=False)
    for axis, name in zip(axes[:, 0], names, strict=False):
        mine = [row for row in trained if row["data"] == name]
        for i, variant in enumerate(variants[name]):
            budgets = sorted({row["tflop"] for row in mine if row["variant"] == variant})
            at = [[row for row in mine if (row["variant"], row["tflop"]) == (variant, b)] for b in budgets]
            axis.plot(
                [median(row["cpu_seconds"] for row in found) for found in at],
                [median(row["knn_20"] for row in found) for found in at],
                "osD^vP"[i // 10] + "-",
                label=variant,
            )
        axis.set(title=name, xlabel="CPU seconds of training", ylabel="k-NN(20), %", xscale="log")
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(RESULTS.with_suffix(".png"), dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "long", "show"])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("../shared/data"))
    parser.add_argument("--data", choices=[*SETS, *PARTS_OF], default="imagenette")
    parser.add_argument("--variants", nargs="+", default=["resnet"])
    parser.add_argument("--like", choices=VARIANTS, default="resnet", help="the variant that these two stand beside")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--tflop", type=float, default=10.0, help="operations of training a run may take")
    parser.add_argument("--size", type=int, help="pixels that features are judged at; default: the global crops'")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "dino-learning")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, help="stop, saved, after so long; the same command goes on")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--changes", default="{}", help="settings of --device cuda, JSON")
    args = parser.parse_args()
    from learning_tried import TRIED

    if unknown := {*args.variants} - {*VARIANTS, *TRIED, PIXELS, LIGHTLY}:
        parser.error(f"unknown variants {sorted(unknown)}: {', '.join([*VARIANTS, *TRIED, PIXELS, LIGHTLY])}")
    if args.what == "show":
        show()
    elif args.what == "long":
        long(args)
    elif args.device == "cuda" or args.changes != "{}":
        cuda(args)
    else:
        run(args)


if __name__ == "__main__":
    main()
