"""Images with masks of classes, in two parts: to learn from, and to judge by."""

from pathlib import Path

import torch

from dino.data.annotated import list_files
from dino.data.masks import Annotated, open_masks
from dino.data.parts import part_of
from dino.machine.randomness import generator


def open_classes(data: str, val_fraction: float = 0.2, seed: int = 0) -> tuple[list[Annotated], list[Annotated]]:
    """The train and the val images of DATA that have a mask, in one of the layouts of ``open_masks``.

    Parts are the lists train and val of PASCAL VOC; folders named like parts with ``images`` and ``masks`` in them; or
    such folders within ``images`` and ``masks``. Without parts ``val_fraction`` is held out by seed: whole folders
    below ``images`` and whole videos, where there are several, since what lies in one is often alike.

    Raises:
        ValueError: as ``open_masks``, or there are fewer than two images.
    """
    if (within := _part_folders(Path(data))) is not None:
        train, val = (open_masks(str(folder), kind="class") for folder in within)
        return train, val
    listed = list_files(data)
    train, val = (open_masks(listed, split, "class") for split in ("train", "val"))
    if {item.name for item in train} != {item.name for item in val}:
        return train, val
    by_part: dict[str, list[Annotated]] = {}
    for item in train:
        by_part.setdefault(_part(item.name), []).append(item)
    if "train" in by_part and (judges := by_part.get("val", by_part.get("test"))):
        return by_part["train"], judges
    return _held_out(train, val_fraction, seed)


def _part_folders(data: Path) -> tuple[Path, Path] | None:
    children = sorted(path for path in data.iterdir() if (path / "masks").is_dir()) if data.is_dir() else []
    found = {_part(f"{path.name}/"): path for path in children}
    judge = found.get("val", found.get("test"))
    return (found["train"], judge) if "train" in found and judge else None


def _part(name: str) -> str:
    """The part that the first folder of a name stands for, else nothing."""
    first, slash, _ = name.partition("/")
    means = part_of(first) if slash else None
    return means[0] if means and not means[1] else ""


def _held_out(items: list[Annotated], fraction: float, seed: int) -> tuple[list[Annotated], list[Annotated]]:
    folders = [item.name.rpartition("/")[0] for item in items]
    units = folders if len(set(folders)) > 1 else [item.name for item in items]
    names = sorted(set(units))
    if len(names) < 2:
        raise ValueError(f"{items[0].image.name} is the only image with a mask: one to learn from and one to judge by")
    order = torch.randperm(len(names), generator=generator(seed, "masks held out")).tolist()
    count = min(max(1, round(fraction * len(names))), len(names) - 1)
    judges = {names[i] for i in order[:count]}
    pairs = list(zip(items, units, strict=True))
    return [item for item, unit in pairs if unit not in judges], [item for item, unit in pairs if unit in judges]
