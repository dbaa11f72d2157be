"""What training changes, as one object: how it is made, and what one step of it is fed."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dino.augment.multicrop import Crops
from dino.config import Config, MethodConfig, parse_duration
from dino.data.decode import Canvas
from dino.machine import distributed, sharding
from dino.machine.randomness import derive_seed, generator
from dino.method.layers import layered_groups, train_last
from dino.method.lora import LORA_RANK, LoraTeacherUpdate, add_lora
from dino.method.loss import DINOLoss
from dino.method.network import (
    Network,
    ShardedTeacherUpdate,
    TeacherUpdate,
    build_networks,
    has_batchnorm,
    shard_network,
)
from dino.method.optim import make_optimizer
from dino.method.terms import CodingRate, Pull

Term = Callable[[Tensor, Tensor], Tensor]  # Of (global crops, the student's features): ``terms.py``.
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
    began_from: str = ""  # Digest of the weights that training began from; empty: random ones.
    terms: dict[str, Term] = field(default_factory=dict)  # Added to the loss, by the name that they are logged under.
    part_count: int = 1  # Pieces that a process works its rows of a batch in.


def make_learner(
    config: Config,
    device: torch.device,
    backbone: nn.Module | None = None,
    loss: DINOLoss | None = None,
    initial: Mapping[str, Tensor] | None = None,
) -> Learner:
    """Student, teacher, loss and optimizer, from the seed; with the caller's own backbone or loss, if given.

    ``initial``: weights that the backbones begin with.

    Raises:
        ValueError: settings that do not fit the backbone, or each other.
    """
    torch.manual_seed(derive_seed(config.run.seed, "weights"))
    method, adapt = config.method, config.adapt
    student, teacher = build_networks(config, backbone, initial)
    what, _, number = adapt.train.partition(" ")
    if what == "last":
        train_last(student.backbone, int(number))
    elif what == "lora":
        add_lora(student.backbone, int(number or LORA_RANK))
    student.to(device).train()
    teacher.to(device).train()  # BatchNorm backbones: the teacher uses the statistics of its own batch.
    if loss is None:
        loss = DINOLoss(config.model.out_dim, method.student_temp, method.center_momentum, method.targets, method.queue)
    distributed.share_batchnorm(student)
    distributed.share_batchnorm(teacher)
    shared_out = config.run.shard and distributed.world_size() > 1
    if shared_out:
        shard_network(student)
    terms: dict[str, Term] = {"pull": Pull(teacher.backbone, adapt.pull)} if adapt.pull else {}
    if method.coding_rate:
        terms["coding_rate"] = CodingRate(method.coding_rate)
    layered = adapt.layer_decay < 1 or parse_duration(adapt.warm_head)[0] > 0
    return Learner(
        network=student,
        student=student if shared_out else distributed.parallel(student),
        teacher=teacher,
        dino_loss=loss.to(device),
        optimizer=make_optimizer(
            config.optim.optimizer, student, layered_groups(student, adapt.layer_decay) if layered else None
        ),
        update_teacher=(LoraTeacherUpdate if what == "lora" else ShardedTeacherUpdate if shared_out else TeacherUpdate)(
            teacher, student
        ),
        skipped=torch.zeros(2, device=device),
        terms=terms,
        part_count=1 if in_one_piece(student, method) else config.run.accumulate,
    )


def in_one_piece(student: Network, method: MethodConfig) -> str | None:
    """What keeps a batch from being worked on in parts, for its statistics are those of the whole; None: nothing."""
    if has_batchnorm(student):  # Of each layer: all of the batch must have come through the layer before.
        return "a network with BatchNorm"
    return "--method.coding-rate" if method.coding_rate else None


def make_parts(
    learner: Learner, augment: Augment, canvas: Canvas, config: Config, step: int
) -> Iterator[tuple[Crops, list[Tensor | None] | None]]:
    """The parts of one process's rows of batch ``step``, with randomness drawn for the whole global batch."""
    count = learner.part_count
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
    finite = torch.stack([sharding.rows(tensor).isfinite().all() for tensor in tensors]).all()
    return not distributed.any_process(not finite)[0]
