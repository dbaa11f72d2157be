"""Bytes of an image file -> one uint8 tensor, and several of those -> one canvas."""

import io
from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

try:  # Twice as fast as Pillow, same pixels; torchvision 0.29 announced its removal, and Pillow then does all.
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None

# Slides, scans and satellite tiles are large: refuse only what would take more than 6 GB.
Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, 2**30)


class BrokenImage(Exception):
    """A file that cannot be read as an image; the message is the reason, in one line."""


class Canvas(NamedTuple):
    """A batch of images of different sizes in one tensor: each lies top-left, the rest is padding of any value.

    ``sizes`` holds the true height and width in pixels.
    """

    pixels: UInt8[Tensor, "b c h w"]
    sizes: Int[Tensor, "b 2"]

    def to(self, device: torch.device | str) -> "Canvas":
        """The pixels on a device, without waiting where the memory is pinned. The sizes stay on the host, which
        plans by them."""
        return Canvas(self.pixels.to(device, non_blocking=True), self.sizes)


def decode(data: bytes, max_side: int | None = None) -> UInt8[Tensor, "3 h w"]:
    """Decodes an image file to RGB, upright (EXIF), shrunk so that its longest side is at most ``max_side`` pixels.

    Alpha is dropped (as ``convert("RGB")`` and torchvision's ImageFolder do), an animation gives its first frame.
    16-bit grey is divided by 257; 32-bit and float pixels, which have no range of their own, are stretched from
    their minimum to their maximum.

    Raises:
        BrokenImage: the bytes are no image, or not a whole one.
    """
    if not data:
        raise BrokenImage("the file is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            fits = max_side is None or max(image.size) <= max_side
            if decode_jpeg and fits and image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):
                encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                return cast(Tensor, decode_jpeg(encoded, ImageReadMode.RGB, apply_exif_orientation=True))
            return from_pillow(image, max_side)
    except Exception as error:  # Pillow's readers raise nearly every type on damaged files.
        raise BrokenImage(_reason(error)) from None


def from_pillow(image: Image.Image, max_side: int | None = None) -> UInt8[Tensor, "3 h w"]:
    """What ``decode`` does, for an image that Pillow has opened; changes ``image``."""
    if max_side is not None:
        # JPEG is decoded at a fraction of its size where that still leaves twice the pixels that are kept.
        width, height = (max(1, 2 * max_side * side // max(image.size)) for side in image.size)
        image.draft(None, (width, height))
    ImageOps.exif_transpose(image, in_place=True)
    image = _to_rgb(image)
    if max_side is not None:
        image.thumbnail((max_side, max_side), Image.Resampling.BICUBIC, reducing_gap=2.0)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def image_size(data: bytes, max_side: int | None = None) -> tuple[int, int]:
    """Height and width that ``decode`` will give (to a pixel), from the header alone.

    Raises:
        BrokenImage: the header is no image's.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if image.format != "PNG" and image.getexif().get(0x0112, 1) >= 5:  # Orientations 5 to 8 lie on their side.
                width, height = height, width
    except Exception as error:
        raise BrokenImage(_reason(error)) from None
    scale = min(1.0, (max_side or max(height, width)) / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def to_canvas(images: Sequence[UInt8[Tensor, "c _ _"]], height: int, width: int) -> Canvas:
    """Lays images (c, h, w) into one zeroed canvas of ``height`` x ``width`` pixels, each top-left.

    >>> canvas = to_canvas([torch.ones(3, 2, 4, dtype=torch.uint8)], 4, 4)
    >>> canvas.pixels.shape, canvas.sizes.tolist()
    (torch.Size([1, 3, 4, 4]), [[2, 4]])
    """
    pixels = torch.zeros(len(images), 3, height, width, dtype=torch.uint8)
    for row, image in zip(pixels, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return Canvas(pixels, torch.tensor([image.shape[1:] for image in images]).reshape(-1, 2))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")  # Straight to RGB, Pillow warns.
    if not image.mode.startswith(("I", "F")):
        return image.convert("RGB")
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
    if image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):  # Older Pillows open 16-bit PNG as mode I.
        low, high = 0.0, 65535.0
    else:
        low, high = values.min(), values.max()
    grey = np.round((values - low) * (255 / max(high - low, 1e-12))).clip(0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a format that Pillow reads"
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
