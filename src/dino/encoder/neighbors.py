"""Nearest neighbours among features: exact, within bounded memory."""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

_log = logging.getLogger(__name__)


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


def neighbors_of_all(
    features: Float[Tensor, "n d"], k: int, exact_up_to: int = 1_000_000
) -> tuple[Float[Tensor, "n m"], Int[Tensor, "n m"]]:
    """The k nearest other rows of every row, as ``nearest_neighbors``; as many as there are, when there are fewer.

    Time grows with the square of the number of rows. Beyond ``exact_up_to`` of them faiss (an extra) searches the
    nearest 64 of some thousands of cells instead, where it is installed, and may miss some neighbours.

    >>> neighbors_of_all(torch.eye(3)[[0, 0, 1]], k=1)[1][:2].tolist()
    [[1], [0]]
    """
    k = min(k, len(features) - 1)
    if k < 1:
        return features.new_empty(len(features), 0), torch.empty(len(features), 0, dtype=torch.long)
    faiss = _faiss() if len(features) > exact_up_to else None
    if faiss is None:
        return nearest_neighbors(features, features, k, skip_from=0)
    rows = features.numpy()
    index = faiss.index_factory(features.shape[1], f"IVF{4 * math.isqrt(len(rows))},Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(rows[:: max(1, len(rows) // 200_000)])
    index.add(rows)
    index.nprobe = 64
    similarities, indices = (torch.from_numpy(found) for found in index.search(rows, k + 1))
    # A row is one of its own neighbours, but of equal rows any may come first.
    own = indices == torch.arange(len(rows))[:, None]
    own[:, -1] |= ~own.any(1)
    return similarities[~own].view(-1, k), indices[~own].view(-1, k)


def _faiss() -> Any:
    try:
        import faiss  # pyright: ignore[reportMissingImports]
    except ImportError:
        _log.warning("many images: pip install 'dino-ssl[faiss]' makes the search for their neighbours faster")
        return None
    return faiss


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
