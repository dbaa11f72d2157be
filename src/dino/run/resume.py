"""A learner into a checkpoint and back, and what must be the same when a run goes on."""

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

import torch

from dino.config import Config, replace, to_steps
from dino.data.decode import BrokenImage
from dino.data.sources import Source
from dino.machine import distributed, sharding
from dino.machine.device import choose_precision
from dino.method.learner import Learner
from dino.run import checkpoint

_SAMPLE = 512  # Images whose size is looked at.
# What changes no more than the speed or what is written, apart from all of ``run`` but the seed.
# The weights that a run began from may lie elsewhere: they are compared themselves.
_ONLY_SPEED = {"data.cache", "data.workers", "adapt.init"}


@dataclasses.dataclass(frozen=True)
class Images:
    """What a run remembers of its images: how many, and a digest of all names and of an even sample of sizes."""

    count: int
    digest: str

    @classmethod
    def of(cls, source: Source) -> "Images":
        """Reads no pixels. Folders around all images do not count: a set may be moved."""
        names = [source.name(i) for i in range(len(source))]
        around = len(os.path.commonprefix([min(names), max(names)]).rpartition("/")[0])  # noqa: RUF071 (cut at a slash)
        digest = hashlib.blake2b(digest_size=8)
        for name in names:
            digest.update(name[around:].encode("utf-8", "surrogateescape") + b"\n")
        for i in range(0, len(names), max(1, len(names) // _SAMPLE)):
            try:
                digest.update(f"{i} {source.size(i)}\n".encode())
            except BrokenImage:
                digest.update(f"{i} broken\n".encode())
        return cls(len(names), digest.hexdigest())


def circumstances(config: Config, device: torch.device) -> dict[str, Any]:
    """What changes the rounding of a run, and no more."""
    return {
        "device": device.type,
        "precision": choose_precision(device, config.run.precision),
        "processes": distributed.world_size(),
        "torch": torch.__version__,
    }


def state_of(
    learner: Learner, config: Config, done: int, images: Images, now: dict[str, Any], broken: dict[str, str]
) -> checkpoint.State:
    """All that a run needs to go on; its tensors are the learner's own. All processes ask for it together."""
    return {
        "config": config.to_json(),
        "step": done,
        "images": images.count,
        "names": images.digest,
        "circumstances": now,
        "broken": broken,
        "student": sharding.state_of(learner.network),
        "teacher": learner.teacher.state_dict(),
        "dino_loss": learner.dino_loss.state_dict(),
        "optimizer": sharding.optimizer_state_of(learner.optimizer, learner.network),
        "skipped": learner.skipped,
        "began_from": learner.began_from,
    }


@dataclasses.dataclass
class Resumed:
    """Where a run goes on: ``step`` steps are done. ``notes`` are for the screen."""

    step: int = 0
    broken: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)


def resume(
    learner: Learner, out: Path, config: Config, images: Images, now: dict[str, Any], steps_per_epoch: int
) -> Resumed:
    """Puts the newest whole checkpoint of the run folder into the learner.

    Raises:
        ValueError: the run was started on other images, or with other settings (of those that change the result), or
            another process finds other images or another checkpoint.
    """
    state = checkpoint.load_latest(out / "checkpoints")
    step = 0 if state is None else state["step"]
    found = distributed.gather((images, step))
    if (other := next((i for i, each in enumerate(found) if each[0] != images), None)) is not None:
        raise ValueError(
            f"process {distributed.rank()} finds {images.count} images, process {other} {found[other][0].count} or of "
            "other names or sizes: all nodes need the same DATA"
        )
    if len({each[1] for each in found}) > 1:
        steps = ", ".join(str(each[1]) for each in found)
        raise ValueError(f"the processes find checkpoints of steps {steps} in --out {out}: all need the same folder")
    if state is None:
        if (out / "backbone.safetensors").exists():
            raise ValueError(f"--out {out} holds a finished model but no checkpoints: use another folder")
        return Resumed()
    # Images first: other images give an `auto` run other settings, which nobody gave.
    if (state["images"], state.get("names", images.digest)) != (images.count, images.digest):
        found = (
            f"{state['images']} images, DATA has {images.count}"
            if state["images"] != images.count
            else f"{images.count} images, DATA has as many of other names or sizes"
        )
        raise ValueError(f"--out {out} holds a run on {found}: give the images it was started on, or another --out")
    if state.get("began_from", "") != learner.began_from:
        raise ValueError(
            f"--out {out} holds a run that began from other weights: give those it was started with (--init), or "
            "another --out"
        )
    before = Config.from_json(state["config"])
    notes = _settings_may(before, config, step, steps_per_epoch, out)
    if differing := [f"{k} {v} -> {now[k]}" for k, v in state.get("circumstances", now).items() if v != now[k]]:
        notes.append(f"goes on with {', '.join(differing)}: the same training, rounded in another way")
    sharding.load_state(learner.network, state["student"])
    learner.teacher.load_state_dict(state["teacher"])
    learner.dino_loss.load_state_dict(state["dino_loss"])
    sharding.load_optimizer_state(learner.optimizer, learner.network, state["optimizer"])
    learner.skipped.copy_(state["skipped"])
    return Resumed(step, state.get("broken", {}), notes)


def _settings_may(before: Config, now: Config, step: int, steps_per_epoch: int, out: Path) -> list[str]:
    """Notes on settings that changed and may.

    Raises:
        ValueError: one changed that would make it another run.
    """
    notes = []
    lengths = [to_steps(c.optim.length, steps_per_epoch, c.optim.batch_size, "optim.length") for c in (before, now)]
    if lengths[1] > lengths[0] == step:
        notes.append(
            f"extends the finished run of {lengths[0]} steps to {lengths[1]}: the schedules are those of a run of "
            f"{lengths[1]} steps, from step {step} on"
        )
        before = replace(before, optim__length=now.optim.length)
    old, new = before.flat(), now.flat()
    changed = [name for name in new if new[name] != old[name]]
    free = [name for name in changed if _is_free(name)]
    if refused := [name for name in changed if name not in free]:
        raise ValueError(
            f"--out {out} holds a run with other settings ({_diff(refused, old, new)}): "
            "give the settings it was started with, or another --out"
        )
    if free:
        notes.append(f"settings changed: {_diff(free, old, new)}")
    return notes


def _is_free(name: str) -> bool:
    return name in _ONLY_SPEED or (name.startswith("run.") and name != "run.seed")


def same_training(before: Config, now: Config) -> bool:
    """Whether two configurations train the same, up to rounding."""
    old, new = before.flat(), now.flat()
    return all(old[name] == new[name] or _is_free(name) for name in new)


def _diff(names: list[str], old: dict[str, Any], new: dict[str, Any]) -> str:
    return ", ".join(f"--{name.replace('_', '-')} {old[name]} -> {new[name]}" for name in names)
