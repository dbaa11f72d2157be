"""Self-attention over time: a video in, videos of its attention out, as a stream (figures 1 and 3, in motion).

One colour scale for the whole video, or it would flicker. So the frames are gone through twice: first for the
attention, of which the maps go to a temporary file (some kB a frame) and only two numbers a map stay in memory; then,
with the scale known, for the pictures. The network sees every frame once. Nothing is smoothed over time: what moves in
the video moves in the attention.
"""

import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from dino.encoder.attention import mass_masks
from dino.encoder.encoder import Encoder
from dino.machine.progress import tracked
from dino.pictures.inputs import fit, patch_at
from dino.pictures.sheet import (
    Tile,
    colorize,
    enlarged,
    mark_patch,
    overlay_heat,
    overlay_mask,
    resize,
    sheet,
    to_pil,
)
from dino.pictures.video import writing

Scale = tuple[float, float]
# Widest video in pixels, by the extension; GIFs are for pages and mails.
WIDEST = {".mp4": 1920, ".gif": 800, "": 1920}
SMALL = 100  # Frames with no longer side in pixels are enlarged.


def color_scales(lows: Float[Tensor, "frames maps"], highs: Float[Tensor, "frames maps"]) -> list[Scale]:
    """One colour scale for each map of a video, from the smallest and largest value in each frame.

    From the lows' 5th to the highs' 95th percentile: a few odd frames do not darken all others.

    >>> color_scales(torch.tensor([[0.25], [0.25]]), torch.tensor([[0.5], [0.5]]))
    [(0.25, 0.5)]
    """
    return list(zip(lows.quantile(0.05, dim=0).tolist(), highs.quantile(0.95, dim=0).tolist(), strict=True))


def attention_video(
    encoder: Encoder,
    read: Callable[[], Iterable[UInt8[Tensor, "3 _ _"]]],
    out: Path,
    *,
    fps: float | int,
    suffix: str = ".mp4",
    size: int | None = None,
    query: tuple[int, int] | None = None,
    share: float = 0.6,
) -> int:
    """Writes OUT_attention (frame, mean over heads, overlay, mask) and OUT_heads (every head), and counts the frames.

    ``read`` gives the frames; it is called twice. ``query``: a pixel (x, y) of the frames, whose patch takes the place
    of the [CLS] token. Memory is that of the encoder's ``batch_size`` frames, however long the video.

    Raises:
        ValueError: no frames, frames of different sizes, a backbone without attention, a query outside the frames, or
            a share that is not between 0 and 1.
    """
    patch = encoder.patch_size
    token: tuple[int, int] | None = None
    lows, highs = [], []
    shape = torch.Size()  # Of the maps of one frame: the mean, then the heads.
    with tempfile.TemporaryFile() as store:
        frames = iter(tracked(_same_size(read(), patch, size), "attention"))
        while batch := list(itertools.islice(frames, encoder.batch_size)):
            if query is not None:
                token = patch_at(query, batch[0][0], patch, size)
            maps = encoder.attention(torch.stack([one for _, one in batch]), token)
            maps = torch.cat([maps.mean(1, keepdim=True), maps], dim=1).cpu()
            shape = maps.shape[1:]
            lows.append(maps.amin((-2, -1)))
            highs.append(maps.amax((-2, -1)))
            store.write(maps.numpy().tobytes())
        if not lows:
            raise ValueError(f"{out.name}: the video has no frames")
        scales = color_scales(torch.cat(lows), torch.cat(highs))

        store.seek(0)
        count = sum(map(len, lows))
        paths = [out.with_name(f"{out.name}_{name}{suffix}") for name in ("attention", "heads")]
        with writing(paths[0], fps) as write_overview, writing(paths[1], fps) as write_heads:
            again = zip(_same_size(read(), patch, size), _stored(store, shape), strict=True)
            for (_, frame), maps in tracked(again, "pictures", total=count):
                image = enlarged(frame / 255, SMALL)
                write_overview(overview(image, maps[0], scales[0], share=share, query=token, widest=WIDEST[suffix]))
                write_heads(heads(maps[1:], scales[1:], (image.shape[1], image.shape[2]), widest=WIDEST[suffix]))
    return count


def overview(
    image: Float[Tensor, "3 height width"],
    mean: Float[Tensor, "h w"],
    scale: Scale,
    *,
    share: float,
    query: tuple[int, int] | None = None,
    widest: int = 1920,
) -> Image.Image:
    """One frame with its mean attention as a map, over the frame, and as a mask; depends on nothing else."""
    size = (image.shape[-2], image.shape[-1])
    mask = resize(mass_masks(mean, share).float(), size) > 0.5
    shown = image if query is None else mark_patch(image, query, size[0] // mean.shape[0])
    tiles = [
        Tile(to_pil(shown), "frame"),
        Tile(to_pil(resize(colorize(mean, scale=scale), size)), "attention, mean of heads"),
        Tile(to_pil(overlay_heat(image, mean, scale)), "over the frame"),
        Tile(to_pil(overlay_mask(image, mask)), f"{share:.0%} of the attention"),
    ]
    return _page([tiles[:2], tiles[2:]] if size[1] >= size[0] else [tiles], max(size), widest)


def heads(
    maps: Float[Tensor, "heads h w"], scales: list[Scale], size: tuple[int, int], widest: int = 1920
) -> Image.Image:
    """Every head's attention to one frame, each with its own scale."""
    tiles = [
        Tile(to_pil(resize(colorize(one, scale=scale), size)), f"head {i}")
        for i, (one, scale) in enumerate(zip(maps, scales, strict=True))
    ]
    columns = min(len(tiles), 3 if len(tiles) < 12 else 4)
    return _page([tiles[i : i + columns] for i in range(0, len(tiles), columns)], max(size), widest)


def _page(rows: list[list[Tile]], longest: int, widest: int) -> Image.Image:
    columns = len(rows[0])
    return sheet(rows, tile=min(longest, int(widest / (columns + (columns + 3) / 16))))  # With the gaps of a sheet.


def _same_size(
    frames: Iterable[UInt8[Tensor, "3 _ _"]], patch: int, size: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each frame as it is, and fitted to whole patches."""
    shape = None
    for i, frame in enumerate(frames):
        shape = shape or frame.shape
        if frame.shape != shape:
            raise ValueError(
                f"frame {i} has {frame.shape[1]} x {frame.shape[2]} pixels, the first {shape[1]} x {shape[2]}: "
                "all frames of a video must have one size"
            )
        yield frame, fit(frame, patch, size)


def _stored(store: IO[bytes], shape: torch.Size) -> Iterator[Float[Tensor, "maps h w"]]:
    while data := store.read(4 * shape.numel()):
        yield torch.from_numpy(np.frombuffer(data, np.float32).copy()).view(shape)
