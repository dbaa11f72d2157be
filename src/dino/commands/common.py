"""What the commands share: flags that several have, and how they open weights and data. Imports torch only when run."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import tyro

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dino.data.sources import Source

Device = Literal["auto", "cpu", "cuda", "mps"]


@dataclass(frozen=True)
class Command:
    """A command: its fields are its flags, its docstring is its help, ``run`` does it and gives what ``--json`` prints."""

    def run(self) -> dict[str, Any]:
        raise NotImplementedError


@dataclass(frozen=True)
class WithWeights(Command):
    """A command on a frozen backbone."""

    weights: tyro.conf.Positional[str]
    """A run folder, a weights file, a URL, or the name of a released model (dino_vits16, dino_vitb8, ...)."""

    def backbone(self, device: "torch.device") -> "nn.Module":
        from dino.pretrained import load

        return load(self.weights, device)


def train_and_test(data: tuple[str, ...], test: str | None) -> "tuple[Source, Source | None]":
    """What an evaluation learns from, and what it is judged by: ``--test``, else the train and val parts of DATA, else None."""
    from dino.data.sources import open_source

    source = open_source(data)
    if test is not None:
        return source, open_source(test)
    if {"train", "val"} <= set(source.parts):
        return source.part("train"), source.part("val")
    return source, None
