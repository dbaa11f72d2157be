"""Principal components, and patch tokens in a few bytes each."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int8
from torch import Tensor


def principal_components(tokens: Float[Tensor, "n d"], k: int = 3) -> Float[Tensor, "n k"]:
    """The tokens on their first ``k`` principal components, in float64.

    Signs are fixed: the largest weight of every component is positive. Fewer than ``k`` dimensions: zeros for the rest.

    >>> line = torch.tensor([[0.0, 0.0], [1.0, 2.0], [2.0, 4.0]])
    >>> (principal_components(line, k=1) ** 2).round(decimals=4).flatten().tolist()
    [5.0, 0.0, 5.0]
    """
    centred = tokens.cpu().double()
    centred = centred - centred.mean(0)
    projected = centred @ _directions(centred, k)
    return F.pad(projected, (0, k - projected.shape[1]))


def _directions(rows: Float[Tensor, "n d"], k: int) -> Float[Tensor, "d k"]:
    """Those of the largest sums of squares, largest first, by the (d, d) products: independent of the number of
    rows."""
    _, vectors = torch.linalg.eigh(rows.mT @ rows)
    vectors = vectors.flip(1)[:, :k]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign()


class Codes(NamedTuple):
    """Tokens of length 1 in k bytes: numbers of 8 bits, and what 1 is worth in each column.

    The sum over columns of ``a * b * scales ** 2`` is close to the cosine of two tokens.
    """

    codes: Int8[Tensor, "n k"]
    scales: Float32[Tensor, " k"]

    def similarities(self, i: int) -> Float[Tensor, " n"]:
        """The cosine of every token with token ``i``, as close as the codes come to it."""
        return (self.codes.float() @ (self.codes[i].float() * self.scales**2)).clamp(-1, 1)


def encode_tokens(tokens: Float[Tensor, "n d"], k: int = 64) -> Codes:
    """Tokens, scaled to length 1, in few bytes that keep their dot products.

    They are projected on the k directions that hold most of their squares (no mean is taken off: it is part of the dot
    products, which this keeps best of all projections, Eckart and Young 1936), then each column is rounded to 8 bits.

    >>> tokens = F.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    >>> bool((encode_tokens(tokens, k=8).similarities(3) - tokens @ tokens[3]).abs().max() < 0.02)
    True
    """
    rows = F.normalize(tokens.cpu().float(), dim=1)
    some = rows[:: max(1, len(rows) // 100_000)].double()
    projected = rows @ _directions(some, k).float()
    scales = (projected.abs().amax(0) / 127).clamp_min(1e-12)
    codes = (projected / scales).round().clamp(-127, 127).to(torch.int8)
    return Codes(F.pad(codes, (0, k - codes.shape[1])), F.pad(scales, (0, k - len(scales))))
