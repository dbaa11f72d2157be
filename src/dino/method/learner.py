"""What training changes, as one object: how it is made, saved, resumed, and asked what went wrong."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dino.augment.multicrop import Crops, MultiCrop
from dino.config import Config
from dino.data.decode import Canvas
from dino.machine import distributed
from dino.machine.randomness import derive_seed, generator
from dino.method.loss import DINOLoss
from dino.method.network import Network, TeacherUpdate, build_networks
from dino.method.optim import make_optimizer
from dino.run import checkpoint


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


def make_learner(config: Config, device: torch.device) -> Learner:
    """Student, teacher, loss and optimizer, initialised from the seed."""
    torch.manual_seed(derive_seed(config.run.seed, "weights"))
    student, teacher = build_networks(config)
    student.to(device).train()
    teacher.to(device).train()  # BatchNorm backbones: the teacher uses the statistics of its own batch.
    distributed.share_batchnorm(student)
    distributed.share_batchnorm(teacher)
    return Learner(
        network=student,
        student=distributed.parallel(student),
        teacher=teacher,
        dino_loss=DINOLoss(config.model.out_dim, config.method.student_temp, config.method.center_momentum).to(device),
        optimizer=make_optimizer(config.optim.optimizer, student),
        update_teacher=TeacherUpdate(teacher, student),
        skipped=torch.zeros(2, device=device),
    )


def make_parts(
    learner: Learner, multicrop: MultiCrop, canvas: Canvas, config: Config, step: int
) -> Iterator[tuple[Crops, list[Tensor | None] | None]]:
    """The parts of one process's rows of batch ``step``, with randomness drawn for the whole global batch."""
    count = config.run.accumulate
    rows = len(canvas.sizes) // count
    world_size = distributed.world_size() * count
    for i in range(count):
        rank = distributed.rank() * count + i
        part = Canvas(*(tensor[i * rows : (i + 1) * rows] for tensor in canvas))
        crops = multicrop(part, generator(config.run.seed, "crops", step), rank=rank, world_size=world_size)
        drops = generator(config.run.seed, "drop path", step)
        # For backbones that draw from torch's own generator.
        torch.manual_seed(derive_seed(config.run.seed, f"network {rank}", step))
        yield crops, learner.network.draw_drop_path(crops, drops, rank, world_size)


def is_finite(learner: Learner) -> bool:
    """Whether all that a checkpoint would hold is finite (reads back to the host)."""
    tensors = [*learner.network.state_dict().values(), *learner.teacher.state_dict().values()]
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())


def save_learner(learner: Learner, out: Path, config: Config, done: int, images: int) -> None:
    """Writes a checkpoint, whole or not at all, by the first process; the last ``run.keep`` stay."""
    if distributed.is_main():
        state = {
            "config": config.to_json(),
            "step": done,
            "images": images,
            "student": learner.network.state_dict(),
            "teacher": learner.teacher.state_dict(),
            "dino_loss": learner.dino_loss.state_dict(),
            "optimizer": learner.optimizer.state_dict(),
            "skipped": learner.skipped,
        }
        checkpoint.save(out / "checkpoints", done, state, config.run.keep)
    distributed.barrier()


def resume(learner: Learner, out: Path, config: Config, images: int) -> int:
    """Puts the newest checkpoint of the run folder into the learner and returns the number of steps done.

    Raises:
        ValueError: the run was started with other settings (of those that change the result) or on other images.
    """
    state = checkpoint.load_latest(out / "checkpoints")
    if state is None:
        if (out / "backbone.safetensors").exists():
            raise ValueError(f"--out {out} holds a finished model but no checkpoints: use another folder")
        return 0
    before, now = Config.from_json(state["config"]).flat(), config.flat()
    only_speed = {"data.cache", "data.workers", *(f"run.{name}" for name in vars(config.run) if name != "seed")}
    changed = [
        f"--{name.replace('_', '-')} {before[name]} -> {now[name]}"
        for name in now
        if name not in only_speed and now[name] != before[name]
    ]
    if changed:
        raise ValueError(
            f"--out {out} holds a run with other settings ({', '.join(changed)}): "
            "give the settings it was started with, or another --out"
        )
    if state["images"] != images:  # An epoch would have another length, and with it every schedule.
        raise ValueError(f"--out {out} holds a run on {state['images']} images, DATA has {images}: use another --out")
    learner.network.load_state_dict(state["student"])
    learner.teacher.load_state_dict(state["teacher"])
    learner.dino_loss.load_state_dict(state["dino_loss"])
    learner.optimizer.load_state_dict(state["optimizer"])
    learner.skipped.copy_(state["skipped"])
    return state["step"]


def blame(
    learner: Learner,
    multicrop: MultiCrop,
    canvas: Canvas,
    config: Config,
    step: int,
    autocast: AbstractContextManager,
    out: Path,
) -> str:
    """Finds the first tensor that is not finite, in the order of computation, and says what to do."""
    first: list[str] = []

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not first and any(isinstance(t, Tensor) and not t.isfinite().all() for t in tensors):
                first.append(f"the output of {name}")

        return hook

    # The student's parameters first: the teacher's follow them.
    for role, network in (("student", learner.network), ("teacher", learner.teacher)):
        for name, tensor in network.state_dict().items():
            if not first and not tensor.isfinite().all():
                first.append(f"the parameter {role}.{name}")
    hooks = [
        module.register_forward_hook(watch(f"{role}.{name}"))
        for role, network in (("teacher", learner.teacher), ("student", learner.network))
        for name, module in network.named_modules()
        if name
    ]
    if not first:
        with torch.compiler.set_stance("force_eager"), torch.no_grad(), autocast:  # Compiled blocks would hide hooks.
            for crops, drop_path in make_parts(learner, multicrop, canvas, config, step):
                learner.teacher(crops.global_crops)
                learner.network(*crops, drop_path=drop_path)
    for hook in hooks:
        hook.remove()
    for name, parameter in learner.network.named_parameters():
        if not first and parameter.grad is not None and not parameter.grad.isfinite().all():
            first.append(f"the gradient of student.{name}")
    saved = checkpoint.checkpoints(out / "checkpoints")
    return (
        f"stopped at step {step + 1}, {int(learner.skipped[0])} steps in a row without a finite loss; first bad "
        f"tensor: {first[0] if first else 'the loss itself'}. "
        f"Last good checkpoint: {saved[-1] if saved else 'none yet'}. "
        "Lower --optim.base-lr, lengthen --optim.warmup, set --optim.clip, or use --run.precision float32"
    )
