"""Low-rank adapters (LoRA, arXiv 2106.09685) by peft: the student's alone; the teacher is an ordinary network."""

import re
from typing import Any

import torch
from torch import nn

from dino.method.network import TeacherUpdate

LORA_RANK = 8
# Of the linear layers in the blocks, as this package and timm call them.
_TARGETS = r"(.*\.)?blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))"


def add_lora(backbone: nn.Module, rank: int) -> None:
    """Puts adapters on all linear layers of the blocks, in place; only they are trained from then on.

    Raises:
        ValueError: peft is not installed, or the backbone has no such layers.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ValueError("--train lora needs peft: pip install 'dino-ssl[lora]'") from None
    if not any(re.fullmatch(_TARGETS, name) for name, _ in backbone.named_modules()):
        raise ValueError(f"--train lora: {type(backbone).__name__} has no blocks with linear layers to put adapters on")
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=_TARGETS), backbone)


class LoraTeacherUpdate(TeacherUpdate):
    """The teacher's update from a student with adapters: towards its weights with the adapters merged into them.

    So the teacher has plain weights at any moment, those that a merged student would have given it.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        from peft.tuners.lora import LoraLayer

        layers: dict[str, Any] = {name: m for name, m in student.named_modules() if isinstance(m, LoraLayer)}
        plain = {name.replace(".base_layer.", "."): p for name, p in student.named_parameters()}
        names = [name for name, _ in teacher.named_parameters()]
        self._teacher = [p.data for p in teacher.parameters()]
        self._student = [plain[name].data for name in names]
        self._adapted = [
            (i, layers[name.removesuffix(".weight")])
            for i, name in enumerate(names)
            if name.removesuffix(".weight") in layers
        ]

    @torch.no_grad()
    def __call__(self, momentum: float) -> None:
        student = list(self._student)
        for i, layer in self._adapted:
            student[i] = student[i] + layer.get_delta_weight("default")
        torch._foreach_lerp_(self._teacher, student, 1.0 - momentum)  # pyright: ignore[reportPrivateImportUsage]
