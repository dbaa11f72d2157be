"""What the [CLS] token looks at, before and after training (figures 1, 3 and 4)."""

from collections.abc import Sequence

from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from dino.encoder.attention import mass_masks
from dino.evaluation.metrics import entropy, jaccard
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


def attention_sheet(
    images: Float[Tensor, "b 3 height width"],
    attention: Float[Tensor, "b heads h w"],
    *,
    untrained: Float[Tensor, "b heads h w"] | None = None,
    masks: Bool[Tensor, "b heads h w"] | None = None,
    true_masks: Bool[Tensor, "b height width"] | None = None,
    captions: Sequence[str] = (),
    tile: int = 160,
    title: str = "Self-attention of the [CLS] token, last block",
) -> Image.Image:
    """One row an image: the image, the mean attention untrained and trained, the best head, its mask, the true mask.

    Images hold values from 0 to 1; maps come from ``Encoder.attention``, masks from thresholding them (``mass_masks``).
    The best head is the one whose mask fits the true mask best; without true masks, the most concentrated one (lowest
    entropy). Columns without data are left out.
    """
    columns = ["image", "untrained, mean", "trained, mean", "trained, best head", "its mask", "true mask"]
    shown = [True, untrained is not None, True, True, masks is not None, true_masks is not None]
    rows = []
    for i, image in enumerate(images):
        image = enlarged(image, tile)
        size = (image.shape[-2], image.shape[-1])
        head = _best_head(
            attention[i], masks[i] if masks is not None else None, true_masks[i] if true_masks is not None else None
        )
        row = [Tile(to_pil(image), captions[i] if captions else "")]
        if untrained is not None:
            row.append(Tile(_heat(untrained[i].mean(0), size)))
        row += [Tile(_heat(attention[i].mean(0), size)), Tile(_heat(attention[i, head], size), f"head {head}")]
        if masks is not None:
            row.append(Tile(to_pil(overlay_mask(image, resize(masks[i, head].float(), size) > 0.5))))
        if true_masks is not None:
            row.append(Tile(to_pil(overlay_mask(image, resize(true_masks[i].float(), size) > 0.5, color="#009e73"))))
        rows.append(row)
    note = "Brighter: the [CLS] token takes more from that patch. Each map has its own scale."
    return sheet(
        rows, tile=tile, columns=[c for c, show in zip(columns, shown, strict=True) if show], title=title, note=note
    )


def head_sheet(
    image: Float[Tensor, "3 height width"],
    attention: Float[Tensor, "heads h w"],
    *,
    share: float = 0.6,
    query: tuple[int, int] | None = None,
    tile: int = 320,
    title: str = "Self-attention of the [CLS] token, last block",
) -> Image.Image:
    """All about one image: the mean over heads as a map, over the image, as a mask; each head and its mask (figure 3).

    Masks hold ``share`` of the attention. ``query``: row and column of the patch whose attention it is, to be marked,
    when it is not that of the [CLS] token.
    """
    image = enlarged(image, tile)
    size = (image.shape[-2], image.shape[-1])
    attention = attention.cpu()
    mean = attention.mean(0)

    def outlined(attention: Tensor) -> Image.Image:
        return to_pil(overlay_mask(image, resize(mass_masks(attention, share).float(), size) > 0.5))

    shown = image if query is None else mark_patch(image, query, size[0] // mean.shape[0])
    tiles = [
        Tile(to_pil(shown), "image"),
        Tile(_heat(mean, size), "mean of heads"),
        Tile(to_pil(overlay_heat(image, mean)), "over the image"),
        Tile(outlined(mean), "mask of the mean"),
    ]
    for i, one in enumerate(attention):
        tiles += [Tile(_heat(one, size), f"head {i}"), Tile(outlined(one), "its mask")]
    rows = [tiles[i : i + 4] for i in range(0, len(tiles), 4)]
    note = f"Brighter: more attention goes to that patch; each map has its own scale. Masks hold {share:.0%} of a map."
    return sheet(rows, tile=tile, title=title, note=note)


def attention_pictures(
    image: Float[Tensor, "3 height width"],
    attention: Float[Tensor, "heads h w"],
    *,
    share: float = 0.6,
    query: tuple[int, int] | None = None,
    title: str = "Self-attention of the [CLS] token, last block",
) -> dict[str, Image.Image]:
    """Every picture of one image by its name: ``attention`` (the sheet), ``mean``, ``overlay``, ``mask``, and for each
    head ``head0`` and ``head0_mask``.

    All but the sheet have the size of the image; masks are white on black and hold ``share`` of the attention.

    Raises:
        ValueError: the share is not between 0 and 1.
    """
    size = (image.shape[-2], image.shape[-1])
    attention = attention.cpu()
    mean = attention.mean(0)
    pictures = {
        "attention": head_sheet(image, attention, share=share, query=query, title=title),
        "mean": _heat(mean, size),
        "overlay": to_pil(overlay_heat(image, mean)),
        "mask": _black_and_white(mass_masks(mean, share), size),
    }
    for i, one in enumerate(attention):
        pictures |= {f"head{i}": _heat(one, size), f"head{i}_mask": _black_and_white(mass_masks(one, share), size)}
    return pictures


def _black_and_white(mask: Bool[Tensor, "h w"], size: tuple[int, int]) -> Image.Image:
    return to_pil(resize(mask.float()[None], size)).convert("L")


def _heat(attention: Float[Tensor, "h w"], size: tuple[int, int]) -> Image.Image:
    return to_pil(resize(colorize(attention.cpu()), size))


def _best_head(
    attention: Float[Tensor, "heads h w"],
    masks: Bool[Tensor, "heads h w"] | None,
    true_mask: Bool[Tensor, "height width"] | None,
) -> int:
    if masks is None or true_mask is None:
        shares = attention.flatten(1) / attention.sum((1, 2))[:, None]
        return int(entropy(shares).argmin())
    size = (true_mask.shape[-2], true_mask.shape[-1])
    return int(jaccard(resize(masks.float().cpu(), size) > 0.5, true_mask.cpu()).argmax())
