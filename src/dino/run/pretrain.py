"""A pretraining run: begin; step by step evaluate, save, log and keep watch; finish."""

import contextlib
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino.augment.multicrop import Crops, MultiCrop
from dino.config import Config, Preprocessing
from dino.data.loader import Loader
from dino.data.sources import Source
from dino.evaluation import knn
from dino.machine import device as hardware
from dino.machine import distributed
from dino.method.learner import Learner, is_finite, make_learner, make_parts
from dino.method.network import Network, compile_blocks
from dino.method.schedules import Schedules
from dino.method.step import train_step
from dino.models.card import CardFacts, write_card
from dino.models.weights import save_backbone
from dino.run import checkpoint
from dino.run.blame import blame
from dino.run.interruption import interruption
from dino.run.logbook import Logbook
from dino.run.monitor import CollapseWatch, measure
from dino.run.report import read_metrics, write_report
from dino.run.resume import resume, save_learner

SKIPPED_LIMIT = 5  # Steps in a row without a finite loss after which a run stops.


def pretrain(
    train: Source, out: Path, config: Config, *, val: Source | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Trains a student and its teacher on images without labels; the same call on the same folder resumes.

    Args:
        train: the images.
        out: the run folder: ``config.json``, ``metrics.jsonl``, ``checkpoints/``, ``backbone.safetensors`` (the
            teacher's), ``report.html``.
        val: images for the k-NN evaluation; used when both parts have labels.

    Returns:
        What ``--json`` prints: steps, final loss, seconds, skipped steps, broken files and the k-NN results.

    Raises:
        ValueError: settings, data or an existing run folder that do not fit; the message says what to change.
        FloatingPointError: the loss stayed non-finite for 5 steps in a row.
    """
    device = hardware.choose_device(config.run.device)
    hardware.prepare(device, config.run.threads)
    with distributed.process_group(device) as device:
        return _run(train, val, out, config, device, quiet)


def _run(
    train: Source, val: Source | None, out: Path, config: Config, device: torch.device, quiet: bool
) -> dict[str, Any]:
    world_size, main = distributed.world_size(), distributed.is_main()
    if config.optim.batch_size % (world_size * config.run.accumulate):
        raise ValueError(
            f"--optim.batch-size {config.optim.batch_size} cannot be shared evenly among {world_size} processes "
            f"with --run.accumulate {config.run.accumulate}"
        )
    loader = Loader(
        train,
        config.optim.batch_size,
        data=config.data,
        seed=config.run.seed,
        device=device,
        rank=distributed.rank(),
        world_size=world_size,
    )
    schedules = Schedules(config, loader.steps_per_epoch)
    total_steps = schedules.total_steps
    learner = make_learner(config, device)
    multicrop = MultiCrop(config.crops)
    autocast = hardware.autocast(device, config.run.precision)
    compiled = hardware.compiles(device, config.run.compile)
    if compiled:
        for network in (learner.network, learner.teacher):
            compile_blocks(network)

    start = resume(learner, out, config, len(train))
    finished = start == total_steps and (out / "results.json").exists()
    if main:
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text(out / "config.json", config.to_json())
    book = Logbook(out, total_steps, start, main=main, quiet=quiet)
    watch = CollapseWatch(config.model.out_dim)
    save_every = max(schedules.steps(config.run.save_every, "run.save-every"), 1)
    knn_every = schedules.steps(config.run.knn_every, "run.knn-every")
    book.say(
        f"{train.description}; {total_steps} steps of {config.optim.batch_size} images; "
        f"{describe(learner.network)}; {device}"
    )
    if val is not None and val.labels is not None and train.labels is not None:
        known = torch.isin(val.labels, train.labels)  # Parts of one DATA: they number their classes alike.
        if not known.all():
            book.say(f"note: k-NN leaves out {int((~known).sum())} val images, of classes without train images")
            val = val.subset(known.nonzero().flatten()) if known.any() else None
    for note in schedules.notes:
        book.say(f"note: {note}")
    if start:
        book.say(f"resumed after step {start}" if start < total_steps else f"already complete: {start} steps")

    broken = 0
    with contextlib.closing(book), interruption() as interrupted:
        if knn_every and start == 0:  # What the untrained network gives: the curve's first point.
            _evaluate(learner, train, val, config, device, book, 0)
        if compiled and start < total_steps:
            book.say("compiling the network: the first step takes a minute or two")
        began = tick = time.perf_counter()
        waited, last = 0.0, start

        def all_parts() -> Iterator[tuple[Crops, list[Tensor | None] | None]]:
            nonlocal waited
            batches = loader.batches(start, total_steps)
            for step in range(start, total_steps):
                fetch = time.perf_counter()
                canvas = next(batches).canvas
                waited += time.perf_counter() - fetch
                yield from make_parts(learner, multicrop, canvas, config, step)

        parts = hardware.overlapped(all_parts(), device)
        for step in range(start, total_steps):
            now = schedules.at(step)
            of_step = itertools.islice(parts, config.run.accumulate)
            freeze = step < schedules.freeze_steps
            outputs = train_step(learner, of_step, config.run.accumulate, now, config.optim, autocast, freeze)

            done = step + 1
            look = done % SKIPPED_LIMIT == 0 or done == total_steps  # What reads from the device, not every step.
            stop = (look or world_size == 1) and distributed.any_process(interrupted.is_set(), device)
            save = done % save_every == 0 or done == total_steps or stop
            # Parameters that are not finite never recover: they must not replace the good ones of earlier checkpoints.
            if (look and learner.skipped[0] >= SKIPPED_LIMIT) or (save and not is_finite(learner)):
                canvas = next(loader.batches(step, done)).canvas
                raise FloatingPointError(blame(learner, multicrop, canvas, config, step, autocast, out))
            if done % config.run.log_every == 0 or done == total_steps:
                monitors = measure(*outputs, now.teacher_temp)
                values = {name: value.item() for name, value in monitors.items()}
                seconds = time.perf_counter() - tick
                values |= now._asdict()
                values["images_per_second"] = (done - last) * config.optim.batch_size / seconds
                values["data_wait"] = waited / seconds
                values["skipped"] = learner.skipped[1].item()
                book.write(done, values)
                book.progress(done, values)
                if warning := watch(done, values):
                    book.warn(warning)
                if main and len(loader.broken) > broken:
                    broken = len(loader.broken)
                    _list_broken(out, loader.broken)
                waited, last, tick = 0.0, done, time.perf_counter()

            if save:
                save_learner(learner, out, config, done, len(train))
            if stop and done < total_steps:
                raise KeyboardInterrupt(
                    f"stopped after step {done} of {total_steps}; the same command goes on from there"
                )
            if knn_every and done % knn_every == 0 and done < total_steps:
                _evaluate(learner, train, val, config, device, book, done)
                waited, last, tick = 0.0, done, time.perf_counter()
        # Also when an earlier call died after its last checkpoint.
        results = {} if finished else _evaluate(learner, train, val, config, device, book, total_steps)
        seconds = time.perf_counter() - began

    if main and not finished:
        _list_broken(out, loader.broken)
        if loader.broken:
            book.say(f"{len(loader.broken)} files could not be read; they are listed in {out / 'broken.txt'}")
        save_backbone(learner.teacher.backbone, out / "backbone.safetensors", config.model, Preprocessing.of(config))
        loss = read_metrics(out / "metrics.jsonl")["loss"][-1][1]
        summary = {
            "steps": total_steps,
            "loss": loss if math.isfinite(loss) else None,
            "seconds": round(seconds, 1),
            "skipped": int(learner.skipped[1].item()),
            "broken": len(loader.broken),
            **results,
        }
        facts = CardFacts.of(learner.teacher.backbone, Preprocessing.of(config), config, summary, **_counts(train))
        write_card(out / "model_card.md", facts)
        checkpoint.write_text(out / "results.json", json.dumps(summary, indent=2))
        write_report(out)
    distributed.barrier()
    return json.loads((out / "results.json").read_text())


def describe(network: Network) -> str:
    """One line on a network, for the screen."""
    count = sum(p.numel() for p in network.backbone.parameters()) / 1e6
    head = sum(p.numel() for p in network.head.parameters()) / 1e6
    return f"backbone {count:.1f} M + head {head:.1f} M parameters"


def _evaluate(
    learner: Learner, train: Source, val: Source | None, config: Config, device: torch.device, book: Logbook, done: int
) -> dict[str, float]:
    """Weighted k-NN of the teacher's class token on the val part, by the first process; nothing without labels."""
    if val is None or train.labels is None or val.labels is None:
        return {}
    if not distributed.is_main():
        distributed.barrier()
        return {}
    size = config.crops.global_size
    results = knn.run(
        learner.teacher.backbone,
        train,
        val,
        resize=round(size * 256 / 224),
        crop=size,
        mean=config.crops.mean,
        std=config.crops.std,
        device=device,
        progress=False,
    )
    shown = "  ".join(f"{name} {value:.1f} %" for name, value in results.items() if name.endswith("top1"))
    book.say(f"k-NN of the teacher on {len(val)} held-out images: {shown}")
    book.write(done, results)
    distributed.barrier()
    return results


def _counts(train: Source) -> dict[str, int | None]:
    """What a model card says of images."""
    counts = {"images": len(train), "classes": None if train.labels is None else len(train.classes)}
    with contextlib.suppress(ValueError):  # Files that are gone by now: the run is done all the same.
        counts["side"] = train.median_side()
    return counts


def _list_broken(out: Path, broken: dict[str, str]) -> None:
    if broken:
        (out / "broken.txt").write_text("".join(f"{name}\t{reason}\n" for name, reason in sorted(broken.items())))
