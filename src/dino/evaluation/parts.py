"""What an evaluation learns from, chooses by, and is judged by: from the parts that DATA has."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dino.data.sources import Source, open_source

Data = str | Path | Sequence[str | Path] | Source


def opened(data: Data) -> Source:
    """The source itself, or what ``open_source`` makes of DATA."""
    return data if isinstance(data, Source) else open_source(data)


def train_and_test(data: Data, test: Data | None = None) -> tuple[Source, Source | None]:
    """What to learn from, and what to be judged by: ``test``, else the train and val parts of DATA, else None."""
    source = opened(data)
    if test is not None:
        return source.parts.get("train", source), opened(test)
    if {"train", "val"} <= set(source.parts):
        return source.part("train"), source.part("val")
    return source, None


class Parts(NamedTuple):
    """For a classifier that is trained; ``judged_by`` says where ``test`` came from."""

    train: Source
    val: Source | None
    test: Source
    judged_by: str


def train_val_test(data: Data, test: Data | None, seed: int) -> Parts:
    """What a classifier learns from, what it may be chosen by, and what it is judged by.

    With ``test``, the parts of DATA are for learning and choosing. Without, val is the test part, or where there are
    no parts a tenth of every class, drawn by seed.
    """
    source = opened(data)
    train = source.parts.get("train", source)
    if test is not None:
        judge = opened(test)
        return Parts(train, source.parts.get("val"), judge, f"--test {judge.origin}")
    if "val" in source.parts and "train" in source.parts:
        return Parts(train, None, source.part("val"), "the val part of DATA")
    train, held_out = source.split(0.1, seed)
    return Parts(train, None, held_out, f"a tenth of every class, held out by seed {seed}")
