"""Pixels of more than 8 bits, or of other channels than grey and RGB: read as they are, and brought to 8 bits.

Raw values (camera counts, elevations, reflectances) have no black and white of their own. A data set gets one range,
estimated from a sample of its images or given: images keep their differences, and a pixel its meaning.
"""

import io
import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

Raw = np.ndarray  # (h, w, c), of any type; NaN is no data.
Range = tuple[float | int, float | int]
# What EXTENSIONS names, and nothing else: a PostScript file named .jpg would start Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "DIB", "GIF", "PPM", "JPEG2000", "AVIF")
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_MOST_CHANNELS = 16  # Of an array without names for its axes.
_BITS, _PHOTOMETRIC, _ORIENTATION, _SAMPLES, _SAMPLE_FORMAT, _NODATA_TAG = 258, 262, 274, 277, 339, 42113


class Unreadable(ValueError):
    """An image that cannot be read, for a reason that a user can do something about."""


class Kind(NamedTuple):
    """What an image holds, by its header: ``channels`` without alpha; ``raw`` where Pillow would lose some of it."""

    channels: int
    raw: bool


def open_image(data: bytes) -> Image.Image:
    """Opens a file by Pillow, if it is of one of the formats that are read."""
    Image.init()
    return Image.open(io.BytesIO(data), formats=[name for name in _FORMATS if name in Image.OPEN])


def kind_of(data: bytes) -> Kind:
    """Looks at the header alone; raises nearly anything for what is no image."""
    try:
        with open_image(data) as image:
            raw = is_raw(image)
            if image.format != "TIFF" or _is_simple(image):
                return Kind(3, raw)
    except UnidentifiedImageError:
        raw = True
        if data[:4] not in _TIFF:
            raise
    with _tiff(data) as file:
        channels = _layout(file)[1]
    return Kind(3, raw) if channels in (1, 3) else Kind(channels, raw=True)


def is_raw(image: Image.Image) -> bool:
    """Whether an opened image has more than Pillow would give in 8 bits."""
    if image.mode.startswith(("I", "F")):
        return True
    if image.format == "TIFF":
        tags: Any = getattr(image, "tag_v2", {})
        return max(tags.get(_BITS, (8,)), default=8) > 8
    return image.format == "PNG" and any("16" in str(tile[3]) for tile in getattr(image, "tile", ()))


def _is_simple(image: Image.Image) -> bool:
    """Whether Pillow reads all of a TIFF: one page, of grey, or of 8 bits."""
    tags: Any = getattr(image, "tag_v2", {})
    whole = tags.get(_SAMPLES, 1) == 1 if image.mode.startswith(("I", "F")) else not is_raw(image)
    return whole and getattr(image, "n_frames", 1) == 1


def read_raw(data: bytes, channels: int | None = None) -> Raw:
    """The values of an image as they are, without alpha; ``channels`` chooses among the readings of a stack of pages.

    Raises:
        Unreadable: it needs a package that is not there, or is too large.
    """
    try:
        image = open_image(data)
    except UnidentifiedImageError:
        if data[:4] not in _TIFF:
            raise
        return _read_tiff(data, channels)
    with image:
        if image.format == "TIFF":
            grey = image.mode.startswith(("I", "F"))
            if grey and _is_simple(image):
                return _grey_tiff(image)
            try:
                return _read_tiff(data, channels)
            except Unreadable:  # Compressed by what tifffile alone does not read, and Pillow does.
                if channels not in (None, 1, 3):
                    raise
                return _grey_tiff(image) if grey else _eight_bits(image, channels).astype(np.uint16) * 257
        if image.mode.startswith(("I", "F")):
            values = np.asarray(image)
            # Older Pillows open 16-bit PNG as mode I.
            return (values if image.mode == "F" else values.astype(np.uint16))[..., None]
        return _deep_png(data, image) if is_raw(image) else _eight_bits(image, channels)


def _eight_bits(image: Image.Image, channels: int | None) -> Raw:
    if len(image.getbands()) == channels and image.mode in ("LA", "RGBA", "CMYK"):  # Asked for with its alpha.
        return np.asarray(image)
    return np.asarray(image.convert("RGB"))


def _grey_tiff(image: Image.Image) -> Raw:
    tags: Any = image.tag_v2  # pyright: ignore[reportAttributeAccessIssue]
    values, bits = np.asarray(image), max(tags.get(_BITS, (8,)))
    if image.mode == "I" and bits == 32 and max(tags.get(_SAMPLE_FORMAT, (1,))) == 1:
        values = values.view(np.uint32)
    if tags.get(_PHOTOMETRIC) == 0 and values.dtype.kind == "u":  # White is zero.
        values = values.dtype.type((1 << bits) - 1) - values
    try:
        nodata = float(str(tags[_NODATA_TAG]).strip("\0 "))
    except (KeyError, ValueError):
        nodata = None
    return _without_nodata(_upright(values[..., None], tags.get(_ORIENTATION, 1)), nodata)


