"""The DINO loss: cross-entropy of the centered, sharpened teacher and the student (equations 1 to 4, algorithm 1)."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dino.machine import distributed
from dino.models.products import Product, linear


@torch.no_grad()
def teacher_distribution(
    teacher_logits: Float[Tensor, "b t k"], center: Float[Tensor, "1 k"], teacher_temp: float
) -> Float[Tensor, "b t k"]:
    """softmax((g - c) / tau_t): centered and sharpened (equation 1, section 3.1), in the precision of the center."""
    dtype = torch.promote_types(teacher_logits.dtype, center.dtype)
    return ((teacher_logits.to(dtype) - center) / teacher_temp).softmax(-1)


@torch.no_grad()
def sinkhorn_center(
    teacher_logits: Sequence[Float[Tensor, "_ t k"]], teacher_temp: float, iterations: int = 3
) -> Float[Tensor, "1 k"]:
    """The center with which the teacher gives every prototype the same weight over the whole global batch.

    Sinkhorn-Knopp as in SwAV (arXiv 2006.09882, section 3.2): in turns, every prototype's weights over all crops and
    every crop's weights over all prototypes are scaled to sum up alike. What scales a prototype is subtracted from its
    logits: a center, solved for in place of followed. ``teacher_logits``: of all parts of this process's rows.
    """
    dtype = torch.promote_types(teacher_logits[0].dtype, torch.float32)
    rows = chunk_of_images(1, teacher_logits[0].shape[-1], teacher_logits[0].device)
    shift = torch.zeros((), dtype=dtype, device=teacher_logits[0].device)  # The center over the temperature, then (k,)
    for i in range(iterations):
        weights = []
        for chunk in (chunk for logits in teacher_logits for chunk in logits.flatten(0, 1).split(rows)):
            scores = chunk.to(dtype) / teacher_temp - shift
            weights.append((scores.log_softmax(-1) if i else scores).logsumexp(0))
        shift = shift + distributed.all_gather(torch.stack(weights).logsumexp(0)).logsumexp(0)
    return (shift - shift.mean()).mul_(teacher_temp)[None]  # What all prototypes share changes no distribution.


def _cross_entropy(
    z: Float[Tensor, "b s k"], log_partition: Float[Tensor, "b s"], targets: Float[Tensor, "b t k"]
) -> Float[Tensor, ""]:
    """The sum over all images and pairs of different crops, in closed form (see ``DINOLoss.forward``)."""
    t, total = targets.shape[1], targets.sum(1, keepdim=True)  # (b, 1, k)
    return (
        (t - 1) * log_partition[:, :t].sum()
        + t * log_partition[:, t:].sum()
        - ((total - targets) * z[:, :t]).sum()
        - (total[:, 0] * z[:, t:].sum(1)).sum()
    )


class RecentLogits(nn.Module):
    """The teacher's logits of the last ``images`` images: what batches too small to speak for all prototypes are
    balanced together with (SwAV, "Working with small batches").

    Every process holds all of them, in the order of the global batches, whatever the number of processes; they are
    part of ``state_dict``.
    """

    rows: Shaped[Tensor, "n t k"]  # The newest first; none yet: (0,)

    def __init__(self, images: int) -> None:
        super().__init__()
        self.images = images
        self.register_buffer("rows", torch.zeros(0))

    def share(self) -> list[Float[Tensor, "_ t k"]]:
        """Those that this process brings into an exchange with the others."""
        mine = distributed.share(len(self.rows))
        return [self.rows[mine.start : mine.stop]] if mine else []

    @torch.no_grad()
    def add(self, teacher_logits: Sequence[Float[Tensor, "_ t k"]]) -> None:
        """The parts of this process's rows of a batch. What is not finite becomes 0: it stands for no prototype."""
        new = distributed.all_gather(torch.cat(list(teacher_logits))).flatten(0, 1)
        self.rows = torch.cat([torch.where(new.isfinite(), new, 0.0), self.rows])[: self.images]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        kept = state_dict.setdefault(prefix + "rows", torch.zeros(0))  # Of a loss without a queue.
        self.rows = torch.empty_like(kept, device=self.rows.device)  # Room for as many as there were.
        super()._load_from_state_dict(state_dict, prefix, *rest)


