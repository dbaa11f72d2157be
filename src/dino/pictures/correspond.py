"""Which patches of two images correspond: mutual nearest neighbours of patch tokens, joined by lines."""

import colorsys
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image, ImageDraw
from torch import Tensor

from dino.encoder.neighbors import nearest_neighbors
from dino.pictures.sheet import GREY, INK, font, shorten, to_pil


class Matches(NamedTuple):
    """Pairs of patches (row, column) of two images, and the cosine similarity of their tokens."""

    first: Int[Tensor, "n 2"]
    second: Int[Tensor, "n 2"]
    similarities: Float[Tensor, " n"]


def mutual_nearest(first: Float[Tensor, "h1 w1 d"], second: Float[Tensor, "h2 w2 d"]) -> Matches:
    """Pairs of patches that are each other's nearest neighbour by the cosine of their tokens, the most similar first.

    >>> tokens = torch.eye(3)[None]  # One row of three different patches.
    >>> mutual_nearest(tokens, tokens.flip(1)).second.tolist()
    [[0, 2], [0, 1], [0, 0]]
    """
    a, b = (F.normalize(tokens.float().flatten(0, 1), dim=-1) for tokens in (first, second))
    similarities, there = nearest_neighbors(a, b, 1, tile=4096)
    back = nearest_neighbors(b, a, 1, tile=4096)[1][:, 0]
    mutual = (back[there[:, 0]] == torch.arange(len(a), device=a.device)).nonzero()[:, 0]
    order = similarities[mutual, 0].argsort(descending=True, stable=True)
    mutual = mutual[order]
    return Matches(
        _places(mutual, first.shape[1]), _places(there[mutual, 0], second.shape[1]), similarities[mutual, 0].cpu()
    )


def _places(tokens: Int[Tensor, " n"], columns: int) -> Int[Tensor, "n 2"]:
    return torch.stack([tokens // columns, tokens % columns], dim=1).cpu()


def spread(matches: Matches, count: int, grid: tuple[int, int]) -> Matches:
    """At most ``count`` of the matches, the most similar ones, spread over the first image.

    No two are closer than they would lie on an even grid; as far as that leaves too few, closer ones are added.
    ``grid``: rows and columns of patches of the first image.
    """
    chosen: list[int] = []
    distance = math.sqrt(grid[0] * grid[1] / max(count, 1))
    places = matches.first.double()
    while len(chosen) < min(count, len(places)):
        for i in range(len(places)):
            if len(chosen) == count:
                break
            near = torch.cdist(places[i : i + 1], places[chosen]) if chosen else torch.full((1, 1), torch.inf)
            if near.min() > (distance if distance >= 1 else 0):
                chosen.append(i)
        distance *= 0.7
    index = torch.tensor(sorted(chosen), dtype=torch.long)
    return Matches(*(values[index] for values in matches))


def distinct_colors(count: int) -> list[tuple[int, int, int]]:
    """Colours whose neighbours in the list are far apart: all hues, in steps of about the golden angle."""
    step = next((s for s in range(max(1, round(0.618 * count)), count) if math.gcd(s, count) == 1), 1)
    tones = ((0.95, 0.95), (0.75, 1.0), (0.9, 0.7))  # Saturation, value.
    colors = [colorsys.hsv_to_rgb(step * i % count / count, *tones[i % 3]) for i in range(count)]
    return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in colors]


def correspondence_picture(
    first: Float[Tensor, "3 h1 w1"],
    second: Float[Tensor, "3 h2 w2"],
    matches: Matches,
    patch: int,
    *,
    title: str = "Corresponding patches",
    width: int = 1600,
) -> Image.Image:
    """The two images side by side at one height, with a line in a colour of its own between the patches of each pair.

    ``width`` of the page in pixels.
    """
    margin, gap, small = width // 60, width // 40, width // 70
    # Drawn twice as large and reduced, which makes lines and rings smooth.
    ratios = [image.shape[-1] / image.shape[-2] for image in (first, second)]
    height = round(2 * (width - 2 * margin - gap) / sum(ratios))
    pictures = [
        to_pil(image).resize((round(height * ratio), height), Image.Resampling.BICUBIC)
        for image, ratio in zip((first, second), ratios, strict=True)
    ]
    joined = Image.new("RGB", (sum(p.width for p in pictures) + 2 * gap, height), "white")
    lefts = (0, pictures[0].width + 2 * gap)
    for picture, left in zip(pictures, lefts, strict=True):
        joined.paste(picture, (left, 0))
    draw = ImageDraw.Draw(joined)
    ends = [
        ((places.double() + 0.5) * patch * height / image.shape[-2]).flip(1) + torch.tensor([left, 0])
        for places, image, left in zip(matches[:2], (first, second), lefts, strict=True)
    ]
    lines = list(zip(ends[0].tolist(), ends[1].tolist(), distinct_colors(len(ends[0])), strict=True))
    stroke, ring = max(3, width // 400), max(8, width // 130)
    for start, end, color in lines:  # White below the colour keeps it visible on any ground.
        draw.line((*start, *end), "white", stroke + 4)
        draw.line((*start, *end), color, stroke)
    for start, end, color in lines:
        for x, y in (start, end):
            draw.ellipse((x - ring - 2, y - ring - 2, x + ring + 2, y + ring + 2), "white")
            draw.ellipse((x - ring, y - ring, x + ring, y + ring), color)
    joined = joined.resize((joined.width // 2, joined.height // 2), Image.Resampling.LANCZOS)

    top, foot = margin + round(2.2 * small), round(2.2 * small)
    page = Image.new("RGB", (joined.width + 2 * margin, top + joined.height + foot + margin // 2), "white")
    page.paste(joined, (margin, top))
    write = ImageDraw.Draw(page)
    large = round(1.3 * small)
    write.text((margin, margin), shorten(title, joined.width, large, bold=True), INK, font(large, bold=True))
    note = f"{len(lines)} pairs of patches that are each other's nearest neighbour"
    if lines:
        lowest, highest = matches.similarities.min().item(), matches.similarities.max().item()
        note += f", cosine similarity {lowest:.2f} to {highest:.2f}"
    write.text((margin, top + joined.height + small // 2), shorten(note, joined.width, small), GREY, font(small))
    return page
