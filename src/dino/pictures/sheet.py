"""Small parts of pictures: tensors as images, colour maps, overlays, and sheets of captioned tiles on white.

Stands below the other files of this folder, which all use it.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.colors
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

COLORMAP = "inferno"
INK, GREY = "#1a1a1a", "#6b6b6b"
RIGHT, WRONG = "#1a7f37", "#c62828"
# Told apart by people who are colour-blind too (Okabe and Ito).
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#5e4fa2", "#999933", "#444444")


class Tile(NamedTuple):
    """One picture of a sheet, with a line of text below it and a coloured border, both optional."""

    image: Image.Image
    caption: str = ""
    border: str | None = None


def to_pil(image: Float[Tensor, "c h w"]) -> Image.Image:
    """An image with values from 0 to 1 (what lies outside is clipped); one channel gives grey."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().byte().cpu()
    return Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def enlarged(image: Float[Tensor, "3 _ _"], tile: int) -> Float[Tensor, "3 _ _"]:
    """A small image with every pixel repeated, so that the outlines drawn on it are fine."""
    times = math.ceil(2 * tile / max(image.shape[-2:]))
    return image.repeat_interleave(times, -2).repeat_interleave(times, -1) if times > 2 else image


def resize(maps: Float[Tensor, "*b h w"], size: tuple[int, int], smooth: bool = False) -> Float[Tensor, "*b _ _"]:
    """Maps at another size (height, width): squares of their own value, or smooth (bilinear)."""
    flat = maps.float().reshape(-1, 1, *maps.shape[-2:])
    flat = F.interpolate(flat, size, mode="bilinear", align_corners=False) if smooth else F.interpolate(flat, size)
    return flat.view(*maps.shape[:-2], *size)


def colorize(
    values: Float[Tensor, "h w"], colormap: str = COLORMAP, scale: tuple[float, float] | None = None
) -> Float[Tensor, "3 h w"]:
    """A map in colour, from its smallest to its largest value; a constant map gets the lowest colour.

    ``scale``: the values of the lowest and the highest colour instead; what lies beyond gets those.
    """
    colors = torch.from_numpy(matplotlib.colormaps[colormap](_zero_to_one(values, scale).numpy()))
    return colors[..., :3].permute(2, 0, 1).float()


def _zero_to_one(values: Float[Tensor, "h w"], scale: tuple[float, float] | None) -> Float[Tensor, "h w"]:
    values = values.float().cpu()
    low, high = scale or (values.min().item(), values.max().item())
    return ((values - low) / max(high - low, 1e-12)).clamp(0, 1)


def overlay_heat(
    image: Float[Tensor, "3 height width"], values: Float[Tensor, "h w"], scale: tuple[float, float] | None = None
) -> Float[Tensor, "3 height width"]:
    """The image under a smooth map in colour, which covers it more where values are high; scale as in ``colorize``."""
    size = (image.shape[-2], image.shape[-1])
    strength = resize(_zero_to_one(values, scale), size, smooth=True)
    cover = 0.35 + 0.4 * strength
    return (1 - cover) * image.detach().float().cpu().clamp(0, 1) + cover * colorize(strength, scale=(0.0, 1.0))


