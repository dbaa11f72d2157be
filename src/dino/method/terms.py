"""Terms that a run may add to the loss: each of (global crops, the student's features of all crops)."""

import copy

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dino.machine import distributed


class Pull:
    """The mean of 1 - cosine between the student's [CLS] tokens and the initial network's, on the same global crops.

    ``initial`` is copied and never changes. ``weight``: of this term beside the loss.
    """

    def __init__(self, initial: nn.Module, weight: float) -> None:
        self.initial = copy.deepcopy(initial).eval().requires_grad_(False)
        self.weight = weight

    def __call__(
        self, global_crops: Float[Tensor, "b t c h w"], student_features: Float[Tensor, "b s d"]
    ) -> Float[Tensor, ""]:
        """``student_features``: of all crops, the global ones first. In float32, times ``weight``."""
        with torch.no_grad():
            wanted = self.initial.cls_tokens([global_crops.flatten(0, 1)])[0]  # pyright: ignore[reportCallIssue]
        wanted = wanted.unflatten(0, global_crops.shape[:2])  # (b, t, d)
        student = student_features[:, : wanted.shape[1]]
        with torch.autocast(student.device.type, enabled=False):
            return self.weight * (1 - F.cosine_similarity(student.float(), wanted.float(), dim=-1)).mean()


class CodingRate:
    """-weight R(Z), of the unit-length features Z (n, d) of the student's global crops in the whole global batch:
    R = logdet(I + d / (n eps^2) Z^T Z) / 2, the larger the more evenly Z fills its dimensions (SimDINO, arXiv
    2502.10385; the rate itself: 2006.08558). In float32 (float64 stays).

    A batch has one rate: its parts have others, so it must be worked in one.
    """

    def __init__(self, weight: float, eps: float = 0.5) -> None:
        self.weight, self.eps = weight, eps

    def __call__(
        self, global_crops: Float[Tensor, "b t c h w"], student_features: Float[Tensor, "b s d"]
    ) -> Float[Tensor, ""]:
        """``student_features``: of all crops, the global ones first."""
        with torch.autocast(student_features.device.type, enabled=False):
            z = student_features[:, : global_crops.shape[1]].flatten(0, 1)
            z = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1)
            n, d = len(z) * distributed.world_size(), z.shape[1]
            spread = distributed.all_sum(z.mT @ z).mul(d / (n * self.eps**2))
            # Positive definite by construction; unlike logdet this reads nothing back to the host.
            root, _ = torch.linalg.cholesky_ex(spread + torch.eye(d, dtype=z.dtype, device=z.device))
            return -self.weight * root.diagonal().log().sum()
