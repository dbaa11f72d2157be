"""Videos as images: every n-th frame, found by its time and decoded when it is asked for."""

import functools
import io
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from dino.data.files import Found, read
from dino.data.readers import EightBits
from dino.machine.files import printable

_LOCK = threading.Lock()  # An open video has a position, which threads must not share.


@dataclass(frozen=True)
class Film(EightBits):
    """Frames of one video; ``times`` are theirs, in the video's own unit."""

    found: Found
    times: np.ndarray

    def name(self, i: int) -> str:
        return f"{self.found.name}/{i}"

    def image(self, i: int) -> Image.Image:
        with _LOCK:
            return _player(self.found).frame(int(self.times[i]))


class _Player:
    """An open video: goes on where it is, or back to the key frame before."""

    def __init__(self, found: Found) -> None:
        self.container = _open(found)
        self.stream = self.container.streams.video[0]
        self.frames: Any = None
        self.at = -1

    def frame(self, time: int) -> Image.Image:
        if self.frames is None or time <= self.at:
            self.container.seek(time, stream=self.stream)
            self.frames = self.container.decode(self.stream)
        for frame in self.frames:
            self.at = frame.pts
            if frame.pts >= time:
                pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                return Image.fromarray(np.ascontiguousarray(pixels))
        self.frames = None
        raise OSError("the video ends before this frame")


@functools.lru_cache(maxsize=8)
def _player(found: Found) -> _Player:
    return _Player(found)


def open_film(found: Found, every: int) -> Film:
    """A video by the times of every ``every``-th of its frames, which are read without decoding.

    Raises:
        ValueError: PyAV is not there, or it is no video that can be read.
    """
    try:
        with _open(found) as container:
            times = sorted(
                {packet.pts for packet in container.demux(container.streams.video[0]) if packet.pts is not None}
            )
    except (OSError, IndexError, ValueError) as error:  # PyAV's errors are both.
        if "PyAV" in str(error):
            raise
        reason = "it has no pictures in it" if isinstance(error, IndexError) else getattr(error, "strerror", error)
        raise ValueError(f"{found.name} cannot be read as a video: {printable(str(reason))}") from None
    return Film(found, np.array(times[::every], np.int64))


def has_pyav() -> bool:
    try:
        import av  # noqa: F401
    except ImportError:
        return False
    return True


def _open(found: Found) -> Any:
    if not has_pyav():
        raise ValueError("videos need PyAV: pip install 'dino-ssl[video]'")
    import av

    return av.open(found.path) if found.offset < 0 else av.open(io.BytesIO(read(found)))