def overlay_mask(
    image: Float[Tensor, "3 h w"], mask: Bool[Tensor, "h w"], color: str = PALETTE[1]
) -> Float[Tensor, "3 h w"]:
    """The image with a mask: dimmed and greyed outside, in full colour inside, and the outline drawn."""
    inside = mask.cpu()
    image = image.detach().float().cpu().clamp(0, 1)
    outside = 0.35 * image.mean(0, keepdim=True) + 0.05
    width = max(1, min(image.shape[-2:]) // 160)
    grown = F.max_pool2d(inside[None].float(), 2 * width + 1, stride=1, padding=width)[0] > 0
    shrunk = -F.max_pool2d(-inside[None].float(), 2 * width + 1, stride=1, padding=width)[0] > 0
    ink = torch.tensor(matplotlib.colors.to_rgb(color)).view(3, 1, 1)
    return torch.where(grown & ~shrunk, ink, torch.where(inside, image, outside))


def mark_patch(
    image: Float[Tensor, "3 h w"], place: tuple[int, int], patch: int, color: str = PALETTE[1]
) -> Float[Tensor, "3 h w"]:
    """The image with a frame around the patch in this row and column of its grid."""
    row, column = place
    image = image.detach().float().cpu().clone()
    width = max(1, min(image.shape[-2:]) // 120)
    # White around the colour keeps it visible on any ground.
    for paint, reach in (("white", 2 * width), (color, width)):
        framed = torch.zeros(image.shape[-2:], dtype=torch.bool)
        top, left = max(0, row * patch - reach), max(0, column * patch - reach)
        framed[top : (row + 1) * patch + reach, left : (column + 1) * patch + reach] = True
        framed[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = False
        image[:, framed] = torch.tensor(matplotlib.colors.to_rgb(paint)).view(3, 1)
    return image


@lru_cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and knows most of the world's alphabets."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def shorten(text: str, width: int, size: int, bold: bool = False) -> str:
    """The text, cut in the middle so that it fits into a width in pixels."""
    letters = font(size, bold)
    if letters.getlength(text) <= width:
        return text
    for kept in range(len(text) - 1, 0, -1):
        cut = text[: (kept + 1) // 2] + "…" + text[len(text) - kept // 2 :]
        if letters.getlength(cut) <= width:
            return cut
    return "…"


def sheet(
    rows: Sequence[Sequence[Tile]],
    *,
    tile: int = 160,
    columns: Sequence[str] = (),
    title: str = "",
    note: str = "",
    top: Image.Image | None = None,
) -> Image.Image:
    """Rows of tiles on white, each scaled to fit a square of ``tile`` pixels, with column headings and a title.

    Columns are as wide as the widest picture, so that portraits stand close together.

    ``top``: a picture across the page, above the rows. ``note``: a line in grey at the bottom that says how to read the
    sheet.

    Raises:
        ValueError: there is no tile.
    """
    count = max((len(row) for row in rows), default=0)
    if count == 0:
        raise ValueError("a sheet needs at least one picture")
    gap, small = min(20, max(6, tile // 16)), min(24, max(11, tile // 13))
    large, line, margin = round(small * 1.3), round(small * 1.5), 2 * gap
    column = max(tile // 2, *(_fitted(one, tile)[0] for row in rows for one in row))
    width = 2 * margin + count * (column + gap) - gap
    # Rows are as high as their highest picture, so that wide pictures do not float in white.
    heights = [
        max(_fitted(one, tile)[1] for one in row) + (line if any(one.caption for one in row) else 0) for row in rows
    ]
    foot = _wrap(note, width - 2 * margin, small) if note else []
    if top is not None:
        across = width - 2 * margin
        top = top.resize((across, round(top.height * across / top.width)), Image.Resampling.LANCZOS)
    y_top = margin + (round(2.2 * small) if title else 0)
    y_columns = y_top + (top.height + gap if top is not None else 0)
    y_rows = y_columns + (line if columns else 0)
    y_foot = y_rows + sum(heights) + gap * len(rows)
    page = Image.new("RGB", (width, y_foot + (line * len(foot) or -gap) + margin), "white")
    draw = ImageDraw.Draw(page)
    draw.text((margin, margin), shorten(title, width - 2 * margin, large, bold=True), INK, font(large, bold=True))
    if top is not None:
        page.paste(top, (margin, y_top))
    for j, text in enumerate(columns):
        centre = margin + j * (column + gap) + column / 2
        draw.text((centre, y_columns), shorten(text, column, small, True), INK, font(small, True), anchor="ma")
    for i, row in enumerate(rows):
        for j, one in enumerate(row):
            place = (margin + j * (column + gap), y_rows + sum(heights[:i]) + i * gap)
            _place(page, draw, one, place, tile, column, small)
    for i, text in enumerate(foot):
        draw.text((margin, y_foot + i * line), text, GREY, font(small))
    return page


def _fitted(one: Tile, tile: int) -> tuple[int, int]:
    """Width and height of a tile's picture with its border."""
    scale = tile / max(one.image.size)
    return max(1, round(one.image.width * scale)), max(1, round(one.image.height * scale))


def _place(
    page: Image.Image,
    draw: ImageDraw.ImageDraw,
    one: Tile,
    place: tuple[int, int],
    tile: int,
    column: int,
    small: int,
) -> None:
    (x, y), (width, height) = place, _fitted(one, tile)
    left = x + (column - width) // 2
    edge = max(3, tile // 32) if one.border else 0
    if one.border:
        draw.rectangle((left, y, left + width - 1, y + height - 1), fill=one.border)
    size = (max(1, width - 2 * edge), max(1, height - 2 * edge))
    # Small pictures keep their pixels visible; large ones are reduced with a good filter.
    enlarged = size[0] >= 2 * one.image.width
    picture = one.image.convert("RGB").resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)
    page.paste(picture, (left + edge, y + edge))
    if one.caption:
        text = shorten(one.caption, column, small)
        draw.text((x + column / 2, y + height + small // 4), text, one.border or INK, font(small), anchor="ma")


def _wrap(text: str, width: int, size: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font(size).getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
