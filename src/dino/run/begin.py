"""What a run is made of, and how it begins: everything is made, and the newest checkpoint put into it."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino.augment.multicrop import Crops, MultiCrop
from dino.config import Config, parse_minutes
from dino.data.loader import Loader
from dino.data.sources import Source
from dino.machine import device as hardware
from dino.machine import distributed
from dino.method.learner import Augment, Learner, in_one_piece, make_learner, make_parts
from dino.method.loss import DINOLoss
from dino.method.network import Network, compile_blocks, recompute_blocks
from dino.method.schedules import Schedules
from dino.run.adapt import Beginning, Guard, guard_of
from dino.run.checkpoint import Saver
from dino.run.interruption import Interruption
from dino.run.logbook import Logbook, Stopwatch
from dino.run.monitor import CollapseWatch
from dino.run.resume import Images, circumstances, resume

Part = tuple[Crops, list[Tensor | None] | None]


@dataclass
class Run:
    """A run under way."""

    config: Config
    out: Path
    train: Source
    val: Source | None  # With labels that ``train`` knows.
    device: torch.device
    autocast: AbstractContextManager
    loader: Loader
    augment: Augment
    schedules: Schedules
    learner: Learner
    start: int  # Steps that were done when it began.
    images: Images
    circumstances: dict[str, Any]
    book: Logbook
    clock: Stopwatch
    saver: Saver
    watch: CollapseWatch
    asked: Interruption
    evaluated: int  # The newest step whose k-NN results are in the logbook; -1: none.
    guard: Guard | None = None  # Of what the backbone could before.
    listed: int = 0  # Broken files in ``broken.txt``.

    @property
    def total_steps(self) -> int:
        return self.schedules.total_steps

    def parts(self) -> Iterator[Part]:
        """The parts of all batches to come, each made on the device while it still works on the one before."""

        def made() -> Iterator[Part]:
            batches = self.loader.batches(self.start, self.total_steps)
            for step in range(self.start, self.total_steps):
                with self.clock.waiting():
                    canvas = next(batches).canvas
                yield from make_parts(self.learner, self.augment, canvas, self.config, step)

        return hardware.overlapped(made(), self.device)


def begin(
    train: Source,
    val: Source | None,
    out: Path,
    config: Config,
    device: torch.device,
    asked: Interruption,
    resources: ExitStack,
    *,
    backbone: nn.Module | None = None,
    beginning: Beginning | None = None,
    loss: DINOLoss | None = None,
    augment: Augment | None = None,
    quiet: bool = False,
) -> Run:
    """Makes all that a run needs and resumes it; ``resources`` close what was opened.

    Raises:
        ValueError: settings, images or a checkpoint that do not fit; nothing has been written then.
    """
    world_size, main = distributed.world_size(), distributed.is_main()
    adapt = config.adapt
    if beginning is None and (adapt.pull or adapt.anchor):
        flag = f"--pull {adapt.pull:g}" if adapt.pull else f"--anchor {adapt.anchor}"
        raise ValueError(f"{flag} is not allowed: there are no weights to stay near (--init)")
    if config.optim.batch_size % (world_size * config.run.accumulate):
        raise ValueError(
            f"--optim.batch-size {config.optim.batch_size} cannot be shared evenly among {world_size} processes "
            f"with --run.accumulate {config.run.accumulate}"
        )
    if config.run.shard and (why := cannot_shard(config)):
        raise ValueError(f"--run.shard is not allowed with {why}")
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
    if beginning is None:
        learner = make_learner(config, device, backbone, loss)
    else:
        learner = make_learner(config, device, loss=loss, initial=beginning.backbone.state_dict())
        learner.began_from = beginning.digest
    if config.run.recompute:
        recompute_blocks(learner.network)
    compiled = hardware.compiles(device, config.run.compile)
    if compiled:
        for network in (learner.network, learner.teacher):
            compile_blocks(network)
    images, now = Images.of(train), circumstances(config, device)
    resumed = resume(learner, out, config, images, now, loader.steps_per_epoch)
    loader.remember(resumed.broken)

    book = Logbook(out, schedules.total_steps, resumed.step, main=main, quiet=quiet)
    resources.callback(book.close)
    minutes = parse_minutes(config.run.save_every)
    saver = Saver(
        out / "checkpoints",
        minutes=minutes,
        steps=max(schedules.steps(config.run.save_every, "run.save-every"), 1) if minutes is None else 1,
        keep=config.run.keep,
        milestones=schedules.steps(config.run.keep_every, "run.keep-every"),
        warn=book.warn,
    )
    resources.callback(saver.close)
    evaluated = resumed.step if book.evaluation(resumed.step) else -1
    run = Run(
        config=config,
        out=out,
        train=train,
        val=_known(train, val, book),
        device=device,
        autocast=hardware.autocast(device, config.run.precision),
        loader=loader,
        augment=augment or MultiCrop(config.crops),
        schedules=schedules,
        learner=learner,
        start=resumed.step,
        images=images,
        circumstances=now,
        book=book,
        clock=Stopwatch(resumed.step),
        saver=saver,
        watch=CollapseWatch(config.model.out_dim),
        asked=asked,
        evaluated=distributed.gather(evaluated)[0],
    )
    notes = resumed.notes
    if beginning is not None:
        notes = [f"begins from {adapt.init} ({beginning.summary})", *notes]
        if adapt.anchor:
            run.guard = guard_of(config, beginning, out, resumed.step, device)
    _announce(run, notes, compiled)
    return run


def _known(train: Source, val: Source | None, book: Logbook) -> Source | None:
    """The val images that k-NN can judge: those of classes that have train images."""
    if val is None or val.labels is None or train.labels is None:
        return None
    known = torch.isin(val.labels, train.labels)  # Parts of one DATA: they number their classes alike.
    if known.all():
        return val
    book.say(f"note: k-NN leaves out {int((~known).sum())} val images, of classes without train images")
    return val.subset(known.nonzero().flatten()) if known.any() else None


def cannot_shard(config: Config) -> str | None:
    """What keeps parameters from being shared out, and why; None: nothing."""
    if config.adapt.train.startswith("lora"):
        return "--train lora: adapters are too small to be shared out"
    if config.optim.optimizer == "muon":
        return "--optim.optimizer muon, which works on whole matrices: adamw"
    return None


def _announce(run: Run, notes: list[str], compiled: bool) -> None:
    say, start, end = run.book.say, run.start, run.total_steps
    size = run.config.optim.batch_size
    say(f"{run.train.description}; {end} steps of {size} images; {describe(run.learner.network)}; {run.device}")
    canvas = run.config.data.canvas
    with contextlib.suppress(ValueError):  # Of images that cannot be read more is said elsewhere.
        if (side := run.train.median_side()) > canvas:
            notes.append(f"images of {side} px are kept at {canvas} px a side: crops see no more (--data.canvas)")
    if run.learner.part_count < (asked := run.config.run.accumulate):
        what = in_one_piece(run.learner.network, run.config.method)
        notes.append(
            f"{what} works a batch in one piece, for its statistics are those of all of it: "
            f"--run.accumulate {asked} saves no memory; --run.recompute and more processes do"
        )
    for note in [*run.schedules.notes, *notes]:
        say(f"note: {note}")
    if start:
        say(f"resumed after step {start}" if start < end else f"already complete: {start} steps")
    if compiled and start < end:
        say("compiling the network: the first step takes a minute or two")


def describe(network: Network) -> str:
    """One line on a network, for the screen."""
    count = sum(p.numel() for p in network.backbone.parameters()) / 1e6
    head = sum(p.numel() for p in network.head.parameters()) / 1e6
    return f"backbone {count:.1f} M + head {head:.1f} M parameters"