def _deep_png(data: bytes, image: Image.Image) -> Raw:
    """16-bit colours, of which Pillow keeps the upper eight bits."""
    try:
        import torch
        from torchcodec.decoders import decode_png  # pyright: ignore
    except (ImportError, OSError, RuntimeError):
        return _eight_bits(image, None).astype(np.uint16) * 257
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return decode_png(encoded, mode="RGB", output_dtype=torch.uint16).permute(1, 2, 0).numpy()


_SILENT = logging.NullHandler()


def _tiff(data: bytes) -> Any:
    try:
        import tifffile  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise Unreadable("a TIFF of this kind needs tifffile: pip install tifffile") from None
    # What is wrong with a file is in the error: not on the screen as well, unless the caller listens to this logger.
    logging.getLogger("tifffile").addHandler(_SILENT)
    return tifffile.TiffFile(io.BytesIO(data))


def _layout(file: Any, channels: int | None = None) -> tuple[tuple[int, ...], int, bool]:
    """Of a TIFF's first series: which axes hold channels, how many (without alpha), and whether its pages matter."""
    page, series = file.pages[0], file.series[0]
    alpha = sum(int(kind) in (1, 2) for kind in page.extrasamples)
    axes, shape = series.axes, series.shape
    named = tuple(i for i, axis in enumerate(axes) if axis in "CS")
    if named:
        return named, int(np.prod([shape[i] for i in named])) - alpha, "C" in axes
    # An array that was written as it is: the short axis, first or last, holds the channels.
    if series.kind == "shaped" and len(shape) == 3:
        for i in (2, 0):
            others = [side for j, side in enumerate(shape) if j != i]
            if shape[i] == channels or (shape[i] <= _MOST_CHANNELS and 2 * shape[i] <= min(others)):
                return (i,), shape[i], True
    if channels not in (None, 1, 3) and len(file.pages) == channels:
        return (0,), len(file.pages), True
    return (), 1, False


def _read_tiff(data: bytes, channels: int | None) -> Raw:
    with _tiff(data) as file:
        page = file.pages[0]
        shape, plane, axes, count, source = _read_as(file, channels)
        check_size(int(np.prod(shape)) // max(1, count), shape)
        try:
            values = np.asarray(source.asarray())
        except ValueError as error:
            if "imagecodecs" in str(error):
                raise Unreadable(f"{error}: pip install 'dino-ssl[tiff]'") from None
            raise
        others = tuple(i for i in range(values.ndim) if i not in (*plane, *axes))
        values = values.transpose(*others, *plane, *axes)[(0,) * len(others)]  # Of a stack or a film, the first.
        values = values.reshape(*values.shape[:2], -1)[..., :count]
        if page.photometric == 0 and values.dtype.kind == "u":  # White is zero.
            values = values.dtype.type((1 << page.bitspersample) - 1) - values
        values = _upright(values, int(page.tags[_ORIENTATION].value) if _ORIENTATION in page.tags else 1)
        return _without_nodata(values, page.nodata if _NODATA_TAG in page.tags else None)


def _read_as(file: Any, channels: int | None) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int, Any]:
    """Shape, the axes of height and width, those of the channels, how many there are, and what to read."""
    axes, count, pages = _layout(file, channels)
    if pages and channels in (1, 3) and count not in (1, 3):  # Asked for as grey: of a stack of pages, the first.
        axes, count, pages = (), 1, False
    source = file.series[0] if pages else file.pages[0]
    if not pages:
        axes = tuple(i for i, axis in enumerate(source.axes) if axis == "S")
    named = {axis: i for i, axis in enumerate(source.axes)}
    rest = [i for i in range(len(source.shape)) if i not in axes]
    plane = tuple(rest[-2:]) if pages and source.kind == "shaped" else (named["Y"], named["X"])
    return source.shape, plane, axes, count, source


def raw_size(data: bytes, channels: int | None) -> tuple[int, int]:
    """Height and width of a TIFF that Pillow cannot read, or reads as other than an image of ``channels``."""
    with _tiff(data) as file:
        shape, plane, *_ = _read_as(file, channels)
        return shape[plane[0]], shape[plane[1]]


def check_size(pixels: int, shape: object) -> None:
    """The limit that Pillow has for the images it opens.

    Raises:
        Unreadable: there are more pixels.
    """
    if Image.MAX_IMAGE_PIXELS is not None and pixels > 2 * Image.MAX_IMAGE_PIXELS:
        raise Unreadable(f"its size {shape} is more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels: cut it into tiles")


def _upright(values: Raw, orientation: int) -> Raw:
    if orientation >= 5:
        values = values.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    return values


