"""Patch tokens as colours: their principal components as red, green and blue, one basis for several images."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from dino.encoder.components import principal_components
from dino.pictures.sheet import Tile, enlarged, overlay_mask, resize, sheet, to_pil


class Painted(NamedTuple):
    """Colours of one image's patches, from 0 to 1, and which patches are foreground (all, unless asked for)."""

    rgb: Float[Tensor, "3 h w"]
    foreground: Bool[Tensor, "h w"]


def two_groups(values: Float[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Splits numbers into low (False) and high (True) where the variance between the two is largest (Otsu 1979).

    >>> two_groups(torch.tensor([0.1, 5.0, 0.2, 4.9, 0.0])).tolist()
    [False, True, False, True, False]
    """
    ordered = values.sort().values
    below = torch.arange(1, len(values), dtype=values.dtype)
    sums = ordered.cumsum(0)
    means = sums[:-1] / below, (sums[-1] - sums[:-1]) / (len(values) - below)
    between = below * (len(values) - below) * (means[0] - means[1]) ** 2
    if len(between) == 0 or ordered[0] == ordered[-1]:
        return torch.zeros_like(values, dtype=torch.bool)
    return values > ordered[between.argmax()]


def patch_colors(patch_tokens: Sequence[Float[Tensor, "_ _ d"]], foreground: bool = False) -> list[Painted]:
    """Colours of the patches of several images by one principal component analysis, so that colours can be compared.

    The first three components become red, green and blue, each from its 1st to its 99th percentile over all images.

    ``foreground``: the first component splits all patches into two groups. The one that is rarer at the borders of the
    images is the foreground; components are computed again from it alone, and the rest stays black. After DINOv2
    (arXiv 2304.07193), figure 1.

    Raises:
        ValueError: no images, or tokens of different widths.
    """
    widths = {tokens.shape[-1] for tokens in patch_tokens}
    if len(widths) != 1:
        raise ValueError(f"patch tokens of widths {sorted(widths)}: there must be images, and all from one backbone")
    tokens = torch.cat([one.flatten(0, 1).float().cpu() for one in patch_tokens])
    kept = torch.ones(len(tokens), dtype=torch.bool)
    if foreground:
        high = two_groups(principal_components(tokens, 1)[:, 0])
        border = torch.cat([_border(one.shape[0], one.shape[1]) for one in patch_tokens])
        kept = ~high if high[border].float().mean() > high.float().mean() else high
    rgb = torch.zeros(len(tokens), 3)
    if kept.any():
        components = principal_components(tokens[kept])
        low, span = _range(components)
        rgb[kept] = ((components - low) / span.clamp_min(1e-12)).clamp(0, 1).float()
    counts = [one.shape[0] * one.shape[1] for one in patch_tokens]
    return [
        Painted(colors.view(*one.shape[:2], 3).permute(2, 0, 1), mask.view(one.shape[:2]))
        for one, colors, mask in zip(patch_tokens, rgb.split(counts), kept.split(counts), strict=True)
    ]


def pca_picture(colors: Float[Tensor, "3 h w"], size: tuple[int, int]) -> Image.Image:
    """The colours as an image of this height and width in pixels, every patch a square."""
    return to_pil(resize(colors, size))


def pca_sheet(
    images: Sequence[Float[Tensor, "3 _ _"]],
    colors: Sequence[Painted],
    *,
    foreground: bool = False,
    captions: Sequence[str] = (),
    tile: int = 280,
) -> Image.Image:
    """Each image beside its colours, with ``foreground`` also the foreground; of several images, two a row."""
    tiles: list[list[Tile]] = []
    for i, (image, found) in enumerate(zip(images, colors, strict=True)):
        image = enlarged(image, tile)
        size = (image.shape[-2], image.shape[-1])
        group = [Tile(to_pil(image), captions[i] if captions else "")]
        if foreground:
            group.append(Tile(to_pil(overlay_mask(image, resize(found.foreground.float(), size) > 0.5)), "foreground"))
        tiles.append([*group, Tile(pca_picture(found.rgb, size), "first three components")])
    in_row = 1 if len(tiles) == 1 else 2
    rows = [list(itertools.chain(*tiles[i : i + in_row])) for i in range(0, len(tiles), in_row)]
    note = "Red, green and blue: the first three principal components of the patch tokens of all images together."
    return sheet(rows, tile=tile, title="Principal components of patch tokens", note=note)


def _border(h: int, w: int) -> Bool[Tensor, " n"]:
    border = torch.ones(h, w, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    return border.flatten()


def _range(components: Float[Tensor, "n k"]) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """1st percentile of each component, and on to the 99th. Sorted: torch.quantile takes a few millions at most."""
    ordered = components.sort(0).values
    last = len(ordered) - 1
    low, high = ordered[round(0.01 * last)], ordered[round(0.99 * last)]
    return low, high - low
