"""The DINO loss: cross-entropy of the centered, sharpened teacher and the student (equations 1 to 4, algorithm 1)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dino import distributed


@torch.no_grad()
def teacher_distribution(
    teacher_logits: Float[Tensor, "b t k"], center: Float[Tensor, "1 k"], teacher_temp: float
) -> Float[Tensor, "b t k"]:
    """softmax((g - c) / tau_t): centered and sharpened (equation 1, section 3.1), in the precision of the center."""
    dtype = torch.promote_types(teacher_logits.dtype, center.dtype)
    return ((teacher_logits.to(dtype) - center) / teacher_temp).softmax(-1)


class DINOLoss(nn.Module):
    """Cross-entropy of every student crop with every *other* teacher crop, averaged over pairs and images (equation 3).

    The first T student crops are the teacher's own crops, so "the same crop" is the diagonal of an (S, T) table.
    Computed in float32 (float64 stays): call it outside autocast.

    Args:
        out_dim: K, the number of prototypes.
        student_temp: temperature of the student's softmax, tau_s.
        center_momentum: m of equation 4.

    Attributes:
        center: (1, K), zero at first; used by ``forward`` before ``update_center`` moves it.
    """

    center: Tensor

    def __init__(self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__()
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(1, out_dim))

    def forward(
        self, student_logits: Float[Tensor, "b s k"], teacher_logits: Float[Tensor, "b t k"], teacher_temp: float
    ) -> Float[Tensor, ""]:
        """The mean cross-entropy; no gradient reaches the teacher's logits.

        With n_v teacher crops other than v, z_v the student's logits over its temperature and p_t the teacher's
        distributions, the sum over pairs is ``sum_v n_v logsumexp(z_v) - <sum_{t != v} p_t, z_v>``: one pass a crop.

        Raises:
            ValueError: fewer student than teacher crops, or no pair of different crops.
        """
        student_crops, teacher_crops = student_logits.shape[1], teacher_logits.shape[1]
        pairs = student_crops * teacher_crops - teacher_crops
        if student_crops < teacher_crops or pairs == 0:
            raise ValueError(
                f"{student_crops} student crops and {teacher_crops} teacher crops give no valid pairs: "
                "the student needs the teacher's crops first, and at least two crops"
            )
        targets = teacher_distribution(teacher_logits, self.center, teacher_temp)  # (b, t, k)
        total = targets.sum(1, keepdim=True)  # (b, 1, k)
        z = student_logits.to(targets.dtype) / self.student_temp  # (b, s, k)
        own, other = z[:, :teacher_crops], z[:, teacher_crops:]
        log_partition = z.logsumexp(-1)  # (b, s)
        entropy = (
            (teacher_crops - 1) * log_partition[:, :teacher_crops].sum()
            + teacher_crops * log_partition[:, teacher_crops:].sum()
            - (own * (total - targets)).sum()
            - (other * total).sum()
        )
        return entropy / (pairs * len(student_logits))

    @torch.no_grad()
    def update_center(self, teacher_logits: Float[Tensor, "b t k"]) -> None:
        """Moves the center towards the mean of the teacher's logits over the whole global batch (equation 4).

        A batch with a logit that is not finite leaves the center as it is.
        """
        mean = distributed.all_mean(teacher_logits.to(self.center.dtype).mean((0, 1)).unsqueeze(0))  # (1, k)
        moved = self.center * self.center_momentum + mean * (1 - self.center_momentum)
        self.center.copy_(torch.where(mean.isfinite().all(), moved, self.center))
