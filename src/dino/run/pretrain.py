"""A pretraining run: begin; for each step, once in a while evaluate, save and stop; the step; keep watch; finish."""

import contextlib
import functools
import itertools
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dino.config import Config, Preprocessing, replace
from dino.data.fit import fit_to_images
from dino.data.loader import WorkersLost
from dino.data.sources import Source, open_source, train_and_val
from dino.encoder.encoder import open_encoder
from dino.evaluation import knn
from dino.machine import device as hardware
from dino.machine import distributed
from dino.machine.files import printable, write_text
from dino.method.learner import Augment, in_one_piece, is_finite
from dino.method.loss import DINOLoss
from dino.method.step import Outputs, train_step
from dino.models.card import CardFacts, write_card
from dino.models.weights import name_of, save_backbone
from dino.recipes import RECIPES, Facts
from dino.run.adapt import Beginning, shown_name
from dino.run.begin import Run, begin, cannot_shard
from dino.run.blame import blame
from dino.run.checkpoint import checkpoints
from dino.run.folder import own
from dino.run.interruption import Stopped, interruption
from dino.run.monitor import measure
from dino.run.report import read_metrics, write_report
from dino.run.resume import same_training, state_of

KEPT = "kept.safetensors"  # The best backbone that the guard has seen so far, until the run ends.
SKIPPED_LIMIT = 5  # Steps in a row without a finite loss after which a run stops.
_log = logging.getLogger(__name__)
Data = Source | str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def pretrain(
    data: Data,
    out: str | os.PathLike[str],
    recipe: str | Config = "auto",
    *,
    backbone: nn.Module | None = None,
    loss: DINOLoss | None = None,
    augment: Augment | None = None,
    val: Source | None = None,
    quiet: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Trains a student and its teacher on images without labels; the same call on the same folder resumes.

    Args:
        data: what ``open_source`` takes: its train part is learnt from, and its val part (or a share of the labelled
            images that is held out) judged by k-NN. A ``Source`` is learnt from as it is, by its parts if it has some.
        out: the run folder: ``config.json``, ``metrics.jsonl``, ``checkpoints/``, ``backbone.safetensors`` (the
            teacher's), ``model_card.md``, ``report.html``.
        recipe: the name of a recipe (``auto`` fits the data and the machine), or a whole configuration.
        backbone: the caller's own: gives ``Tokens`` and has ``embed_dim``. The teacher's is a copy of it.
        loss: the caller's own, a ``DINOLoss`` or one derived from it.
        augment: the caller's own, called as ``MultiCrop`` is: ``(canvas, generator, *, rank, world_size) -> Crops``.
        val: images for the k-NN evaluation, in place of those of ``data``; used when both have labels.
        settings: those that differ from the recipe's, written ``optim__batch_size=64``.

    Returns:
        What ``--json`` prints: steps, final loss, seconds, skipped steps, broken files and the k-NN results.

    Raises:
        Stopped: a signal (Ctrl-C, a notebook's stop button, a scheduler) asked the run to stop; it is saved, and the
            same call goes on from there.
        ValueError: settings, data or an existing run folder that do not fit; the message says what to change.
        FloatingPointError: the loss stayed non-finite for 5 steps in a row.
    """
    train, val, config, beginning = _what_is_wanted(data, recipe, val, backbone, settings)
    config, train, val = fit_to_images(config, train, val)
    device = hardware.choose_device(config.run.device)
    with (
        hardware.prepared(device, config.run.threads),
        interruption() as asked,
        distributed.process_group(device) as device,
        own(Path(out)),
        contextlib.ExitStack() as resources,
    ):
        if complete := distributed.gather(_complete_without_checkpoints(Path(out), config))[0]:
            return complete
        own_parts = {"backbone": backbone, "beginning": beginning, "loss": loss, "augment": augment}
        start = functools.partial(begin, **own_parts, quiet=quiet)
        run = asked.breaks_off(lambda: start(train, val, Path(out), config, device, asked, resources))
        if run is None:
            raise Stopped("stopped before the first step; the same command starts again", 0)
        return _train(run)


def _train(run: Run) -> dict[str, Any]:
    began = time.perf_counter()
    if distributed.is_main():
        write_text(run.out / "config.json", run.config.to_json())
    parts = run.parts()
    for step in range(run.start, run.total_steps):
        once_in_a_while(run, step)
        if run.guard and run.guard.ends:
            return finish(run, step, time.perf_counter() - began)
        now = run.schedules.at(step)
        freeze = step < run.schedules.freeze_steps
        of_step = itertools.islice(parts, run.learner.part_count)
        with says_what_helps(run, step):
            outputs = train_step(
                run.learner, of_step, run.learner.part_count, now, run.config.optim, run.autocast, freeze
            )
        keep_watch(run, step + 1, outputs)
    once_in_a_while(run, run.total_steps)
    return finish(run, run.total_steps, time.perf_counter() - began)


def once_in_a_while(run: Run, step: int) -> None:
    """After ``step`` steps: a checkpoint when one is due, the end when the run was asked to stop, k-NN when it is due.

    Raises:
        Stopped: the run was asked to stop, and is saved.
    """
    stop, due = distributed.any_process(run.asked.asked, distributed.is_main() and run.saver.due(step))
    every = run.schedules.steps(run.config.run.knn_every, "run.knn-every")
    evaluates = (run.val is not None or run.guard is not None) and run.evaluated != step
    is_due = step == run.total_steps or (every > 0 and step % every == 0) or (run.guard is not None and step == 0)
    evaluates = evaluates and is_due
    # Before an evaluation too: it can then be left at any moment, and is made again by the run that goes on.
    if step > run.start and (stop or due or evaluates or step == run.total_steps):
        save(run, step)
    if evaluates and not stop:
        run.asked.breaks_off(lambda: evaluate(run, step))
        run.clock.restart(step)
    if stop or run.asked.asked:
        if not run.saver.wait():
            raise OSError("stopped, but the last checkpoint could not be written: the same command repeats some steps")
        raise Stopped(f"stopped after step {step} of {run.total_steps}; the same command goes on from there", step)


def save(run: Run, step: int) -> None:
    """A checkpoint, by the first process and in the background.

    Raises:
        FloatingPointError: what would be saved is not finite.
    """
    # Parameters that are not finite never recover: they must not replace the good ones of earlier checkpoints.
    if not is_finite(run.learner):
        raise FloatingPointError(_blame(run, step))
    share_broken(run)
    state = state_of(run.learner, run.config, step, run.images, run.circumstances, run.loader.broken)
    if distributed.is_main():
        run.book.to_disk()
        run.saver.save(step, state)


def evaluate(run: Run, step: int) -> None:
    """Weighted k-NN of the teacher's class token on the val part, and the anchor: a line in the logbook."""
    backbone, shown, results = run.learner.teacher.backbone, Preprocessing.of(run.config), dict[str, float]()
    encoder = open_encoder(backbone, shown, device=run.device, progress=False)

    def score() -> dict[str, float]:
        return {} if run.val is None else knn.run(encoder, run.train, run.val)

    if run.val is not None:
        results |= score()
        best = "  ".join(f"{name} {value:.1f} %" for name, value in results.items() if name.endswith("top1"))
        run.book.say(f"k-NN of the teacher on {len(run.val)} held-out images: {best}")
    if run.guard is not None:
        results |= run.guard.measure(encoder, score)
    run.book.write(step, results)
    run.evaluated = step
    if run.guard is not None:
        run.guard.note({"step": step, **results})
        run.book.say(f"step {step}: {run.guard.verdict}")
        if run.guard.kept["step"] == step and distributed.is_main():
            with run.guard.holding(backbone):
                save_backbone(backbone, run.out / KEPT, run.config.model, shown)


def keep_watch(run: Run, done: int, outputs: Outputs) -> None:
    """Looks at a step that is done, every now and then, since that waits for the device: is it finite, does it learn?

    Raises:
        FloatingPointError: the loss was not finite for ``SKIPPED_LIMIT`` steps in a row.
    """
    last = done == run.total_steps
    if (last or done % SKIPPED_LIMIT == 0) and run.learner.skipped[0] >= SKIPPED_LIMIT:
        raise FloatingPointError(_blame(run, done))
    if not last and done % run.config.run.log_every:
        return
    now = run.schedules.at(done - 1)
    values = {name: value.item() for name, value in measure(*outputs[:4], now.teacher_temp).items()}
    values |= {name: value.item() for name, value in outputs.terms.items()}
    values |= now._asdict()
    values |= run.clock.lap(done, run.config.optim.batch_size)
    values["skipped"] = run.learner.skipped[1].item()
    run.book.write(done, values)
    run.book.progress(done, values)
    if warning := run.watch(done, values):
        run.book.warn(warning)
    share_broken(run)


def share_broken(run: Run) -> None:
    """Files that any process found broken count together, and are listed."""
    for broken in distributed.gather(run.loader.broken):
        run.loader.note(broken)
    if distributed.is_main() and len(run.loader.broken) > run.listed:
        lines = "".join(f"{printable(name)}\t{reason}\n" for name, reason in sorted(run.loader.broken.items()))
        with contextlib.suppress(OSError):  # A full disk ends no run.
            write_text(run.out / "broken.txt", lines)
            run.listed = len(run.loader.broken)


@contextlib.contextmanager
def says_what_helps(run: Run, step: int) -> Iterator[None]:
    """Around a step: what the machine lacks becomes a message with the way out.

    Raises:
        ValueError: memory ran out, or the processes that read images were lost (a run of one process is saved first).
    """
    try:
        yield
    except WorkersLost as error:
        if distributed.world_size() > 1:  # The others wait in this step, and end with this message.
            raise ValueError(f"{error}. The same command goes on from the last checkpoint") from error
        save(run, step)  # The step had not begun to change anything.
        run.saver.wait()
        raise ValueError(f"{error}. Saved after step {step}: the same command goes on from there") from error
    except torch.OutOfMemoryError as error:
        raise ValueError(_out_of_memory(run)) from error


def _out_of_memory(run: Run) -> str:
    crops, optim = run.config.crops, run.config.optim
    parts = run.learner.part_count
    rows = optim.batch_size // distributed.world_size() // parts
    may_shard = distributed.world_size() > 1 and not (run.config.run.shard or cannot_shard(run.config))
    shard = "--run.shard, " if may_shard else ""
    in_one = in_one_piece(run.learner.network, run.config.method)
    accumulate = "" if in_one else f"--run.accumulate {2 * parts}, "
    held = sum(p.numel() * p.element_size() for p in run.learner.network.parameters()) / 2**30
    return (
        f"{run.device} is out of memory with {rows} images at a time in {crops.global_count} crops of "
        f"{crops.global_size} px and {crops.local_count} of {crops.local_size} px, {held:.2f} GiB of parameters "
        f"(and twice that for the optimizer) and --data.cache {run.loader.cache}. For the same result in less memory: "
        f"{accumulate}{shard}--run.recompute, --data.cache ram; for another: a smaller "
        "--optim.batch-size, --crops.local-count or --model.out-dim"
    )


def finish(run: Run, done: int, seconds: float) -> dict[str, Any]:
    """The files that a run ends with after ``done`` steps; those of a finished run are made again only if one is
    missing."""
    run.saver.wait()
    results = _results(run.out)
    if distributed.is_main() and not (run.start == done and _is_complete(run.out, done)):
        if run.loader.broken:
            listed = run.out / "broken.txt"
            run.book.say(f"{len(run.loader.broken)} files could not be read; they are listed in {listed}")
        if run.guard and done < run.total_steps:
            run.book.warn(
                f"stopped after step {done} of {run.total_steps}, for the anchor keeps falling. Less is lost with "
                "images of the old kind beside the new ones: dino adapt WEIGHTS NEW OLD"
            )
        losses = read_metrics(run.out / "metrics.jsonl").get("loss", [(0.0, math.nan)])
        results = {
            "steps": done,
            "loss": losses[-1][1] if math.isfinite(losses[-1][1]) else None,
            "seconds": round(seconds, 1) if run.start < done else results.get("seconds", 0.0),
            "skipped": int(run.learner.skipped[1].item()),
            "broken": len(run.loader.broken),
            **(run.guard.results if run.guard else run.book.evaluation(done)),
        }
        backbone, shown, path = (
            run.learner.teacher.backbone,
            Preprocessing.of(run.config),
            run.out / "backbone.safetensors",
        )
        if run.guard is None:
            save_backbone(backbone, path, run.config.model, shown)
        elif (run.out / KEPT).exists():
            os.replace(run.out / KEPT, path)
        init = run.config.adapt.init
        facts = CardFacts.of(
            backbone, shown, run.config, results, began_from=shown_name(init) if init else None, **_counts(run.train)
        )
        write_card(run.out / "model_card.md", facts)
        write_text(run.out / "results.json", json.dumps(results, indent=2))
        write_report(run.out)
    return distributed.gather(results)[0]


def _is_complete(out: Path, steps: int) -> bool:
    files = ("backbone.safetensors", "model_card.md", "report.html")
    return _results(out).get("steps") == steps and all((out / name).is_file() for name in files)


def _complete_without_checkpoints(out: Path, config: Config) -> dict[str, Any]:
    """The results of a finished run of which no checkpoint found room on the disk, or was kept; else nothing."""
    results = _results(out)
    if checkpoints(out / "checkpoints") or not _is_complete(out, results.get("steps", -1)):
        return {}
    with contextlib.suppress(OSError, ValueError):
        if same_training(Config.from_json((out / "config.json").read_text()), config):
            _log.warning("already complete: %d steps; without checkpoints it cannot be extended", results["steps"])
            return results
    return {}


def _results(out: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, json.JSONDecodeError):
        return json.loads((out / "results.json").read_text())
    return {}


def _blame(run: Run, done: int) -> str:
    """Which tensor stopped being finite, found by working again through the batch of the last step."""
    canvas = next(run.loader.batches(done - 1, done)).canvas
    run.saver.wait()
    return blame(run.learner, run.augment, canvas, run.config, done - 1, run.autocast, run.out)


def _counts(train: Source) -> dict[str, int | None]:
    """What a model card says of images."""
    counts = {"images": len(train), "classes": None if train.labels is None else len(train.classes)}
    with contextlib.suppress(ValueError):  # Files that are gone by now: the run is done all the same.
        counts["side"] = train.median_side()
    return counts


def _what_is_wanted(
    data: Data, recipe: str | Config, val: Source | None, backbone: nn.Module | None, settings: dict[str, Any]
) -> tuple[Source, Source | None, Config, Beginning | None]:
    """What to train on, what to judge by, the configuration, and the weights to begin from."""
    given = replace(recipe if isinstance(recipe, Config) else Config(), **settings)
    source = data if isinstance(data, Source) else open_source(data, read=given.data)

    def split(config: Config) -> tuple[Source, Source | None]:
        if source.parts or not isinstance(data, Source):
            return train_and_val(source, config.data.val_fraction, config.run.seed)
        return source, None

    init = given.adapt.init
    beginning = Beginning.of(init) if init else None
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise ValueError(f"recipe {recipe!r} is unknown: {', '.join(RECIPES)}")
        accelerator = hardware.choose_device(given.run.device).type != "cpu"
        batch_size = given.optim.batch_size if "optim__batch_size" in settings else None
        train, _ = split(given)
        facts = Facts(len(train), train.median_side(), accelerator, batch_size)
        recipe = RECIPES[recipe](facts if beginning is None else facts._replace(**beginning.facts))
    config = replace(recipe, **settings)
    train, held_out = split(config)  # A recipe may hold out another share than the default.
    if backbone is not None and init:
        raise ValueError("a backbone of the caller's own is what it is: give it, or --init, not both")
    if backbone is not None:
        config = replace(config, model__backbone=name_of(backbone))
    elif beginning is not None:
        config = beginning.taken_over(config)
    return train, val or held_out, config, beginning
