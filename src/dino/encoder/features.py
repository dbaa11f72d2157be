"""What a frozen backbone sees: features of a source, nearest neighbours among them, attention maps and masks."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from dino.augment.resample import resize_and_center_crop
from dino.config import IMAGENET_MEAN, IMAGENET_STD
from dino.data.loader import Batch, iterate_once
from dino.data.sources import Source

_log = logging.getLogger(__name__)


class Features(NamedTuple):
    """Features of the readable images of a source, in its order, on the CPU."""

    features: Float[Tensor, "n d"]
    labels: Int[Tensor, " n"] | None  # None: the source has none.
    indices: Int[Tensor, " n"]  # Of the images in the source: broken ones are missing.


@contextlib.contextmanager
def frozen(backbone: nn.Module, device: torch.device | str) -> Iterator[None]:
    """Evaluation mode, no gradients, bfloat16 on CUDA; afterwards the backbone is in the mode it was in."""
    was_training = backbone.training
    backbone.eval()
    on_cuda = torch.device(device).type == "cuda"
    try:
        # A network that is compiled for training would be compiled again for the sizes and modes of an evaluation.
        eager = torch.compiler.set_stance("force_eager")
        with eager, torch.inference_mode(), torch.autocast("cuda", dtype=torch.bfloat16, enabled=on_cuda):
            yield
    finally:
        backbone.train(was_training)


def cls_token(backbone: nn.Module, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
    """The [CLS] token of the last block; the pooled features of a convnet."""
    if hasattr(backbone, "cls_tokens"):
        return backbone.cls_tokens([images])[0]  # pyright: ignore[reportCallIssue]
    return backbone(images).cls_token


def last_blocks(backbone: nn.Module, images: Float[Tensor, "b c h w"], n: int) -> Float[Tensor, "b m d"]:
    """All that a linear probe may look at: ``condense`` of the last ``n`` blocks (m = n + 1).

    A backbone without blocks to look into gives its pooled features alone (m = 1).
    """
    if not hasattr(backbone, "get_intermediate_layers"):
        return cls_token(backbone, images)[:, None]
    return condense(backbone.get_intermediate_layers(images, n))  # pyright: ignore[reportCallIssue]


def condense(layers: Sequence[Float[Tensor, "b t d"]]) -> Float[Tensor, "b m d"]:
    """The [CLS] tokens of some blocks in order, then the mean patch token of the last of them (m: blocks + 1)."""
    return torch.stack([*(layer[:, 0] for layer in layers), layers[-1][:, 1:].mean(1)], 1)


def evaluation_images(
    source: Source,
    *,
    resize: int,
    crop: int,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int,
    device: torch.device | str,
    broken: dict[str, str],
    progress: bool = True,
) -> Iterator[tuple[Float[Tensor, "b c crop crop"], Int[Tensor, " b"]]]:
    """The images of a source in order as backbones take them, with their indices (on the CPU).

    Resized, centre-cropped and normalised on the device. Broken ones are left out and noted in ``broken``.
    """
    shift, scale = (torch.tensor(tuple(v), device=device).view(-1, 1, 1) for v in (mean, std))
    batches = iterate_once(source, batch_size, device=device, broken=broken)
    for canvas, indices in _tracked(batches, -(-len(source) // batch_size), progress):
        yield (resize_and_center_crop(*canvas, resize, crop) - shift) / scale, indices.cpu()


def extract_features(
    backbone: nn.Module,
    source: Source,
    *,
    resize: int = 256,
    crop: int = 224,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    batch_size: int = 128,
    device: torch.device | str = "cpu",
    normalize: bool = True,
    read: Callable[[nn.Module, Tensor], Tensor] = cls_token,
    progress: bool = True,
) -> Features:
    """The [CLS] tokens of the frozen backbone, for every image of a source in order (section 4.1).

    Each image is resized (short side to ``resize`` pixels) and its centre ``crop`` taken. ``normalize`` gives rows of
    length 1. ``read(backbone, images)`` gives other features than the [CLS] token, (b, d). Broken images are left out,
    and counted in the log with the first of them.

    Raises:
        ValueError: no image of the source can be read.
    """
    parts: list[Tensor] = []
    indices: list[Tensor] = []
    broken: dict[str, str] = {}
    batches = evaluation_images(
        source,
        resize=resize,
        crop=crop,
        mean=mean,
        std=std,
        batch_size=batch_size,
        device=device,
        broken=broken,
        progress=progress,
    )
    with frozen(backbone, device):
        for images, batch_indices in batches:
            features = read(backbone, images).float()
            parts.append((F.normalize(features, dim=-1) if normalize else features).cpu())
            indices.append(batch_indices)
    first = next((f"{name}: {reason}" for name, reason in broken.items()), "the source is empty")
    if not parts:
        raise ValueError(f"none of the {len(source)} images can be read ({first})")
    found = torch.cat(indices)
    if broken:
        _log.warning("%d of %d images cannot be read and are left out, the first %s", len(broken), len(source), first)
    labels = None if source.labels is None else source.labels[found]
    return Features(torch.cat(parts), labels, found)


def _tracked(batches: Iterator[Batch], total: int, progress: bool) -> Iterable[Batch]:
    """A bar on the terminal; never on stdout, which belongs to results."""
    console = Console(stderr=True)
    shown = progress and console.is_terminal
    return track(batches, "features", total=total, console=console, transient=True) if shown else batches


def nearest_neighbors(
    queries: Float[Tensor, "m d"],
    bank: Float[Tensor, "n d"],
    k: int,
    *,
    skip_from: int | None = None,
    tile: int = 16384,
) -> tuple[Float[Tensor, "m {k}"], Int[Tensor, "m {k}"]]:
    """The k rows of the bank with the largest dot product with each query, nearest first: (similarities, indices).

    For features of length 1 that is the cosine. Memory is bounded: of all similarities there are never more than those
    of a few queries with ``tile`` rows of the bank. ``skip_from``: the queries are the bank's rows from this one on,
    and none is its own neighbour.

    >>> bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    >>> nearest_neighbors(bank[:1], bank, k=2)[1].tolist()
    [[0, 2]]
    >>> nearest_neighbors(bank[:1], bank, k=2, skip_from=0)[1].tolist()
    [[2, 1]]
    """
    entries = 2**22 if queries.device.type == "cpu" else 2**27  # Of a tile: 16 MiB, which caches hold, or 512 MiB.
    rows = max(1, entries // tile)
    blocks = queries.split(rows)
    best = [block.new_empty(len(block), 0) for block in blocks]
    where = [torch.empty(len(block), 0, dtype=torch.long, device=block.device) for block in blocks]
    for start in range(0, len(bank), tile):
        dot_products = _dot_products_with(bank[start : start + tile])
        for i, block in enumerate(blocks):
            similarities = dot_products(block)  # (rows, tile)
            if skip_from is not None:
                similarities.diagonal(skip_from + i * rows - start).fill_(-torch.inf)
            indices = _holding_the_best(similarities, k)
            values = torch.cat([best[i], similarities.gather(1, indices)], 1)
            indices = torch.cat([where[i], indices + start], 1)
            best[i], order = values.topk(min(k, values.shape[1]), dim=1, sorted=False)
            where[i] = indices.gather(1, order)
    similarities, order = torch.cat(best).sort(dim=1, descending=True)
    return similarities, torch.cat(where).gather(1, order)


def _dot_products_with(bank: Tensor) -> Callable[[Tensor], Tensor]:
    if bank.device.type == "cpu" and bank.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        # Called by name, oneDNN uses AVX-512 wherever it is; MKL, behind @, not on AMD's processors: half the speed.
        packed = bank.to_mkldnn()
        return lambda queries: F.linear(queries.to_mkldnn(), packed).to_dense() if len(queries) else queries @ bank.mT
    return lambda queries: queries @ bank.mT


def _holding_the_best(values: Tensor, k: int) -> Tensor:
    """Some columns for every row, among them the k largest values: a full ``topk`` of long rows is slow.

    The k largest lie in those k groups whose own maxima are the largest. A group takes every ``groups``-th column.
    """
    m, n = values.shape
    size = math.isqrt(n // k)
    if size < 2:
        return torch.arange(n, device=values.device).expand(m, n)
    groups = n // size
    maxima = values[:, : size * groups].unflatten(1, (size, groups)).amax(1)
    first = maxima.topk(k, dim=1, sorted=False).indices
    members = (first[:, None] + torch.arange(0, size * groups, groups, device=values.device)[:, None]).flatten(1)
    rest = torch.arange(size * groups, n, device=values.device).expand(m, -1)
    return torch.cat([members, rest], 1)


def attention_maps(
    backbone: nn.Module, images: Float[Tensor, "b c _ _"], query: tuple[int, int] | None = None
) -> Float[Tensor, "b heads h w"]:
    """How much the [CLS] token attends to each patch in the last block, for every head (figures 1 and 3).

    ``query``: row and column of a patch that takes the place of the [CLS] token. The share that goes to the [CLS] token
    is left out, so a map sums to a little less than one. Images are normalised; borders that do not fill a patch are
    ignored.

    Raises:
        ValueError: the backbone has no attention to show, or the query is no patch of the images.
    """
    if not hasattr(backbone, "get_last_selfattention"):
        raise ValueError(f"{type(backbone).__name__} has no attention maps: take a vision transformer")
    patch = int(backbone.patch_size)  # pyright: ignore[reportArgumentType]
    h, w = images.shape[-2] // patch, images.shape[-1] // patch
    token = 0  # [CLS]
    if query is not None:
        row, column = query
        if not (0 <= row < h and 0 <= column < w):
            raise ValueError(f"query patch {query} is not in the grid of {h} x {w} patches")
        token = 1 + row * w + column
    with frozen(backbone, images.device):
        attention = backbone.get_last_selfattention(images, slice(token, token + 1))  # pyright: ignore[reportCallIssue]
    return attention[:, :, 0, 1:].float().unflatten(-1, (h, w))


def mass_masks(attention: Float[Tensor, "*b h w"], share: float = 0.6) -> Bool[Tensor, "*b h w"]:
    """Masks obtained by thresholding the self-attention maps to keep a share of the mass (figure 4: 60 %).

    Each map keeps its largest patches, the fewest that hold at least that share of its own sum.

    Raises:
        ValueError: the share is not between 0 and 1.

    >>> mass_masks(torch.tensor([[0.1, 0.5, 0.1, 0.3]]), share=0.6).tolist()
    [[False, True, False, True]]
    """
    if not 0 < share < 1:
        raise ValueError(f"share of the attention mass {share} is not allowed: between 0 and 1, both excluded")
    values, order = attention.flatten(-2).sort(dim=-1)  # Ascending: what stays below 1 - share in sum is dropped.
    kept = (values / values.sum(-1, keepdim=True)).cumsum(-1) > 1 - share
    return torch.zeros_like(kept).scatter_(-1, order, kept).view_as(attention)
