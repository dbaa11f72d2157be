"""What multi-crop cuts out of an image: where its crops come from, and what the networks see (section 3.1)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Real
from PIL import Image, ImageDraw
from torch import Tensor

from dino.pictures.sheet import PALETTE, Tile, font, sheet, to_pil


def draw_boxes(
    image: Float[Tensor, "3 h w"],
    boxes: Real[Tensor, "n 4"],
    names: Sequence[str],
    colors: Sequence[str],
    bold: int = 0,
    size: int = 640,
) -> Image.Image:
    """The image, its longest side scaled to ``size`` pixels, with named boxes (top, left, height, width) drawn.

    The first ``bold`` boxes have thicker lines, and their names at the top left instead of the bottom right.
    """
    scale = size / max(image.shape[-2:])
    shape = (round(image.shape[-1] * scale), round(image.shape[-2] * scale))
    picture = to_pil(image).resize(shape, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    letters = font(max(11, size // 45), bold=True)
    corners = [(left, top, left + width - 1, top + height - 1) for top, left, height, width in (scale * boxes).tolist()]
    for i, (left, top, right, bottom) in enumerate(corners):
        line = max(2, size // (150 if i < bold else 240))
        # A white line around and within the coloured one keeps it visible on any ground.
        draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline="white", width=line + 2)
        draw.rectangle((left, top, right, bottom), outline=colors[i], width=line)
    for i, (left, top, right, bottom) in enumerate(corners):
        x, y, anchor = (left + 6, top + 5, "la") if i < bold else (right - 6, bottom - 5, "rd")
        area = draw.textbbox((x, y), names[i], letters, anchor)
        draw.rectangle((area[0] - 5, area[1] - 4, area[2] + 5, area[3] + 4), fill=colors[i])
        draw.text((x, y), names[i], "white", letters, anchor)
    return picture


def crop_sheet(
    image: Float[Tensor, "3 h w"],
    boxes: Real[Tensor, "n 4"],
    global_crops: Float[Tensor, "t 3 g g"],
    local_crops: Float[Tensor, "v 3 l l"],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    columns: int = 5,
    tile: int = 160,
    title: str = "One image and its crops",
) -> Image.Image:
    """The image with the boxes of its crops drawn, above the crops themselves, each bordered in the colour of its box.

    ``boxes``: (top, left, height, width) in pixels of the image, global crops first. Crops hold values from 0 to 1, or
    are normalised, and then ``mean`` and ``std`` take that back.

    Raises:
        ValueError: the number of boxes is not that of the crops.
    """
    crops: list[Tensor] = [*global_crops, *local_crops]
    if len(boxes) != len(crops):
        raise ValueError(f"{len(boxes)} boxes for {len(crops)} crops: every crop needs one")
    if mean is not None and std is not None:
        shift, scale = (torch.tensor(tuple(v)).view(3, 1, 1) for v in (mean, std))
        crops = [crop.cpu() * scale + shift for crop in crops]
    kinds = [("global", i) for i in range(len(global_crops))] + [("local", i) for i in range(len(local_crops))]
    colors = [PALETTE[i % len(PALETTE)] for i in range(len(crops))]
    tiles = [
        Tile(to_pil(crop), f"{kind} {i + 1}", color)
        for crop, (kind, i), color in zip(crops, kinds, colors, strict=True)
    ]
    drawn = draw_boxes(
        image, boxes, [f"{kind[0]}{i + 1}" for kind, i in kinds], colors, len(global_crops), size=6 * tile
    )
    return sheet(
        [tiles[i : i + columns] for i in range(0, len(tiles), columns)],
        tile=tile,
        title=title,
        top=drawn,
        note="The student sees every crop, the teacher the global ones. A border has the colour of its box above.",
    )
