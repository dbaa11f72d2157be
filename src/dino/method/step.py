"""The training step: algorithm 1 of the paper, on one screen."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from dino.augment.multicrop import Crops
from dino.config import OptimConfig
from dino.machine import distributed
from dino.method.learner import Learner
from dino.method.optim import clip_gradients, set_schedule
from dino.method.schedules import Now


class Outputs(NamedTuple):
    """What a step leaves on the device, for the monitors."""

    loss: Tensor
    teacher_features: Tensor  # (b, t, d), of the last part of the batch
    teacher_logits: Tensor  # (b, t, k)
    center: Tensor  # (1, k), the one that the loss was computed with


def train_step(
    learner: Learner,
    parts: Iterable[tuple[Crops, list[Tensor | None] | None]],
    part_count: int,
    now: Now,
    optim: OptimConfig,
    autocast: AbstractContextManager,
    freeze_last_layer: bool,
) -> Outputs:
    """One step of algorithm 1 on a batch that comes in parts, each its crops and drop-path masks.

    Nothing is read back to the host. A step whose loss or gradients are not finite leaves the student as it is.
    """
    student, teacher, dino_loss, optimizer = learner.student, learner.teacher, learner.dino_loss, learner.optimizer
    set_schedule(optimizer, now.lr, now.weight_decay)
    optimizer.zero_grad(set_to_none=True)
    losses, centers = [], []
    for i, (crops, drop_path) in enumerate(parts):
        with distributed.without_sync(student, skip=i + 1 < part_count):
            with autocast:
                with torch.no_grad():
                    teacher_features = teacher.features(crops.global_crops)  # (b, t, d)
                    teacher_logits = teacher.head(teacher_features)  # (b, t, k)
                student_logits = student(*crops, drop_path=drop_path)  # (b, s, k), not multiplied out
            loss = dino_loss(student_logits, teacher_logits, now.teacher_temp) / part_count  # float32, outside autocast
            del student_logits  # Or the backward pass finds no room.
            loss.backward()
        losses.append(loss.detach())
        centers.append(teacher_logits.mean((0, 1), keepdim=True))  # (1, 1, k)

    loss = distributed.all_mean(torch.stack(losses).sum())
    grad_norms = clip_gradients(student.parameters(), optim.clip, optim.clip_mode)
    if freeze_last_layer:
        for parameter in learner.network.head.last_layer.parameters():
            parameter.grad = None  # So that neither the gradient, nor weight decay, nor momentum moves it.
    bad = (~(loss.isfinite() & grad_norms.isfinite().all())).float()
    optimizer.found_inf = bad  # torch's fused optimizers and LARS do nothing where it is 1.  # pyright: ignore
    optimizer.step()
    learner.update_teacher(now.teacher_momentum)
    outputs = Outputs(loss, teacher_features, teacher_logits, dino_loss.center.clone())
    dino_loss.update_center(torch.cat(centers))
    learner.skipped.mul_(torch.stack([bad, torch.ones_like(bad)])).add_(bad)
    return outputs
