"""Images with the masks or the boxes of their objects, in three layouts, each in a folder or a .tar.

- PASCAL VOC: ``JPEGImages``, ``SegmentationObject``, ``SegmentationClass``, ``Annotations/*.xml``, ``ImageSets``.
- Plain: ``images`` and ``masks``; a mask lies under the name of its image (``images/a/1.jpg``, ``masks/a/1.png``).
- DAVIS: every frame that has a mask.
"""

import functools
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from dino.data.annotated import Files, below_root, list_files, read_lines, read_mask, stem
from dino.data.davis import Video, open_davis
from dino.data.decode import BrokenImage, decode
from dino.data.files import EXTENSIONS, Found, read

_MOST_OBJECTS = 200  # A plain mask with more values has soft edges.


class Annotated(NamedTuple):
    """An image, and what reads its annotation: labels (h, w) from ``open_masks``, boxes (n, 4) from ``open_boxes``."""

    name: str
    image: Found
    annotation: Callable[[], Tensor]

    def pixels(self) -> UInt8[Tensor, "3 h w"]:
        """The image at its full size.

        Raises:
            ValueError: it cannot be read; names it.
        """
        try:
            return decode(read(self.image))
        except (BrokenImage, OSError) as error:
            raise ValueError(f"{self.image.name} cannot be read: {error}") from None

    def labelled(self) -> tuple[UInt8[Tensor, "3 h w"], Int64[Tensor, "h w"]]:
        """The image and its labels.

        Raises:
            ValueError: one cannot be read, or their sizes differ; names it.
        """
        pixels, labels = self.pixels(), self.annotation()
        if labels.shape != pixels.shape[1:]:
            sizes = f"{tuple(pixels.shape[1:])} pixels has a mask of {tuple(labels.shape)}"
            raise ValueError(f"{self.image.name} of {sizes}: sizes must agree")
        return pixels, labels


def open_masks(data: str | Files, split: str = "val", kind: Literal["object", "class"] = "object") -> list[Annotated]:
    """The images of DATA that have a mask: 0 is the background, -1 void, every other value an object.

    Of PASCAL VOC, ``split`` names a list in ``ImageSets/Segmentation`` (without the list: all images), ``kind`` the
    masks: each object its own, or all of a class as one (of DAVIS, whose objects have no class, all of a frame); 255 is
    void. In a plain mask no value is void.

    Raises:
        ValueError: DATA has none of the layouts, or an image of the list has no mask; says what is needed.
    """
    data = list_files(data)
    voc, plain = below_root(data, "JPEGImages"), below_root(data, "masks")
    folder = f"Segmentation{kind.capitalize()}"
    if any(key.startswith(f"{folder}/") for key in voc):
        masks = {name: functools.partial(_voc_labels, found) for name, found in _by_name(voc, folder, ".png").items()}
        found = _voc(voc, masks, f"ImageSets/Segmentation/{split}.txt")
    elif voc:
        found = [
            Annotated(f"{video.name}/{stem(frame.key)}", frame, functools.partial(_davis_labels, video, i, kind))
            for video in open_davis(data)
            for i, frame in enumerate(video.frames)
            if video.masks[i]
        ]
    else:
        masks = {name: functools.partial(_plain_labels, found) for name, found in _by_name(plain, "masks").items()}
        images = _by_name(plain, "images")
        found = [Annotated(name, images[name], masks[name]) for name in images if name in masks]
    if not found:
        raise ValueError(
            f"{data} has no images with masks: it needs images/ and masks/ with the same names, JPEGImages/ and "
            f"{folder}/ (PASCAL VOC), or JPEGImages/480p/ and Annotations/480p/ (DAVIS)"
        )
    return found


