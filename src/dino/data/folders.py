"""What the names of folders say: which part an image belongs to, and which class it has."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dino.data.listing import BLANK, BY_FOLDER, PARTS
from dino.data.parts import Part, part_of, parts_of
from dino.machine.files import printable


class Meaning(NamedTuple):
    """For every image the number of its part in PARTS and of its class, BLANK for none; and what should be said."""

    parts: np.ndarray
    labels: np.ndarray
    classes: list[str]
    notes: list[str]


def understand(
    folders: Sequence[str], folder_of: np.ndarray, labels: np.ndarray, names: Sequence[str], parts: np.ndarray
) -> Meaning:
    """Folders below DATA (each "" or with a / at its end), and which of them each image lies in; what lists say goes
    first: ``labels`` into ``names``, ``parts``, or BY_FOLDER.

    A folder around everything is neither part nor class. The first level below is the part, if its names are those of
    parts; the next is the class. Labels that are numbers keep the order of numbers; folders that of the alphabet, as in
    torchvision's ImageFolder.
    """
    below = _below_common([folder.split("/")[:-1] for folder in folders], stop_at_part=True)
    part_names = parts_of(dict.fromkeys(levels[0] for levels in below if levels))
    of_folder = [
        PARTS.index(part_names[levels[0]]) if levels and levels[0] in part_names else BLANK for levels in below
    ]
    if part_names:
        below = _below_common([levels[1:] for levels in below])
    notes = _note_parts(part_names, of_folder, folders) if (parts == BY_FOLDER).any() else []
    parts = np.where(parts == BY_FOLDER, np.array([*of_folder, BLANK], np.int8)[folder_of], parts)

    by_folder = labels == BY_FOLDER
    used = np.unique(folder_of[by_folder]).tolist()
    folder_class = {i: printable(below[i][0]) for i in used if below[i]}
    said = {str(names[i]) for i in np.unique(labels[labels >= 0])}
    classes = sorted(said | {*folder_class.values()})
    if not folder_class and all(name.isdecimal() for name in classes):
        classes.sort(key=lambda name: (int(name), name))
    number = {name: i for i, name in enumerate(classes)}
    by_name = np.array([*(number.get(name, BLANK) for name in names), BLANK], np.int32)
    class_of_folder = np.array(
        [number[folder_class[i]] if i in folder_class else BLANK for i in range(len(folders))] + [BLANK]
    )
    labels = np.where(by_folder, class_of_folder[folder_of], by_name[np.where(labels >= 0, labels, -1)])
    notes += _note_same_folders([below[i] for i in used])
    return Meaning(parts.astype(np.int8), labels.astype(np.int32), classes, notes)


def _below_common(paths: list[list[str]], *, stop_at_part: bool = False) -> list[list[str]]:
    """Without the folders that are around everything, up to one that is named like a part."""
    first, last = min(paths, default=[]), max(paths, default=[])
    depth = 0
    while depth < min(len(first), len(last)) and first[depth] == last[depth]:
        if stop_at_part and part_of(first[depth]):
            break
        depth += 1
    return [levels[depth:] for levels in paths]


def _note_parts(part_names: dict[str, Part], of_folder: list[int], folders: Sequence[str]) -> list[str]:
    if not part_names or ({*part_names} <= {"train", "val", "test"} and BLANK not in of_folder):
        return []
    by_part = sorted(part_names.items(), key=lambda item: PARTS.index(item[1]))
    taken = ", ".join(f"{part} is {printable(name)}" for name, part in by_part)
    outside = {folder.split("/")[0] for folder, part in zip(folders, of_folder, strict=True) if part < 0}
    others = ", ".join(printable(name) or "images in no folder" for name in sorted(outside)[:5])
    return [f"parts by folder: {taken}" + (f"; in no part: {others}" if outside else "")]


def _note_same_folders(below: list[list[str]]) -> list[str]:
    """Class folders that all hold the same folders are perhaps parts, sites or years."""
    inside: dict[str, set[str]] = {}
    for levels in below:
        if levels:
            inside.setdefault(levels[0], set()).update(levels[1:2])
    kinds = {frozenset(names) for names in inside.values()}
    if len(inside) < 2 or len(kinds) != 1 or len(next(iter(kinds))) < 2:
        return []
    outer, inner = (", ".join(map(printable, sorted(names)[:4])) for names in (inside, next(iter(kinds))))
    return [
        f"warning: {outer} are taken as the classes, and each holds the same folders ({inner}): if those are the "
        "classes or parts, name the outer folders train and val, or give a list with a label and a split column"
    ]
