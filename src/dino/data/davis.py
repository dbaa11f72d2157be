"""DAVIS 2016 and 2017: its videos with their masks, its palette, and frames read as DINO's evaluation reads them.

Layout: ``JPEGImages/480p/VIDEO/*.jpg``, ``Annotations/480p/VIDEO/*.png``, ``ImageSets/{2016,2017}/val.txt`` (optional),
in a folder or a .tar. Source: Perazzi et al. 2016; Pont-Tuset et al. 2017 (arXiv 1704.00675).
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor

from dino.data.annotated import Files, below_root, list_files, read_lines, read_mask, stem
from dino.data.decode import BrokenImage, decode
from dino.data.files import Found, read

Year = Literal["auto", "2016", "2017"]
_LISTS = {"2017": ("2017",), "2016": ("2016", "480p")}  # Below ImageSets; DAVIS 2016 had its own name for it.


@dataclass(frozen=True)
class Video:
    """Frames in order, and the masks of those that have one."""

    name: str
    frames: list[Found]
    masks: list[Found | None]
    one_object: bool = False  # All objects of a frame are one (DAVIS 2016).

    def __len__(self) -> int:
        return len(self.frames)

    def frame(self, i: int) -> UInt8[Tensor, "3 h w"]:
        """Frame ``i`` at its full size.

        Raises:
            ValueError: it cannot be read; names it.
        """
        try:
            return decode(read(self.frames[i]))
        except (BrokenImage, OSError) as error:
            raise ValueError(f"{self.frames[i].name} cannot be read: {error}") from None

    def labels(self, i: int) -> Int64[Tensor, "h w"]:
        """The objects of frame ``i``: 0 for the background, 1, 2, ... for the objects, -1 for void (255).

        In files whose only values are 0 and 255, 255 is the object.

        Raises:
            ValueError: the frame has no mask, or it cannot be read; names it.
        """
        found = self.masks[i]
        if found is None:
            raise ValueError(f"{self.frames[i].name} has no mask")
        labels = _indices(found)
        if self._is_binary:
            return (labels > 0).long()
        labels = labels.masked_fill(labels == 255, -1)
        return labels.clamp_max(1) if self.one_object else labels

    @property
    def objects(self) -> int:
        """How many the first frame has, counted by the highest number; 0 without a mask."""
        return max(0, int(self.labels(0).max())) if self.masks[0] else 0

    @functools.cached_property
    def _is_binary(self) -> bool:
        first = next((found for found in self.masks if found), None)
        return first is not None and set(_indices(first).unique().tolist()) == {0, 255}


def _indices(found: Found) -> Tensor:
    """The values of a mask; white stands for 255 in the few that are stored in colour."""
    values = read_mask(found)
    values = values.masked_fill(values == 0xFFFFFF, 255)
    if values.max() > 255:
        raise ValueError(f"{found.name} holds colours: a mask of DAVIS holds the objects' numbers, with a palette")
    return values


def open_davis(data: str | Files, year: Year = "auto", only: Sequence[str] = ()) -> list[Video]:
    """The videos of DATA: those of the year's val list, all where there is no list; ``only`` takes some of them.

    ``"2016"``: all objects of a frame are one; ``"2017"``: each is its own. ``"auto"``: 2017 if DATA has its list, else
    2016 if it has that one, else the objects as the masks have them.

    Raises:
        ValueError: DATA has not this layout, or a video is missing; says what was found.
    """
    data = list_files(data)
    files = below_root(data, "JPEGImages")
    places = [
        match for key in files if (match := re.fullmatch(r"(JPEGImages)/([^/]+)/([^/]+)/[^/]+\.(?i:jpe?g|png)", key))
    ]
    sizes = sorted({match[2] for match in places})
    if not sizes:
        raise ValueError(f"{data} has not the layout of DAVIS: it needs JPEGImages/480p/VIDEO/*.jpg")
    size = "480p" if "480p" in sizes else sizes[0]
    there: dict[str, list[str]] = {}
    for match in places:
        if match[2] == size:
            there.setdefault(match[3], []).append(match[0])

    lists = {key: [f"ImageSets/{name}/val.txt" for name in names] for key, names in _LISTS.items()}
    found_lists = {key: next((name for name in names if name in files), None) for key, names in lists.items()}
    chosen = year if year != "auto" else next((key for key, name in found_lists.items() if name), None)
    listed = found_lists[chosen] if chosen else None
    # DAVIS 2016 lists pairs of paths, "/JPEGImages/480p/VIDEO/00000.jpg /Annotations/...", 2017 names.
    lines = read_lines(files[listed]) if listed else sorted(there)
    names = list(dict.fromkeys(line.split()[0].split("/")[-2] if "/" in line else line for line in lines))
    names = [name for name in names if not only or name in only] + [name for name in only if name not in names]
    if missing := [name for name in names if name not in there]:
        raise ValueError(f"{data} has no video {', '.join(missing)}; it has {', '.join(sorted(there))}")
    return [
        Video(
            name,
            [files[key] for key in there[name]],
            [files.get(f"Annotations/{size}/{name}/{stem(key)}.png") for key in there[name]],
            one_object=chosen == "2016",
        )
        for name in names
    ]


def frame_size(height: int, width: int, short_side: int = 480, patch_size: int = 16) -> tuple[int, int]:
    """Height and width at which a frame is seen: short side as given, long side down to a multiple of 64, as released.

    Both then down to multiples of the patch. A square becomes 480 x 448, an oddity of the released code that we keep.

    >>> frame_size(480, 854), frame_size(1080, 1920, patch_size=14)
    ((480, 832), (476, 826))
    """
    long_side = int(short_side * max(height, width) / min(height, width) // 64 * 64)
    height, width = (long_side, short_side) if height > width else (short_side, long_side)
    return height - height % patch_size, width - width % patch_size


def resize_bilinear(frame: UInt8[Tensor, "c _ _"], height: int, width: int) -> UInt8[Tensor, "c {height} {width}"]:
    """Resizes without antialiasing, in OpenCV's bytes (``INTER_LINEAR``), which the released evaluation reads.

    OpenCV's fixed point: weights in units of 1/2048, four bits dropped between the two directions.
    """
    if frame.shape[1:] == (height, width):
        return frame
    left, right, weight = (tap.to(frame.device) for tap in _taps(frame.shape[2], width))
    pixels = frame.int()
    rows = (pixels[:, :, left] * (2048 - weight) + pixels[:, :, right] * weight) >> 4
    top, bottom, weight = (tap.to(frame.device) for tap in _taps(frame.shape[1], height))
    above, below = rows[:, top] * (2048 - weight)[:, None] >> 16, rows[:, bottom] * weight[:, None] >> 16
    return ((above + below + 2) >> 2).to(torch.uint8)


def _taps(size: int, resized: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of every output pixel: its two input pixels, and the weight of the second."""
    position = ((torch.arange(resized, dtype=torch.float64) + 0.5) * (size / resized) - 0.5).float()
    first = position.floor().long()
    # Beyond an edge both pixels are the edge's own; the weights stay, and their rounding with them.
    return first.clamp(0, size - 1), (first + 1).clamp(0, size - 1), ((position - first) * 2048).round().int()


def resize_labels(labels: UInt8[Tensor, "_ _"], height: int, width: int) -> UInt8[Tensor, "{height} {width}"]:
    """Nearest neighbour, in Pillow's bytes."""
    return torch.from_numpy(np.array(Image.fromarray(labels.numpy()).resize((width, height), Image.Resampling.NEAREST)))


def palette() -> list[int]:
    """The colours of DAVIS and PASCAL VOC, 256 times red, green, blue: object 1 is dark red, 2 dark green.

    The bits of an object's number are dealt to the three colours in turn, each from its highest bit on.

    >>> palette()[:9]
    [0, 0, 0, 128, 0, 0, 0, 128, 0]
    """
    bits = np.arange(256)[:, None] >> np.arange(8) & 1  # (object, bit)
    dealt = np.pad(bits, ((0, 0), (0, 1))).reshape(256, 3, 3)  # (object, turn, colour)
    return (dealt << np.array([7, 6, 5])[:, None]).sum(1).ravel().tolist()


def write_mask(path: Path, labels: UInt8[Tensor, "h w"]) -> None:
    """Writes a mask as a PNG whose pixels are the objects' numbers, with DAVIS's palette."""
    image = Image.fromarray(labels.numpy())
    image.putpalette(palette())
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
