"""Ranked lists: the order of a database for every query, average precision and precision at k, PCA whitening."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def ranked_tiles(
    queries: Float[Tensor, "m d"], database: Float[Tensor, "n d"], entries: int = 2**24
) -> Iterator[tuple[slice, Int[Tensor, "t n"]]]:
    """For a few queries at a time: which rows of ``queries``, and the rows of the database by descending dot product.

    Equal ones keep the database's order. Memory is bounded: a tile has about ``entries`` numbers, at least one query's.

    >>> [(rows.start, order.tolist()) for rows, order in ranked_tiles(torch.eye(2), torch.eye(2), entries=2)]
    [(0, [[0, 1]]), (1, [[1, 0]])]
    """
    tile = max(1, entries // max(1, len(database)))
    for start in range(0, len(queries), tile):
        rows = slice(start, min(start + tile, len(queries)))
        yield rows, (queries[rows] @ database.mT).sort(dim=1, descending=True, stable=True).indices


def average_precision(
    hits: Bool[Tensor, "m n"],
    positives: Int[Tensor, " m"] | None = None,
    ignored: Bool[Tensor, "m n"] | None = None,
) -> Float[Tensor, " m"]:
    """Area under each query's precision-recall curve by the trapezoidal rule, from 0 to 1, in float64 on the CPU.

    ``hits``: what is relevant, in ranked order. ``ignored`` (never a hit): taken out of the ranking before places are
    counted. ``positives``: how many there are to find, where the ranking may not hold them all. None to find: NaN.
    Source: the evaluation of Oxford Buildings (Philbin et al. 2007), as in its revisited form (arXiv 1803.11285).

    >>> average_precision(torch.tensor([[True, False, False, True]])).item()  # (1 + 1) / 4 + (1 / 3 + 2 / 4) / 4
    0.7083333333333333
    """
    row, rank, found = _hits_and_ranks(hits, ignored)
    before = torch.where(rank == 0, 1.0, (found - 1) / rank)  # Precision just above the hit, and with it.
    areas = (before + found / (rank + 1)) / 2
    total = torch.zeros(len(hits), dtype=torch.float64).index_add_(0, row, areas)
    return total / (hits.sum(1) if positives is None else positives).cpu()


def precision_at(
    hits: Bool[Tensor, "m n"], ks: Sequence[int], ignored: Bool[Tensor, "m n"] | None = None
) -> Float[Tensor, "m k"]:
    """Share of relevant items among the first k, for every k: from 0 to 1, in float64 on the CPU.

    A k beyond the last relevant item is lowered to its place, as the revisited Oxford and Paris evaluation does: what
    comes after it does not count against the query. Nothing relevant: NaN.

    >>> precision_at(torch.tensor([[False, True, False, False]]), ks=(1, 10)).tolist()
    [[0.0, 0.5]]
    """
    row, rank, _ = _hits_and_ranks(hits, ignored)
    last = torch.zeros(len(hits), dtype=torch.float64).scatter_reduce_(0, row, rank + 1, "amax")
    columns = []
    for k in ks:
        within = torch.zeros(len(hits), dtype=torch.float64).index_add_(0, row, (rank < k).double())
        columns.append(within / last.clamp(max=k))  # 0 / 0 where there is no hit.
    return torch.stack(columns, dim=1)


def _hits_and_ranks(hits: Tensor, ignored: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of every hit: its row, its place from 0, and the number of hits up to it; on the CPU, which has float64."""
    row, column = hits.nonzero(as_tuple=True)
    found = hits.cumsum(1)[row, column]
    rank = column if ignored is None else column - ignored.cumsum(1)[row, column]
    return row.cpu(), rank.cpu().double(), found.cpu().double()


class Whitening(NamedTuple):
    """A linear map to decorrelated features: ``whiten`` subtracts ``mean`` and multiplies with ``operator``."""

    mean: Float[Tensor, " d"]
    operator: Float[Tensor, "d d"]


def learn_whitening(features: Float[Tensor, "n d"]) -> Whitening:
    """Learns a PCA whitening from a set of features; all dimensions are kept.

    As released: the eigenvectors are those of F^T F / n, *not* centred (the mean is subtracted when it is applied), and
    eigenvalues below 1e-5 of the largest are raised to that, so fewer images than dimensions do no harm.

    Raises:
        ValueError: there is no feature other than zero.
    """
    f = features.cpu().double()
    if not f.any():
        raise ValueError(f"whitening cannot be learnt from {len(f)} features that are all zero")
    values, vectors = torch.linalg.eigh(f.mT @ f / len(f))
    scale = values.clamp(min=1e-5 * values[-1].item()).rsqrt()
    operator = scale.flip(0)[:, None] * vectors.mT.flip(0)  # The largest first.
    return Whitening(f.mean(0).to(features), operator.to(features))


def whiten(features: Float[Tensor, "n d"], whitening: Whitening) -> Float[Tensor, "n d"]:
    """Whitened features, rows of length 1."""
    return F.normalize((features - whitening.mean) @ whitening.operator.mT, dim=1)
