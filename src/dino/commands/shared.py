"""What the commands share: flags that several have, and how they open weights and data. Imports torch only when run."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import tyro

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dino.data.sources import Source

Device = Literal["auto", "cpu", "cuda", "mps"]


@dataclass(frozen=True)
class Command:
    """A command: its fields are its flags, its docstring is its help, ``run`` does it and gives what ``--json``
    prints."""

    shows_results: ClassVar[bool] = False
    """Whether ``run`` itself shows them, when not asked for JSON."""

    def run(self) -> dict[str, Any]:
        raise NotImplementedError


@dataclass(frozen=True)
class WithWeights(Command):
    """A command on a frozen backbone."""

    weights: tyro.conf.Positional[str]
    """A run folder, a weights file, a URL, or the name of a released model (dino_vits16, dino_vitb8, ...)."""

    def backbone(self, device: "torch.device") -> "nn.Module":
        from dino.models.weights import load

        return load(self.weights, device)


def train_and_test(data: tuple[str, ...], test: str | None) -> "tuple[Source, Source | None]":
    """What an evaluation learns from, and what it is judged by: ``--test``, else the train and val parts of DATA,
    else None."""
    from dino.data.sources import open_source

    source = open_source(data)
    if test is not None:
        return source, open_source(test)
    if {"train", "val"} <= set(source.parts):
        return source.part("train"), source.part("val")
    return source, None


def train_val_test(data: tuple[str, ...], test: str | None, seed: int) -> "tuple[Source, Source | None, Source, str]":
    """What a classifier learns from, what it may be chosen by, what it is judged by, and where that came from.

    With ``--test``, the parts of DATA are for learning and choosing. Without, val is the test part, or where there are
    no parts a tenth of every class, drawn by seed.
    """
    from dino.data.sources import open_source

    source = open_source(data)
    train = source.parts.get("train", source)
    if test is not None:
        return train, source.parts.get("val"), open_source(test), f"--test {test}"
    if "val" in source.parts and "train" in source.parts:
        return train, None, source.part("val"), "the val part of DATA"
    train, held_out = source.split(0.1, seed)
    return train, None, held_out, f"a tenth of every class, held out by seed {seed}"
