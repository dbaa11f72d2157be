"""Videos as streams of frames: one frame in memory at a time, whatever their length.

mp4 and the like through PyAV (optional), animated GIFs through Pillow, folders of numbered PNGs. Stands below the other
files of this folder, like ``pictures``.
"""

import contextlib
import os
import struct
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from jaxtyping import UInt8
from PIL import GifImagePlugin, Image, ImageSequence
from torch import Tensor

from dino.data.decode import from_pillow
from dino.data.files import VIDEOS
from dino.pictures.sheet import COLORMAP

_ANIMATED = frozenset({".gif", ".webp"})
_BT709 = 1  # How H.264 calls the colours of HD television.
Write = Callable[[Image.Image], None]


def is_video(path: str | Path) -> bool:
    """Whether a file is a video by its extension, or a GIF or WebP of several frames."""
    suffix = Path(path).suffix.lower()
    if suffix in _ANIMATED:
        with contextlib.suppress(OSError), Image.open(path) as image:
            return getattr(image, "n_frames", 1) > 1
    return suffix in VIDEOS and not os.path.isdir(path)


def frame_rate(path: str | Path) -> float:
    """Frames a second: the average of a video, the first frame's of an animation; 25 and 10 where the file is silent.

    Raises:
        ValueError: it is no video that can be read.
    """
    if Path(path).suffix.lower() in _ANIMATED:
        with Image.open(path) as image:
            return 1000 / (image.info.get("duration") or 100)
    with _reading(path) as stream:
        return float(stream.average_rate or 25)


def read_frames(path: str | Path) -> Iterator[UInt8[Tensor, "3 h w"]]:
    """The frames of a video or an animation, upright, in order.

    Raises:
        ValueError: it is no video that can be read, or a frame is damaged.
    """
    if Path(path).suffix.lower() in _ANIMATED:
        with Image.open(path) as image:
            for frame in ImageSequence.Iterator(image):
                yield from_pillow(frame.copy())
        return
    with _reading(path) as stream:
        for frame in stream.container.decode(stream):
            pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
            yield torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


@contextlib.contextmanager
def writing(path: Path, fps: float | int) -> Iterator[Write]:
    """Gives a function that adds a frame to the video at ``path``: .mp4, .gif, or (no extension) a folder of PNGs.

    All frames have the size of the first; mp4 adds a white row or column where that is odd. A video that could not be
    finished is removed.

    Raises:
        ValueError: an mp4 without PyAV, or a file of another kind.
    """
    kinds = {".mp4": _mp4, ".gif": _gif, "": _pngs}
    if path.suffix not in kinds:
        raise ValueError(f"{path}: videos are written as .mp4, .gif, or a folder of PNGs")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with kinds[path.suffix](path, fps) as write:
            yield write
    except BaseException:
        if path.is_file():
            path.unlink()
        raise


@contextlib.contextmanager
def _mp4(path: Path, fps: float | int) -> Iterator[Write]:
    av = _pyav()
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "18"})
        # Without these a player guesses, by the number of lines, and shows other colours than were written.
        stream.pix_fmt, stream.codec_context.colorspace = "yuv420p", _BT709
        stream.codec_context.color_primaries = stream.codec_context.color_trc = _BT709

        def write(image: Image.Image) -> None:
            even = (image.width + image.width % 2, image.height + image.height % 2)
            page = image.convert("RGB") if image.size == even else Image.new("RGB", even, "white")
            if image.size != even:
                page.paste(image)
            if not stream.codec_context.is_open:
                stream.width, stream.height = even
            frame = av.VideoFrame.from_image(page).reformat(format="yuv420p", dst_colorspace="ITU709")
            container.mux(stream.encode(frame))

        yield write
        container.mux(stream.encode(None))


@contextlib.contextmanager
def _gif(path: Path, fps: float | int) -> Iterator[Write]:
    """Frame by frame: Pillow's own writer of animations first collects all frames.

    Every frame has its own 256 colours, of which 64 are always white and those of the colour map: maps do not flicker.
    """
    table = matplotlib.colormaps[COLORMAP](np.linspace(0, 1, 63))[:, :3]
    fixed = b"\xff\xff\xff" + (table * 255).round().astype(np.uint8).tobytes()
    count = 0
    with open(path, "wb") as file:

        def write(image: Image.Image) -> None:
            nonlocal count
            if not count:  # Header, then "repeat for ever".
                file.write(b"GIF89a" + struct.pack("<HHBBB", *image.size, 0x70, 0, 0))
                file.write(b"\x21\xff\x0bNETSCAPE2.0\x03\x01\0\0\0")
            # Hundredths of a second; rounding the times instead of the delays keeps the whole as long as it is.
            delay = max(2, round(100 * (count + 1) / fps) - round(100 * count / fps))
            image = image.convert("RGB")
            free = bytes(image.quantize(192).getpalette() or ())
            palette = Image.new("P", (1, 1))
            palette.putpalette((fixed + free).ljust(768, b"\0"))
            indexed = image.quantize(palette=palette, dither=Image.Dither.NONE)
            for block in GifImagePlugin.getdata(indexed, duration=10 * delay, include_color_table=True):
                file.write(block)
            count += 1

        yield write
        file.write(b";")


@contextlib.contextmanager
def _pngs(path: Path, fps: float | int) -> Iterator[Write]:  # noqa: ARG001 - a folder has no time
    path.mkdir(exist_ok=True)
    count = 0

    def write(image: Image.Image) -> None:
        nonlocal count
        image.save(path / f"{count:05d}.png")
        count += 1

    yield write


@contextlib.contextmanager
def _reading(path: str | Path) -> Iterator[Any]:
    """The first picture stream of a file."""
    av = _pyav()
    if not os.path.exists(path):
        raise ValueError(f"{path} does not exist")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} has no pictures in it")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield stream
    except av.error.FFmpegError as error:
        raise ValueError(f"{path} cannot be read as a video: {error.strerror}") from None


def _pyav() -> Any:
    try:
        import av
        import av.error
    except ImportError:
        raise ValueError("videos need PyAV: pip install 'dino-ssl[video]' (animated GIFs go without)") from None
    return av
