"""What training changes, as one object: how it is made, and what one step of it is fed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dino.augment.multicrop import Crops
from dino.config import Config
from dino.data.decode import Canvas
from dino.machine import distributed
from dino.machine.randomness import derive_seed, generator
from dino.method.loss import DINOLoss
from dino.method.network import Network, TeacherUpdate, build_networks
from dino.method.optim import make_optimizer

Augment = Callable[..., Crops]  # Of (canvas, generator, *, rank, world_size), as ``MultiCrop``.


@dataclass
class Learner:
    """Everything that training changes."""

    network: Network
    student: nn.Module  # The network, with gradients exchanged when there are several processes.
    teacher: Network
    dino_loss: DINOLoss
    optimizer: Optimizer
    update_teacher: TeacherUpdate
    skipped: Tensor  # (2,): steps skipped in a row, and in all


def make_learner(
    config: Config, device: torch.device, backbone: nn.Module | None = None, loss: DINOLoss | None = None
) -> Learner:
    """Student, teacher, loss and optimizer, from the seed; with the caller's own backbone or loss, if given."""
    torch.manual_seed(derive_seed(config.run.seed, "weights"))
    method = config.method
    student, teacher = build_networks(config, backbone)
    student.to(device).train()
    teacher.to(device).train()  # BatchNorm backbones: the teacher uses the statistics of its own batch.
    if loss is None:
        loss = DINOLoss(config.model.out_dim, method.student_temp, method.center_momentum, method.targets)
    distributed.share_batchnorm(student)
    distributed.share_batchnorm(teacher)
    return Learner(
        network=student,
        student=distributed.parallel(student),
        teacher=teacher,
        dino_loss=loss.to(device),
        optimizer=make_optimizer(config.optim.optimizer, student),
        update_teacher=TeacherUpdate(teacher, student),
        skipped=torch.zeros(2, device=device),
    )


def make_parts(
    learner: Learner, augment: Augment, canvas: Canvas, config: Config, step: int
) -> Iterator[tuple[Crops, list[Tensor | None] | None]]:
    """The parts of one process's rows of batch ``step``, with randomness drawn for the whole global batch."""
    count = config.run.accumulate
    rows = len(canvas.sizes) // count
    world_size = distributed.world_size() * count
    for i in range(count):
        rank = distributed.rank() * count + i
        part = Canvas(*(tensor[i * rows : (i + 1) * rows] for tensor in canvas))
        crops = augment(part, generator(config.run.seed, "crops", step), rank=rank, world_size=world_size)
        drops = generator(config.run.seed, "drop path", step)
        # For backbones that draw from torch's own generator.
        torch.manual_seed(derive_seed(config.run.seed, f"network {rank}", step))
        yield crops, learner.network.draw_drop_path(crops, drops, rank, world_size)


def is_finite(learner: Learner) -> bool:
    """Whether all that a checkpoint would hold is finite (reads back to the host)."""
    tensors = [*learner.network.state_dict().values(), *learner.teacher.state_dict().values()]
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())
