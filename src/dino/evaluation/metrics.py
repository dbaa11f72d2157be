"""Numbers that say how good features, predictions and masks are: pure functions of tensors."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def entropy(probabilities: Float[Tensor, "*b k"]) -> Float[Tensor, "*b"]:
    """Entropy of each distribution, in nats: 0 for all weight on one entry, ln k for the uniform one (section 5.3).

    >>> round(entropy(torch.tensor([0.5, 0.5, 0.0])).item(), 4)  # ln 2
    0.6931
    """
    return torch.special.entr(probabilities).sum(-1)


def rankme(features: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Effective rank of a set of features: exp of the entropy of the normalised singular values.

    From 1 (all features on one line through the origin: collapsed) to min(n, d). Stays on the device of the features.
    All features zero: 1. Source: Garrido et al. 2023, "RankMe", equation 1 (without its epsilon).

    >>> round(rankme(torch.eye(8)).item(), 4)
    8.0
    """
    singular_values = torch.linalg.svdvals(features.float())
    return entropy(singular_values / singular_values.sum().clamp_min(torch.finfo(torch.float32).tiny)).exp()


def jaccard(
    predicted: Bool[Tensor, "*b h w"], true: Bool[Tensor, "*#b h w"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*b"]:
    """Jaccard index of masks: intersection over union, 0 to 1. Two empty masks agree: 1.

    >>> jaccard(torch.tensor([[True, True, False]]), torch.tensor([[False, True, True]])).item()  # 1 of 3
    0.3333333432674408
    """
    intersection = (predicted & true).sum((-2, -1))
    union = (predicted | true).sum((-2, -1))
    return torch.where(union == 0, 1.0, intersection.to(dtype) / union.clamp_min(1))


def top_k_hits(scores: Float[Tensor, "n c"], labels: Int[Tensor, " n"], k: int) -> Bool[Tensor, " n"]:
    """Whether the true class of each row is among its k highest scores; the mean is the top-k accuracy.

    Fewer than k classes: all of them count as the highest.

    >>> top_k_hits(torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2]]), torch.tensor([2, 2]), k=2).tolist()
    [True, False]
    """
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return (best == labels[:, None]).any(1)