def _without_nodata(values: Raw, nodata: float | None) -> Raw:
    if nodata is None or not (values == nodata).any():
        return values
    return np.where(values == nodata, np.nan, values.astype(np.float64))


def to_levels(values: Raw, low_high: Range | None) -> np.ndarray:
    """8 bits: the lower end of the range becomes 0, the upper 255, what lies outside or is NaN is cut to an end.

    8-bit values stay. Without a range: the whole range of 16-bit values, and the image's own of all others.

    >>> to_levels(np.array([[[100], [400], [250]]], np.uint16), (100.0, 400.0)).ravel().tolist()
    [0, 255, 128]
    """
    if values.dtype == np.uint8:
        return values
    low, high = low_high or _natural(values)
    scale = 255 / max(high - low, 1e-12)
    if values.dtype == np.uint16:
        table = np.round((np.arange(65536) - low) * scale).clip(0, 255).astype(np.uint8)
        return table[values]
    cut = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low).clip(low, high)
    return np.round((cut - low) * scale).astype(np.uint8)


def _natural(values: Raw) -> Range:
    return (0.0, 65535.0) if values.dtype == np.uint16 else _ends(_numbers(values))


def _numbers(values: Raw, most: int = 2**16) -> np.ndarray:
    """Some of the finite values, evenly spread over the image."""
    flat = values.reshape(-1)
    flat = flat[:: max(1, len(flat) // most)] if values.dtype.kind != "f" or len(flat) > 4 * most else flat
    flat = flat.astype(np.float64)
    return flat[np.isfinite(flat)]


def estimate_range(images: Iterable[Raw]) -> Range | None:
    """One range for all images: what a sample of them holds, without no-data values and a thousandth at either end.

    Bounds that a type itself has stay where the images fill half of it: 0 and 65535 of 16 bits, 0 and 1 of floats.
    None: there is not one number in the sample.
    """
    sample = list(images)
    numbers = [_numbers(values) for values in sample]
    pool = np.concatenate(numbers) if numbers else np.empty(0)
    if not len(pool):
        return None
    low, high = _ends(pool)
    kind = sample[0].dtype
    for natural_low, natural_high, fits in ((0.0, 65535.0, kind == np.uint16), (0.0, 1.0, kind.kind == "f")):
        if fits and natural_low <= low and high <= natural_high and high - low >= (natural_high - natural_low) / 2:
            return natural_low, natural_high
    digits = 4 - math.ceil(math.log10(high - low)) if high > low else 0  # A range that can be read and typed.
    return round(low, digits), round(high, digits)


def _ends(pool: np.ndarray) -> Range:
    """Least and greatest, without values that mean no data, and without the few far outside all others."""
    if not len(pool):
        return 0.0, 1.0
    pool = _without_isolated(pool)
    least, greatest = float(pool.min()), float(pool.max())
    low, high = (float(end) for end in np.quantile(pool, (0.001, 0.999)))
    span = high - low
    if span <= 0:
        return least, greatest
    # Nearly all: dead pixels and cosmic rays go, the ends of ordinary images stay.
    return max(least, low - span / 2), min(greatest, high + span / 2)


def _without_isolated(pool: np.ndarray) -> np.ndarray:
    """Without extremes that stand apart, many times the same: -9999, -3.4e38, or 65535 beside counts of hundreds."""
    for _ in range(8):
        for extreme in (pool.min(), pool.max()):
            is_extreme = pool == extreme
            rest = pool[~is_extreme]
            if len(rest) < 2 or np.count_nonzero(is_extreme) < 2:
                continue
            least, most = np.quantile(rest, (0.01, 0.99))
            gap = np.abs(rest - extreme).min()
            if most > least and gap > 2 * (most - least) and len(np.unique(rest[:1000])) > 8:
                pool = rest
                break
        else:
            break
    return pool


def fewest_levels(images: Iterable[Raw], low_high: Range) -> int:
    """How many of 256 levels the median image keeps in this range."""
    counts = sorted(len(np.unique(to_levels(values, low_high))) for values in images)
    return counts[len(counts) // 2] if counts else 256


def with_channels(levels: np.ndarray, channels: int) -> np.ndarray:
    """Grey to RGB and RGB to grey; otherwise as many as there are.

    Raises:
        Unreadable: there are other channels; says how many.
    """
    count = levels.shape[-1]
    if count == channels:
        return levels
    if count == 1 and channels == 3:
        return levels.repeat(3, -1)
    if count == 3 and channels == 1:
        return np.asarray(Image.fromarray(np.ascontiguousarray(levels)).convert("L"))[..., None]
    raise Unreadable(f"it has {count} channels, not {channels}")


def spread(count: int, sample: int) -> Iterator[int]:
    """``sample`` of ``count`` indices, evenly spaced."""
    return iter(range(0, count, max(1, count // sample)))
