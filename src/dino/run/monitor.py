"""Is this run healthy? Measures collapse (section 5.3, figure 7) and names it while there is time to act."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dino.evaluation.metrics import entropy, rankme
from dino.machine import distributed
from dino.method.loss import teacher_distribution

# A sign must show in this many readings in a row before it is believed: every run begins close to ln K.
PATIENCE = 5
# Readings before this step say nothing yet.
GRACE_STEPS = 100
LOST_RANK = 0.5  # Of the highest effective rank so far: a run that learns keeps or gains it (docs/learning.md).
STARVED = 0.25  # Prototypes for every image of a batch.
FEW = 8  # Images, or a rank, that say nothing yet.
_MORE_EVEN = "Use prototypes alike: --method.targets sinkhorn; or raise --method.teacher-temp, lower --optim.base-lr"


@torch.no_grad()
def measure(
    loss: Float[Tensor, ""],
    teacher_features: Sequence[Float[Tensor, "_ t d"]],
    teacher_logits: Sequence[Float[Tensor, "_ t k"]],
    center: Float[Tensor, "1 k"],
    teacher_temp: float,
) -> dict[str, Tensor]:
    """The monitors of one global batch, each a number on the device; nothing is read back to the host.

    A batch comes in parts, and every process has its own: the numbers are those of all of them together.

    ``center``: the one that the loss was computed with.

    Returns:
        ``teacher_entropy``: mean over crops, in nats; ``teacher_entropy_ratio``: over ln K (1: uniform, 0: one-hot);
        ``kl``: mean KL divergence of student from teacher, the loss less the entropy (section 5.3);
        ``prototypes_used``: prototypes that are the most likely one of some crop of this batch;
        ``prototypes_share``: those over the number of images, or K where that is smaller (a teacher sure of every
        image, and that its crops belong together, has 1);
        ``center_norm``: length of the center; ``feature_std``: spread of the unit-length class tokens over images
        (1: even over all dimensions, 0: all the same); ``rankme``: effective rank of the class tokens.
    """
    entropies, used = [], torch.zeros_like(center[0])
    for logits in teacher_logits:
        p = teacher_distribution(logits, center, teacher_temp)
        entropies.append(entropy(p).mean())
        used.scatter_(0, p.argmax(-1).flatten(), 1.0)
    teacher_entropy = distributed.all_mean(torch.stack(entropies).mean())
    used = distributed.all_gather(used).amax(0).sum()
    images = sum(len(part) for part in teacher_features) * distributed.world_size()
    features = distributed.all_gather(torch.cat([part.flatten(0, 1) for part in teacher_features]).float()).flatten(
        0, 1
    )
    features = torch.where(features.isfinite(), features, 0.0)
    spread = F.normalize(features, dim=-1).std(0, correction=0).square().sum().sqrt()
    return {
        "loss": loss,
        "teacher_entropy": teacher_entropy,
        "teacher_entropy_ratio": teacher_entropy / math.log(center.shape[-1]),
        "kl": loss - teacher_entropy,
        "prototypes_used": used,
        "prototypes_share": used / min(images, center.shape[-1]),
        "center_norm": center.norm(),
        "feature_std": spread,
        "rankme": rankme(features),
    }


class CollapseWatch:
    """Reads the monitors and says which collapse a run is in, or on its way to, once for each kind.

    Section 5.3: without sharpening the teacher's output becomes uniform (entropy ln K, KL 0); without centering one
    prototype takes everything (entropy 0, KL 0). Before that the class tokens lose rank and few prototypes take all:
    a run that goes on then learns little (docs/learning.md).
    """

    def __init__(self, out_dim: int) -> None:
        self._log_k = math.log(out_dim)
        self._seen = {"uniform": 0, "single": 0, "features": 0, "rank": 0, "prototypes": 0}
        self._named: set[str] = set()
        self._highest_rank = 0.0

    def __call__(self, step: int, values: dict[str, float]) -> str | None:
        """A warning that names the collapse and the setting to change, or None."""
        if math.isfinite(values["rankme"]):
            self._highest_rank = max(self._highest_rank, values["rankme"])
        if step < GRACE_STEPS:
            return None
        ratio, loss, kl = values["teacher_entropy_ratio"], values["loss"], values["kl"]
        could_be = values["prototypes_used"] / max(values["prototypes_share"], 1e-9)
        signs = {
            "uniform": ratio > 0.995 and abs(loss / self._log_k - 1) < 0.01,
            # A student that agrees with a teacher sure of many prototypes has learnt all there is.
            "single": ratio < 0.01 and kl < 0.05 * self._log_k and values["prototypes_used"] <= 2,
            "features": values["feature_std"] < 0.02,
            "rank": values["rankme"] < LOST_RANK * self._highest_rank and self._highest_rank > FEW,
            # Of a teacher that is sure of nothing, the most likely prototype says nothing.
            "prototypes": values["prototypes_share"] < STARVED and ratio < 0.5 and could_be > FEW,
        }
        for kind, sign in signs.items():
            self._seen[kind] = self._seen[kind] + 1 if sign else 0
        kind = next((k for k, count in self._seen.items() if count >= PATIENCE and k not in self._named), None)
        self._named |= {kind} if kind else set()
        if kind == "uniform":
            return (
                f"step {step}: collapse to the uniform distribution: the loss sits at ln K = {self._log_k:.2f} and the "
                f"teacher gives every prototype the same weight (entropy {ratio:.3f} ln K). Sharpen the teacher: lower "
                "--method.teacher-temp or lengthen --method.warmup-teacher-temp-for; --model.use-bn helps short runs"
            )
        if kind == "single":
            return (
                f"step {step}: collapse to a single prototype: the teacher's entropy is {ratio:.3f} ln K. Center more: "
                "lower --method.center-momentum (0.9 follows the batches), or raise --method.teacher-temp"
            )
        if kind == "features":
            return (
                f"step {step}: collapse of the features: all images give the same class token (spread "
                f"{values['feature_std']:.3f} of 1). Lower --optim.base-lr, or raise --method.teacher-momentum"
            )
        if kind == "rank":
            return (
                f"step {step}: the features lose rank: the effective rank of a batch fell from "
                f"{self._highest_rank:.1f} to {values['rankme']:.1f}. {_MORE_EVEN}"
            )
        if kind == "prototypes":
            return (
                f"step {step}: prototypes starve: {values['prototypes_used']:.0f} of them take all images of a batch, "
                f"{values['prototypes_share']:.2f} an image. {_MORE_EVEN}"
            )
        return None
