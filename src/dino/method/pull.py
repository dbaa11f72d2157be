"""What keeps a network that is trained further near the one it began as."""

import copy

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


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
