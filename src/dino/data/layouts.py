"""Data sets whose folders have fixed names (DAVIS, PASCAL VOC): their files by path, in a folder or a tar archive."""

import io
import os
import tarfile

import numpy as np
import torch
from jaxtyping import Int64
from PIL import Image
from torch import Tensor

from dino.data.files import Found, read


def list_files(data: str) -> dict[str, Found]:
    """Every file below a folder or in a .tar (read in place) by its path below it, sorted; hidden ones are left out.

    Raises:
        ValueError: DATA is neither, or the archive is damaged.
    """
    if os.path.isdir(data):
        found = _folder(data)
    elif os.path.isfile(data) and data.lower().endswith(".tar"):
        found = _tar(data)
    else:
        raise ValueError(f"{data} is neither a folder nor a .tar" if os.path.exists(data) else f"{data} does not exist")
    hidden = (".", "__MACOSX")
    return {key: found[key] for key in sorted(found) if not any(part.startswith(hidden) for part in key.split("/"))}


def below_root(files: dict[str, Found], folder: str) -> dict[str, Found]:
    """The files beside and in ``folder``, by their path from there, wherever it lies: DATA may be its parent's parent.

    Nothing when there is no such folder.

    Raises:
        ValueError: there are several; names them.

    >>> below_root({"VOCdevkit/VOC2012/JPEGImages/a.jpg": Found("a", "a"), "README": Found("b", "b")}, "JPEGImages")
    {'JPEGImages/a.jpg': Found(key='a', path='a', offset=-1, size=-1, label=None)}
    """
    roots = {"/".join(parts[: parts.index(folder)]) for key in files if folder in (parts := key.split("/")[:-1])}
    if len(roots) > 1:
        raise ValueError(f"several folders hold {folder} ({', '.join(sorted(roots))}): name one of them as DATA")
    around = "".join(f"{root}/" for root in roots if root)
    return {key.removeprefix(around): files[key] for key in files if roots and key.startswith(around)}


def stem(key: str) -> str:
    """``b`` of ``a/b.jpg``."""
    return os.path.splitext(os.path.basename(key))[0]


def read_lines(found: Found) -> list[str]:
    """The lines of a text file that hold something, without the space around them."""
    return [line for line in map(str.strip, read(found).decode("utf-8", errors="replace").splitlines()) if line]


def read_mask(found: Found) -> Int64[Tensor, "h w"]:
    """The number a mask gives to each pixel: index into the palette, grey level, or the colour as one number.

    Raises:
        ValueError: it cannot be read as an image; names it.
    """
    try:
        with Image.open(io.BytesIO(read(found))) as image:
            values = np.asarray(image).astype(np.int64)
    except Exception as error:  # Pillow's readers raise nearly every type on damaged files.
        raise ValueError(f"{found.name} cannot be read as a mask: {error}") from None
    if values.ndim == 3:  # Colours; alpha is dropped.
        values = values[..., :3] @ [65536, 256, 1] if values.shape[-1] >= 3 else values[..., 0]
    return torch.from_numpy(values)


def _folder(root: str) -> dict[str, Found]:
    found, seen = {}, set()
    for folder, inside, names in os.walk(root, followlinks=True):
        # Links are followed once, or one to a folder around it would never end.
        inside[:] = [name for name in inside if not _known(os.path.realpath(os.path.join(folder, name)), seen)]
        for name in names:
            path = os.path.join(folder, name)
            key = os.path.relpath(path, root).replace(os.sep, "/")
            found[key] = Found(key, path)
    return found


def _known(path: str, seen: set[str]) -> bool:
    known = path in seen
    seen.add(path)
    return known


def _tar(path: str) -> dict[str, Found]:
    found = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                archive.members = []  # pyright: ignore # Or tarfile keeps every header.
                key = member.name.removeprefix("./")
                if member.isreg():
                    found[key] = Found(key, path, member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{path} is not a whole .tar archive: {error}") from None
    return found
