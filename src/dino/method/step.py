"""The training step: algorithm 1 of the paper, on one screen."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dino.augment.multicrop import Crops
from dino.config import OptimConfig
from dino.machine import distributed, sharding
from dino.method.learner import Learner
from dino.method.optim import clip_gradients, set_schedule, step_unless
from dino.method.schedules import Now


class Outputs(NamedTuple):
    """What a step leaves on the device, for the monitors."""

    loss: Tensor
    teacher_features: list[Tensor]  # (b, t, d), of every part of this process's rows
    teacher_logits: list[Tensor]  # (b, t, k)
    center: Tensor  # (1, k), the one that the loss was computed with
    terms: dict[str, Tensor]  # What each of the learner's terms adds to the loss.


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

    Nothing is read back to the host (but for Muon: ``MuonAndAdamW``). A step whose loss or gradients are not finite
    leaves the student as it is.
    """
    student, teacher, dino_loss, optimizer = learner.student, learner.teacher, learner.dino_loss, learner.optimizer
    set_schedule(optimizer, now.lr, now.weight_decay, now.backbone_share)
    optimizer.zero_grad(set_to_none=True)

    def teach(crops: Crops, drop_path: list[Tensor | None] | None) -> tuple[Any, ...]:
        with torch.no_grad(), autocast:
            features = teacher.features(crops.global_crops)  # (b, t, d)
            return crops, drop_path, features, teacher.head(features)  # (b, t, k)

    taught, center = (teach(*part) for part in parts), dino_loss.center.clone()
    if dino_loss.targets == "sinkhorn":  # Solved for this batch: the teacher sees all of it before the student.
        taught = list(taught)
        center = dino_loss.center_of([logits for *_, logits in taught], now.teacher_temp)
    losses, teacher_features, teacher_logits = [], [], []
    terms = {name: torch.zeros_like(center[0, 0]) for name in learner.terms}
    for i, (crops, drop_path, features, logits) in enumerate(taught):
        with distributed.without_sync(student, skip=i + 1 < part_count):
            with autocast:
                student_logits, student_features = student(*crops, drop_path=drop_path, features=True)  # (b, s, k or d)
                added = {
                    n: term(crops.global_crops, student_features) / part_count for n, term in learner.terms.items()
                }
            loss = dino_loss(student_logits, logits, now.teacher_temp, center) / part_count  # float32
            del student_logits, student_features  # Or the backward pass finds no room.
            sum(added.values(), loss).backward()
        losses.append(loss.detach())
        terms = {name: terms[name] + value.detach() for name, value in added.items()}
        teacher_features.append(features)
        teacher_logits.append(logits)

    loss = distributed.all_mean(torch.stack(losses).sum())
    sharding.take_gradients(student.parameters())
    grad_norms = clip_gradients(map(sharding.of, student.parameters()), optim.clip, optim.clip_mode)
    if freeze_last_layer:
        for parameter in learner.network.head.last_layer.parameters():
            sharding.of(parameter).grad = None  # So that neither the gradient, nor weight decay, nor momentum moves it.
    bad = (~(loss.isfinite() & grad_norms.isfinite().all())).float()
    step_unless(bad, optimizer)
    learner.update_teacher(now.teacher_momentum)
    dino_loss.update_center(torch.cat([logits.mean((0, 1), keepdim=True) for logits in teacher_logits]))
    dino_loss.remember(teacher_logits)
    learner.skipped.mul_(torch.stack([bad, torch.ones_like(bad)])).add_(bad)
    terms = {name: distributed.all_mean(value) for name, value in terms.items()}
    return Outputs(loss, teacher_features, teacher_logits, center, terms)
