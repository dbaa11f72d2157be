"""A built-in set of images that needs no download: objects of ten kinds on a plain background, with masks.

A kind has its outline, its pattern and its typical hue, as things in the world do. Place, size, turn, brightness,
saturation and
the tone of the background are random: raw pixels classify badly. The masks say how well attention finds the object.
"""

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from dino.machine.randomness import derive_seed

CLASSES = ("disc", "square", "triangle", "star", "cross", "ring", "heart", "crescent", "hexagon", "arrow")
_HUES = (0.0, 0.3, 0.6, 0.9, 0.2, 0.5, 0.8, 0.1, 0.4, 0.7)  # Of the classes, in turns of the colour circle.
_GREY = np.array([0.299, 0.587, 0.114])  # Weights of red, green and blue in the grey level (ITU-R 601).
_CONTRAST = 0.25  # Least distance between the grey levels of object and background: both survive a grey image.
_CHUNK = 256  # Images drawn at once: small enough for the cache of a core.


def make_shapes(
    count: int, size: int, seed: int
) -> tuple[UInt8[Tensor, "n 3 s s"], Int64[Tensor, " n"], Bool[Tensor, "n s s"]]:
    """Draws ``count`` images of ``size`` pixels a side: (images, labels, masks), labels indexing ``CLASSES``.

    Image ``i`` depends on (seed, i, size) only, so a larger count only adds images. Its class is ``i % 10``.

    >>> images, labels, masks = make_shapes(12, 32, seed=0)
    >>> images.shape, labels.tolist(), masks.any((1, 2)).all().item()
    (torch.Size([12, 3, 32, 32]), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1], True)
    """
    images = np.empty((count, 3, size, size), np.uint8)
    masks = np.empty((count, size, size), bool)
    for label in range(len(CLASSES)):
        for start in range(label, count, _CHUNK * len(CLASSES)):
            rows = slice(start, min(count, start + _CHUNK * len(CLASSES)), len(CLASSES))
            images[rows], masks[rows] = _draw(label, np.arange(count)[rows], size, seed)
    return torch.from_numpy(images), torch.arange(count) % len(CLASSES), torch.from_numpy(masks)


