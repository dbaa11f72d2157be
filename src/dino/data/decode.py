"""Bytes of an image file -> one uint8 tensor, and several of those -> one canvas."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from dino.data.raw import Range, Unreadable, is_raw, open_image, raw_size, read_raw, to_levels, with_channels


def _jpeg_decoder() -> Callable[[Tensor], Any] | None:
    """Twice as fast as Pillow, same pixels. torchvision 0.29 announced that its decoders go to torchcodec."""
    try:
        from torchcodec.decoders import decode_jpeg  # pyright: ignore

        return decode_jpeg
    except (ImportError, OSError, RuntimeError):  # Not for this platform, or for another torch.
        pass
    try:
        from torchvision.io import ImageReadMode, decode_jpeg

        return lambda encoded: decode_jpeg(encoded, ImageReadMode.RGB, apply_exif_orientation=True)
    except ImportError:
        return None


decode_jpeg = _jpeg_decoder()


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


class Pixels(NamedTuple):
    """How many channels images are read with, and the raw values that become 0 and 255 where they have more than 8
    bits (None: the whole range of 16-bit values, the image's own of others)."""

    channels: int = 3
    low_high: Range | None = None


RGB = Pixels()


def decode(data: bytes, max_side: int | None = None, pixels: Pixels = RGB) -> UInt8[Tensor, "c h w"]:
    """Decodes an image file to 8 bits, upright (EXIF), shrunk so that its longest side is at most ``max_side`` pixels.

    Alpha is dropped (as ``convert("RGB")`` and torchvision's ImageFolder do), an animation gives its first frame.

    Raises:
        BrokenImage: the bytes are no image, not a whole one, or one of other channels.
    """
    if not data:
        raise BrokenImage("the file is empty")
    try:
        try:
            image = open_image(data)
        except UnidentifiedImageError:
            image = None  # Perhaps a TIFF that Pillow does not know.
        if image is None or is_raw(image) or pixels.channels not in (1, 3):
            if image is not None:
                image.close()
            return _from_raw(data, max_side, pixels)
        with image:
            fits = max_side is None or max(image.size) <= max_side
            if (
                decode_jpeg
                and fits
                and pixels.channels == 3
                and image.format in ("JPEG", "MPO")
                and image.mode in ("L", "RGB")
            ):
                return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            return from_pillow(image, max_side, pixels.channels)
    except Exception as error:  # Pillow's readers raise nearly every type on damaged files.
        raise BrokenImage(reason(error)) from None


def _from_raw(data: bytes, max_side: int | None, pixels: Pixels) -> Tensor:
    levels = with_channels(to_levels(read_raw(data, pixels.channels), pixels.low_high), pixels.channels)
    levels = np.ascontiguousarray(levels)
    if max_side is not None and max(levels.shape[:2]) > max_side:
        planes = [Image.fromarray(levels[..., channel]) for channel in range(levels.shape[-1])]
        for plane in planes:
            plane.thumbnail((max_side, max_side), Image.Resampling.BICUBIC, reducing_gap=2.0)
        levels = np.stack([np.asarray(plane) for plane in planes], -1)
    return torch.from_numpy(levels).permute(2, 0, 1).contiguous()


def from_pillow(image: Image.Image, max_side: int | None = None, channels: int = 3) -> UInt8[Tensor, "{channels} h w"]:
    """What ``decode`` does, for an 8-bit image that Pillow has opened; changes ``image``."""
    if max_side is not None:
        # JPEG is decoded at a fraction of its size where that still leaves twice the pixels that are kept.
        width, height = (max(1, 2 * max_side * side // max(image.size)) for side in image.size)
        image.draft(None, (width, height))
    ImageOps.exif_transpose(image, in_place=True)
    image = _to_mode(image, "L" if channels == 1 else "RGB")
    if max_side is not None:
        image.thumbnail((max_side, max_side), Image.Resampling.BICUBIC, reducing_gap=2.0)
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous()


def image_size(data: bytes, max_side: int | None = None, pixels: Pixels = RGB) -> tuple[int, int]:
    """Height and width that ``decode`` will give (to a pixel), from the header alone.

    Raises:
        BrokenImage: the header is no image's.
    """
    try:
        try:
            with open_image(data) as image:
                width, height = image.size
                if image.format == "TIFF" and pixels.channels not in (1, 3):
                    height, width = raw_size(data, pixels.channels)
                # Orientations 5 to 8 lie on their side.
                elif image.format != "PNG" and image.getexif().get(0x0112, 1) >= 5:
                    width, height = height, width
        except UnidentifiedImageError:
            height, width = raw_size(data, pixels.channels)
    except Exception as error:
        raise BrokenImage(reason(error)) from None
    scale = min(1.0, (max_side or max(height, width)) / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def to_canvas(images: Sequence[UInt8[Tensor, "c _ _"]], height: int, width: int) -> Canvas:
    """Lays images (c, h, w) into one zeroed canvas of ``height`` x ``width`` pixels, each top-left; all have the same
    channels, and none at all three.

    >>> canvas = to_canvas([torch.ones(3, 2, 4, dtype=torch.uint8)], 4, 4)
    >>> canvas.pixels.shape, canvas.sizes.tolist()
    (torch.Size([1, 3, 4, 4]), [[2, 4]])
    """
    channels = images[0].shape[0] if images else 3
    pixels = torch.zeros(len(images), channels, height, width, dtype=torch.uint8)
    for row, image in zip(pixels, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return Canvas(pixels, torch.tensor([image.shape[1:] for image in images]).reshape(-1, 2))


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert(mode)  # Straight to RGB, Pillow warns.
    return image.convert(mode)


def reason(error: Exception) -> str:
    """Why an image cannot be read, in one line."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a format that is read"
    if isinstance(error, Image.DecompressionBombError):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return f"it has more than {limit:,} pixels (twice PIL.Image.MAX_IMAGE_PIXELS): cut it into tiles"
    if isinstance(error, Unreadable):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
