"""Checkpoints of a run: written whole or not at all, read without executing anything, the last k kept."""

import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

_NAME = re.compile(r"step_(\d+)\.pt$")


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Writes ``step_{step}.pt`` and keeps the newest ``keep`` up to it; later ones, which could not be read, go too.

    The file appears under its name only when it is complete and on the disk: a run that dies here leaves those before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:08d}.pt"
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    found = checkpoints(folder)
    place = found.index(path) + 1
    for other in [*found[: max(place - keep, 0)], *found[place:]]:
        other.unlink()
    return path


def write_text(path: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    return sorted((p for p in folder.glob("step_*.pt") if _NAME.search(p.name)), key=step_of)


def step_of(path: Path) -> int:
    """The number of steps done in a checkpoint, from its name.

    >>> step_of(Path("checkpoints/step_00001200.pt"))
    1200
    """
    match = _NAME.search(path.name)
    if match is None:
        raise ValueError(f"{path} is not a checkpoint of a run: its name is not step_NUMBER.pt")
    return int(match[1])


def load_latest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, on the CPU; None when there is none.

    An unreadable one (a full disk, a copy cut short) is passed over for the one before.

    Raises:
        ValueError: there are checkpoints, but none can be read.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            reason = f"{path.name} cannot be read ({type(error).__name__}); trying the one before"
            print(f"warning: {reason}", file=sys.stderr)
    if found:
        raise ValueError(
            f"none of the {len(found)} checkpoints in {folder} can be read; remove them or use another --out"
        )
    return None