_BLOCK = 8192  # Prototypes whose gradients are added up at once: a product of all would take as much room as they do.


def chunk_of_images(student_crops: int, out_dim: int, device: torch.device) -> int:
    """How many images' logits are worked on at once: about 128 crops of 65,536 prototypes on a CPU, 1,024 on a GPU."""
    return max(1, (2**23 if device.type == "cpu" else 2**26) // (student_crops * out_dim))


class _FusedLoss(torch.autograd.Function):
    """The product with the prototypes and ``_cross_entropy`` together, a few images at a time.

    What would fill memory never exists: the logits of all crops, their gradients, the normalised prototypes. Each chunk
    adds to the gradients of embeddings and prototypes while it is there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,  # (b, s, e)
        directions: Tensor,  # (k, e)
        lengths: Tensor,  # (k, 1)
        teacher_logits: Tensor,  # (b, t, k)
        center: Tensor,
        teacher_temp: float,
        student_temp: float,
        images: int,
    ) -> Tensor:
        dtype = torch.promote_types(embeddings.dtype, center.dtype)
        norms = torch.linalg.vector_norm(directions, dim=1, dtype=dtype)  # (k,)
        scale = lengths[:, 0].to(dtype) / norms  # A logit is scale * <embedding, direction>.
        entropy = torch.zeros((), dtype=dtype, device=embeddings.device)
        # With respect to the embeddings, and to the prototypes themselves (then, in place, to their directions).
        grad_embeddings, grad_prototypes = torch.empty_like(embeddings), torch.zeros_like(directions, dtype=dtype)
        chunks = zip(*(x.split(images) for x in (embeddings, teacher_logits, grad_embeddings)), strict=True)
        for rows, teacher, grad_rows in chunks:
            targets = teacher_distribution(teacher, center, teacher_temp)  # (b, t, k)
            t = targets.shape[1]
            z = linear(rows, directions).to(dtype).mul_(scale / student_temp)  # (b, s, k)
            log_partition = z.logsumexp(-1)  # (b, s)
            entropy += _cross_entropy(z, log_partition, targets)
            # The gradient with respect to z_v: n_v softmax(z_v) - sum_{t != v} p_t.
            z.sub_(log_partition[..., None]).exp_()
            z[:, :t].mul_(t - 1).add_(targets)
            z[:, t:].mul_(t)
            grad = z.sub_(targets.sum(1, keepdim=True)).div_(student_temp)
            small = grad.flatten(0, 1).to(rows.dtype).split(_BLOCK, 1)
            for grad_block, block in zip(grad_prototypes.split(_BLOCK), small, strict=True):
                grad_block += linear(rows.flatten(0, 1).mT, block.mT).mT
            grad_rows.copy_(linear(grad.mul_(scale).to(rows.dtype), directions.mT))

        # Only what turns a prototype changes its direction; what is along it changes its length.
        along = torch.empty_like(norms)
        blocks = zip(*(x.split(_BLOCK) for x in (grad_prototypes, directions, norms, scale, along)), strict=True)
        for grad, direction, norm, factor, out in blocks:
            torch.sum(grad * direction, 1, out=out).div_(norm)
            grad.addcmul_(direction, (out / norm)[:, None], value=-1).mul_(factor[:, None])
        grads = grad_embeddings, grad_prototypes.to(directions.dtype), along[:, None].to(lengths.dtype)
        ctx.save_for_backward(*grads)
        return entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        wanted = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        return *(saved * grad if wants else None for saved, wants in wanted), None, None, None, None, None


class DINOLoss(nn.Module):
    """Cross-entropy of every student crop with every *other* teacher crop, averaged over pairs and images (equation 3).

    The first T student crops are the teacher's own crops, so "the same crop" is the diagonal of an (S, T) table.
    Computed in float32 (float64 stays): call it outside autocast.

    Args:
        out_dim: K, the number of prototypes.
        student_temp: temperature of the student's softmax, tau_s.
        center_momentum: m of equation 4.
        targets: what keeps the teacher from collapsing: ``center``, which follows the batches (equation 4), or
            ``sinkhorn``, one solved for in every batch (``sinkhorn_center``).
        queue: images of the last batches that ``sinkhorn``, and it alone, solves for together with the batch
            (``RecentLogits``).

    Attributes:
        center: (1, K), zero at first; used by ``forward`` before ``update_center`` moves it.
    """

    center: Tensor

    def __init__(
        self,
        out_dim: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        targets: Literal["center", "sinkhorn"] = "center",
        queue: int = 0,
    ) -> None:
        super().__init__()
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.targets = targets
        self.register_buffer("center", torch.zeros(1, out_dim))
        self.recent = RecentLogits(queue) if queue and targets == "sinkhorn" else None

    def center_of(self, teacher_logits: Sequence[Float[Tensor, "_ t k"]], teacher_temp: float) -> Float[Tensor, "1 k"]:
        """The center for a batch that comes in parts: the one that follows the batches, or the batch's own."""
        if self.targets == "center":
            return self.center
        return sinkhorn_center([*teacher_logits, *(self.recent.share() if self.recent else [])], teacher_temp)

    def forward(
        self,
        student_logits: Float[Tensor, "b s k"] | Product,
        teacher_logits: Float[Tensor, "b t k"],
        teacher_temp: float,
        center: Float[Tensor, "1 k"] | None = None,
    ) -> Float[Tensor, ""]:
        """The mean cross-entropy; no gradient reaches the teacher's logits.

        ``center``: that of the whole batch (``center_of``) where this is a part of it.

        With n_v teacher crops other than v, z_v the student's logits over its temperature and p_t the teacher's
        distributions, the sum over pairs is ``sum_v n_v logsumexp(z_v) - <sum_{t != v} p_t, z_v>``: one pass a crop.
        ``student_logits`` as a ``Product`` that would be large to multiply out are never held: ``_FusedLoss``.

        Raises:
            ValueError: fewer student than teacher crops, or no pair of different crops.
        """
        fused = isinstance(student_logits, Product)
        b, student_crops = (student_logits.embeddings if fused else student_logits).shape[:2]
        teacher_crops = teacher_logits.shape[1]
        pairs = student_crops * teacher_crops - teacher_crops
        if student_crops < teacher_crops or pairs == 0:
            raise ValueError(
                f"{student_crops} student crops and {teacher_crops} teacher crops give no valid pairs: "
                "the student needs the teacher's crops first, and at least two crops"
            )
        center = self.center_of([teacher_logits], teacher_temp) if center is None else center
        images = chunk_of_images(student_crops, teacher_logits.shape[2], teacher_logits.device)
        if fused and b > images:
            inputs = (*student_logits, teacher_logits, center, teacher_temp, self.student_temp, images)
            total = _FusedLoss.apply(*inputs)
        else:
            logits = student_logits.logits() if fused else student_logits
            targets = teacher_distribution(teacher_logits, center, teacher_temp)  # (b, t, k)
            z = logits.to(targets.dtype) / self.student_temp  # (b, s, k)
            total = _cross_entropy(z, z.logsumexp(-1), targets)
        return total / (pairs * b)  # pyright: ignore[reportOperatorIssue]

    @torch.no_grad()
    def update_center(self, teacher_logits: Float[Tensor, "b t k"]) -> None:
        """Moves the center towards the mean of the teacher's logits over the whole global batch (equation 4).

        A batch with a logit that is not finite leaves the center as it is. Targets by ``sinkhorn`` have none to move.
        """
        if self.targets == "sinkhorn":
            return
        mean = distributed.all_mean(teacher_logits.to(self.center.dtype).mean((0, 1)).unsqueeze(0))  # (1, k)
        moved = self.center * self.center_momentum + mean * (1 - self.center_momentum)
        self.center.copy_(torch.where(mean.isfinite().all(), moved, self.center))

    def remember(self, teacher_logits: Sequence[Float[Tensor, "_ t k"]]) -> None:
        """After a step: puts the logits of the batch, which comes in parts, into the queue, if there is one."""
        recent = getattr(self, "recent", None)  # A loss of one's own may not have called __init__ here.
        if recent is not None:
            recent.add(teacher_logits)
