"""lightly's DINO for ``learning.py``: its loss, head and crops, as its documentation puts them together.

The network, crop sizes, batch, number of steps, optimizer and schedules of learning rate, weight decay and teacher are
those of our variant beside it; lightly's are the loss (center, teacher temperature
0.04), the head and how crops are made.
Computed in float32, as its documentation does; one piece, which begins again where it was killed.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from dino.config import Config, Preprocessing
from dino.method.optim import set_schedule
from dino.method.schedules import Schedules
from dino.models.build import build_backbone
from dino.models.weights import save_backbone


def trained_by_lightly(data: Path, out: Path, config: Config, _: float | None = None) -> dict[str, Any]:
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import get_weight_decay_parameters, update_momentum
    from lightly.transforms import DINOTransform

    crops, model, batch = config.crops, config.model, config.optim.batch_size
    torch.manual_seed(config.run.seed)

    def build() -> tuple[Any, Any]:
        backbone: Any = build_backbone(model, crops.global_size, 3).train()
        sizes = backbone.embed_dim, model.hidden_dim, model.bottleneck_dim, model.out_dim
        return backbone, DINOProjectionHead(*sizes, batch_norm=False, freeze_last_layer=1)

    (student, head), (teacher, teacher_head) = build(), build()
    for own, other in ((student, teacher), (head, teacher_head)):
        other.load_state_dict(own.state_dict())
        other.requires_grad_(False)
    criterion = DINOLoss(model.out_dim, teacher_temp=0.04, warmup_teacher_temp_epochs=0)
    decayed, free = get_weight_decay_parameters([student, head])
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": free, "weight_decay": 0.0}], lr=0.0, fused=True)

    transform = DINOTransform(
        crops.global_size,
        global_crop_scale=crops.global_scale,
        local_crop_size=crops.local_size,
        local_crop_scale=crops.local_scale,
        n_local_views=crops.local_count,
        # Stronger colours are its default; these are the paper's, as ours.
        cj_strength=0.5,
        cj_bright=0.8,
        cj_contrast=0.8,
        cj_sat=0.4,
        cj_hue=0.2,
        sigmas=crops.blur_sigma,
    )
    loader = DataLoader(ImageFolder(str(data / "train"), transform), batch, shuffle=True, drop_last=True)
    schedules = Schedules(config, len(loader))
    views_of = (views for _ in range(schedules.total_steps // len(loader) + 1) for views, _ in loader)

    def logits(backbone: nn.Module, head: nn.Module, views: list[Any]) -> list[Any]:
        sides = sorted({view.shape[-1] for view in views}, reverse=True)
        groups = [torch.cat([view for view in views if view.shape[-1] == side]) for side in sides]
        return list(head(torch.cat([backbone(group).cls_token for group in groups])).chunk(len(views)))

    used, spent, began = 0, time.process_time(), time.perf_counter()
    for step in range(schedules.total_steps):
        now = schedules.at(step)
        set_schedule(optimizer, now.lr, now.weight_decay)
        update_momentum(student, teacher, m=now.teacher_momentum)
        update_momentum(head, teacher_head, m=now.teacher_momentum)
        views = next(views_of)
        with torch.no_grad():
            targets = logits(teacher, teacher_head, views[: crops.global_count])
        loss = criterion(targets, logits(student, head, views), epoch=step // len(loader))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*student.parameters(), *head.parameters()], config.optim.clip)
        head.cancel_last_layer_gradients(current_epoch=0 if step < schedules.freeze_steps else 1)
        optimizer.step()
        used = len(torch.cat(targets).argmax(-1).unique())
    out.mkdir(parents=True, exist_ok=True)
    save_backbone(teacher, out / "backbone.safetensors", model, Preprocessing.of(config))
    measured = {
        "cpu_seconds": round(time.process_time() - spent, 1),
        "wall_seconds": round(time.perf_counter() - began, 1),
        "steps_timed": schedules.total_steps,
        "prototypes_used": float(used),
    }
    (out / "lightly.json").write_text(json.dumps(measured))
    return measured
