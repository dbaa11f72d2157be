"""What a set's own images say about their pixels: how many channels, and which raw values are black and white."""

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from dino.config import ReadConfig
from dino.data.decode import Pixels
from dino.data.raw import Kind, Raw, estimate_range, fewest_levels
from dino.data.source import Source

_log = logging.getLogger(__name__)
_SAMPLE = 64  # Images that are looked at.
_FEW_LEVELS = 16


def with_own_pixels(source: Source, read: ReadConfig) -> Source:
    """The source read with as many channels as its images have, and one range for all that have more than 8 bits."""
    kinds: list[tuple[int, Kind]] = []
    for i in range(0, len(source), max(1, len(source) // _SAMPLE)):
        with contextlib.suppress(Exception):  # What cannot be read is said when it is to be read.
            kinds.append((i, source.reader.kind(int(source.rows[i]))))
    counts = Counter(kind.channels for _, kind in kinds)
    if read.channels != "auto":
        channels = read.channels
    elif len(counts) > 1:
        some = " and ".join(map(str, sorted(counts)))
        raise ValueError(f"{source.origin}: images of {some} channels lie together: choose one by --data.channels")
    else:
        channels = next(iter(counts), 3)
    low_high = read.pixel_range
    sample = list(_raw_values(source, [i for i, kind in kinds if kind.raw], channels))
    if sample:
        low_high = low_high or estimate_range(sample)
        assert low_high is not None
        shown = f"{low_high[0]:.6g} {low_high[1]:.6g}"
        levels = fewest_levels(sample, low_high)
        few = f"; only {levels} of 256 levels are left in the median image" if levels < _FEW_LEVELS else ""
        how = "given" if read.pixel_range else "estimated from a sample; --data.pixel-range LOW HIGH sets it"
        _log.warning("%s: more than 8 bits: black to white is %s (%s)%s", source.origin, shown, how, few)
    if channels != 3:
        _log.warning("%s: images are read with %d channels", source.origin, channels)

    def changed(each: Source) -> Source:
        return replace(each, pixels=Pixels(channels, low_high), fixed_range=read.pixel_range is not None)

    return replace(changed(source), parts={name: changed(part) for name, part in source.parts.items()})


def _raw_values(source: Source, indices: Sequence[int], channels: int) -> Iterator[Raw]:
    for i in indices:
        with contextlib.suppress(Exception):
            values = source.reader.raw(int(source.rows[i]), channels)
            if values.dtype != np.uint8:
                yield values