def _draw(label: int, index: np.ndarray, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    scale, turn, left, top, slope, way, tone, hue, saturation, value, *tint = _uniform(seed, index, 13)
    radius = 0.5 * (0.38 + 0.35 * scale)  # Of the circle around the shape, where the image's side is 1.
    centre_x, centre_y = (radius + (1 - 2 * radius) * at for at in (left, top))
    background = 0.75 + 0.22 * tone + 0.04 * (np.stack(tint) - 0.5)
    hue = _HUES[label] + 0.08 * (hue - 0.5)
    foreground = _contrast(_rgb(hue, 0.5 + 0.5 * saturation, 0.35 + 0.65 * value), background)
    dark = foreground.mean(0) < 0.5
    second = _contrast(0.45 * foreground + 0.55 * dark, foreground)  # The pattern's: lighter on dark, darker on light.

    # Each pixel's place in the shape's own frame: upright, around 0, the circle around it of radius 1.
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = grid - _column(centre_x), grid[:, None] - _column(centre_y)
    angle = 2 * np.pi * turn
    cos, sin = _column(np.cos(angle) / radius), _column(np.sin(angle) / radius)
    x, y = cos * x + sin * y, cos * y - sin * x
    distance = _distance(CLASSES[label], x, y)
    pattern = _pattern(CLASSES[label], x, y, distance)[:, None]  # (n, 1, s, s)
    cover = np.clip(0.5 - distance * _column(radius * size), 0, 1)[:, None]  # Soft over one pixel.

    # A light gradient in a random direction keeps the background from being one number.
    slope, way = 0.12 * slope - 0.06, 2 * np.pi * way
    shade = _column(slope * np.cos(way)) * (grid - 0.5) + _column(slope * np.sin(way)) * (grid[:, None] - 0.5)
    behind = _plane(background) + shade[:, None]
    paint = _plane(foreground) + pattern * _plane(second - foreground)
    image = behind + cover * (paint - behind)
    return np.round(image * 255).clip(0, 255).astype(np.uint8), distance < 0


def _distance(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the outline (negative inside; y grows downwards); exact near the outline, which is enough."""
    if name == "disc":
        return np.hypot(x, y) - 0.85
    if name == "square":
        return np.maximum(abs(x), abs(y)) - 0.7
    if name == "triangle":
        return _wedges(x, y, 3) - 0.5
    if name == "hexagon":
        return _wedges(x, y, 6) - 0.8
    if name == "star":
        return _star(x, y)
    if name == "cross":
        x, y = np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
        return np.maximum(x - 0.92, np.minimum(y - 0.28, x - 0.28))
    if name == "ring":
        return abs(np.hypot(x, y) - 0.7) - 0.2
    if name == "crescent":
        return np.maximum(np.hypot(x, y) - 0.95, 0.75 - np.hypot(x - 0.42, y))
    if name == "heart":  # Two discs on a square that stands on its corner.
        side = 0.5
        u, v = (abs(x) + y - 0.1) / np.sqrt(2), (y - 0.1 - abs(x)) / np.sqrt(2)
        square = np.maximum(abs(u), abs(v)) - side
        return np.minimum(square, np.hypot(abs(x) - side / np.sqrt(2), y - 0.1 + side / np.sqrt(2)) - side)
    shaft = np.maximum(abs(y) - 0.22, abs(x + 0.4) - 0.5)  # An arrow that points along x.
    head = np.maximum((x + 1.3 * abs(y) - 0.95) / np.hypot(1, 1.3), 0.05 - x)
    return np.minimum(shaft, head)


def _pattern(name: str, x: np.ndarray, y: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Where the second tone shows, 0 to 1."""

    def wave(along: np.ndarray, period: float) -> np.ndarray:
        return np.sin(2 * np.pi / period * along)

    if name == "disc":
        ink = wave(x, 0.5)  # Stripes.
    elif name == "square":
        ink = 2 * wave(x, 0.7) * wave(y, 0.7)  # A chessboard.
    elif name == "triangle":
        return np.zeros_like(x)
    elif name == "star":
        ink = wave(x + 0.125, 0.5) + wave(y + 0.125, 0.5) - 0.5  # Dots.
    elif name == "cross":
        ink = 6 * x  # Two halves.
    elif name == "ring":
        ink = 1.4 * np.sin(6 * np.arctan2(y, x))  # Beads.
    elif name == "heart":
        ink = wave(np.hypot(x, y), 0.45)  # Circles.
    elif name == "crescent":
        ink = 0.6 * wave(x + y, 0.3)  # Fine slanted stripes.
    elif name == "hexagon":
        ink = -wave(x + 0.2, 0.8) - wave(y + 0.2, 0.8) - 0.3  # Large dots.
    else:
        ink = 10 * (distance + 0.13)  # A rim.
    return np.clip(0.5 + ink, 0, 1).astype(np.float32)


def _wedges(x: np.ndarray, y: np.ndarray, sides: int) -> np.ndarray:
    """Largest of the distances to ``sides`` lines around the middle."""
    angles = 2 * np.pi * (np.arange(sides) + 0.5) / sides
    planes = (np.float32(np.cos(a)) * x + np.float32(np.sin(a)) * y for a in angles)
    return np.maximum.reduce(list(planes))


def _star(x: np.ndarray, y: np.ndarray, points: int = 5, inner: float = 0.4) -> np.ndarray:
    """Distance to the edge between an outer corner (radius 1) and the inner ones beside it."""
    angle = np.arctan2(y, x)
    step = 2 * np.pi / points
    folded = abs((angle + step / 2) % step - step / 2)
    radius = np.hypot(x, y)
    along, across = radius * np.cos(folded), radius * np.sin(folded)
    corner = np.array([inner * np.cos(step / 2), inner * np.sin(step / 2)])
    normal = np.array([corner[1], 1 - corner[0]]) / np.hypot(corner[1], 1 - corner[0])
    return (along - 1) * np.float32(normal[0]) + across * np.float32(normal[1])


def _rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Colours (3, n) from hue (in turns), saturation and value."""
    sixths = (np.array([5, 3, 1])[:, None] + 6 * hue) % 6
    return value - value * saturation * np.clip(np.minimum(sixths, 4 - sixths), 0, 1)


def _contrast(colour: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Colours (3, n) mixed with white or black just enough to stand out from the background's grey level."""
    grey, behind = _GREY @ colour, _GREY @ background
    end, target = np.where(behind < 0.5, 1, 0), behind + np.where(behind < 0.5, _CONTRAST, -_CONTRAST)
    share = np.where(abs(grey - behind) < _CONTRAST, (target - grey) / (end - grey), 0)
    return colour + share * (end - colour)


def _uniform(seed: int, index: np.ndarray, count: int) -> np.ndarray:
    """Numbers (count, n) in [0, 1) that depend on (seed, index) only, by the SplitMix64 hash."""
    counter = index.astype(np.uint64) * np.uint64(count) + np.arange(count, dtype=np.uint64)[:, None]
    z = np.uint64(derive_seed(seed, "shapes")) + counter * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2**53


def _column(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32)[:, None, None]


def _plane(colours: np.ndarray) -> np.ndarray:
    return colours.T.astype(np.float32)[:, :, None, None]
