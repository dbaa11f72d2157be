"""What learns more for the same compute: named variants of the settings, unlike sets of images, several seeds.

    python benchmarks/learning.py run FOLDER --data imagenette --variants resnet nano --seeds 0 1 2 [--tflop 10]
    python benchmarks/learning.py long FOLDER --tflop 270      # one long run and its curve: results/long.json
    python benchmarks/learning.py show          # the table of results/learning.json, and the plot beside it

FOLDER holds the archives that ``learning_sets.py`` names. Every variant (``learning_variants.py``) trains for the same
number of operations of the networks (counted, forward and backward); CPU seconds of the steps are measured beside it. A
run is ``dino.pretrain`` in a folder of its own under --work: one that was killed goes on from its checkpoint, one that
has its row is not repeated. The variant ``lightly`` needs lightly 1.6.0, which is no dependency of ours.
``--device cuda`` trains the ViT-S/16 of the published anchor (imagenette, 200 epochs), in pieces of --minutes.
"""

import argparse
import json
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import learning_rows
from dino.config import Config, replace
from dino.data.sources import open_source
from dino.machine import device as hardware
from dino.method.learner import make_learner
from dino.method.step import train_step
from dino.models.weights import load
from dino.run import pretrain as running
from dino.run.interruption import Stopped
from learning_lightly import trained_by_lightly
from learning_rows import add_row, measured, show
from learning_sets import PARTS_OF, SETS, Pixels, judged, keep_small
from learning_tried import TRIED, as_it_is
from learning_variants import LIGHTLY, PIXELS, VARIANTS, anchor, planned
from side_by_side import environment


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


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    hardware.prepare(torch.device("cpu"), args.threads)
    data = keep_small(args.data, args.folder, args.work)
    images = len(torch.load(data / "pixels.pt")["train"][1])
    for seed in args.seeds:
        for variant in args.variants:
            tflop = 0.0 if variant == PIXELS else args.tflop
            key = {"data": args.data, "variant": variant, "tflop": tflop, "seed": seed}
            if measured(key):
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
    learning_rows.RESULTS.with_name("long.json").write_text(text + "\n")


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
