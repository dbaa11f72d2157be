"""Data sets whose folders have fixed names (DAVIS, PASCAL VOC): their files by path, in a folder or a tar archive."""

import os
from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from dino.data.decode import reason
from dino.data.files import Found, read
from dino.data.raw import open_image
from dino.data.walk import walk


class Files(dict[str, Found]):
    """Every file of DATA by its path below it. Its text is DATA."""

    def __init__(self, data: str, found: Iterable[Found]) -> None:
        super().__init__(sorted((item.key, item) for item in found))
        self._data = data

    def __str__(self) -> str:
        return self._data


def list_files(data: str | Files) -> Files:
    """Every file below a folder or in an archive, sorted; hidden ones are left out. What is listed stays as it is.

    Raises:
        ValueError: DATA is neither, or the archive is damaged.
    """
    return data if isinstance(data, Files) else Files(data, walk(data))


def below_root(files: dict[str, Found], folder: str) -> dict[str, Found]:
    """The files beside and in ``folder``, by their path from there, wherever it lies: DATA may be its parent's parent.

    Nothing when there is no such folder.

    Raises:
        ValueError: there are several; names them.

    >>> files = {"VOCdevkit/VOC2012/JPEGImages/a.jpg": Found("", "a", ""), "README": Found("", "b", "")}
    >>> list(below_root(files, "JPEGImages"))
    ['JPEGImages/a.jpg']
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
        with open_image(read(found)) as image:
            values = np.asarray(image).astype(np.int64)
    except Exception as error:  # Pillow's readers raise nearly every type on damaged files.
        raise ValueError(f"{found.name} cannot be read as a mask: {reason(error)}") from None
    if values.ndim == 3:  # Colours; alpha is dropped.
        values = values[..., :3] @ [65536, 256, 1] if values.shape[-1] >= 3 else values[..., 0]
    return torch.from_numpy(values)