def open_boxes(data: str | Files, split: str = "trainval") -> list[Annotated]:
    """The images of DATA with boxes: those of PASCAL VOC's XML files, else those around the objects of the masks.

    ``split`` names a list in ``ImageSets/Main``, or for masks in ``ImageSets/Segmentation``. Without it: all images.

    Raises:
        ValueError: as ``open_masks``.
    """
    data = list_files(data)
    voc = below_root(data, "JPEGImages")
    boxes = {name: functools.partial(_voc_boxes, found) for name, found in _by_name(voc, "Annotations", ".xml").items()}
    if boxes:
        return _voc(voc, boxes, f"ImageSets/Main/{split}.txt")
    return [item._replace(annotation=functools.partial(_boxes_of, item)) for item in open_masks(data, split)]


def objects(labels: Int64[Tensor, "h w"]) -> list[int]:
    """The values that stand for objects.

    >>> objects(torch.tensor([[0, 0, 7], [-1, 2, 2]]))
    [2, 7]
    """
    return [value for value in labels.unique().tolist() if value > 0]


def boxes_around(labels: Int64[Tensor, "h w"]) -> Int64[Tensor, "n 4"]:
    """The smallest box around each object: top, left, bottom, right in pixels, the last two just outside.

    >>> boxes_around(torch.tensor([[0, 0, 7], [0, 2, 2]])).tolist()
    [[1, 1, 2, 3], [0, 2, 1, 3]]
    """
    boxes = []
    for value in objects(labels):
        y, x = (labels == value).nonzero(as_tuple=True)
        boxes.append([int(y.min()), int(x.min()), int(y.max()) + 1, int(x.max()) + 1])
    return torch.tensor(boxes, dtype=torch.int64).reshape(-1, 4)


def _by_name(files: dict[str, Found], folder: str, extension: str | None = None) -> dict[str, Found]:
    """The files below a folder with this extension (any image's), by their path in it without extension."""
    wanted = (extension,) if extension else tuple(EXTENSIONS)
    inside = {key.removeprefix(f"{folder}/"): found for key, found in files.items() if key.startswith(f"{folder}/")}
    return {os.path.splitext(key)[0]: found for key, found in inside.items() if key.lower().endswith(wanted)}


def _voc(files: dict[str, Found], annotations: dict[str, Callable[[], Tensor]], listed: str) -> list[Annotated]:
    images = _by_name(files, "JPEGImages")
    # Lists of a class (cat_val.txt) have a second column: 1, 0 (difficult), or -1 (not there).
    lines = [line.split() for line in read_lines(files[listed])] if listed in files else [[key] for key in annotations]
    names = [line[0] for line in lines if line[-1] != "-1"]
    if missing := [name for name in names if name not in images or name not in annotations]:
        raise ValueError(f"{listed}: {len(missing)} of {len(names)} have no image or no annotation, first {missing[0]}")
    return [Annotated(name, images[name], annotations[name]) for name in names]


def _voc_labels(found: Found) -> Tensor:
    labels = read_mask(found)
    return labels.masked_fill(labels == 255, -1)


def _davis_labels(video: Video, i: int, kind: str) -> Tensor:
    labels = video.labels(i)
    return labels.clamp_max(1) if kind == "class" else labels


def _plain_labels(found: Found) -> Tensor:
    labels = read_mask(found)
    if (count := len(labels.unique())) > _MOST_OBJECTS:
        raise ValueError(
            f"{found.name} has {count} different values, each an object: save masks without soft edges, as PNG"
        )
    return labels


def _boxes_of(item: Annotated) -> Tensor:
    return boxes_around(item.annotation())


def _voc_boxes(found: Found) -> Tensor:
    """All objects, difficult and truncated ones too. In the files pixels are counted from 1, the last one included."""
    try:
        root = ElementTree.fromstring(read(found))
        boxes = [
            [round(float(box.findtext(name, ""))) for name in ("ymin", "xmin", "ymax", "xmax")]
            for box in root.iterfind("object/bndbox")
        ]
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{found.name} is not an annotation of PASCAL VOC: {error}") from None
    return torch.tensor(boxes, dtype=torch.int64).reshape(-1, 4) - torch.tensor([1, 1, 0, 0])
