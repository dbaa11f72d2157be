"""Which tensor was the first to stop being finite, and what to do about it."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino.config import Config
from dino.data.decode import Canvas
from dino.machine import sharding
from dino.method.learner import Augment, Learner, make_parts
from dino.run import checkpoint


def blame(
    learner: Learner,
    augment: Augment,
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
            if not first and not sharding.whole(tensor).isfinite().all():
                first.append(f"the parameter {role}.{name}")
    # Before the forward pass, which puts shares together.
    grads = [(name, sharding.of(parameter).grad) for name, parameter in learner.network.named_parameters()]
    hooks = [
        module.register_forward_hook(watch(f"{role}.{name}"))
        for role, network in (("teacher", learner.teacher), ("student", learner.network))
        for name, module in network.named_modules()
        if name
    ]
    if not first:
        with torch.compiler.set_stance("force_eager"), torch.no_grad(), autocast:  # Compiled blocks would hide hooks.
            for crops, drop_path in make_parts(learner, augment, canvas, config, step):
                learner.teacher(crops.global_crops)
                learner.network(*crops, drop_path=drop_path)
    for hook in hooks:
        hook.remove()
    for name, grad in grads:
        if not first and grad is not None and not grad.isfinite().all():
            first.append(f"the gradient of student.{name}")
    saved = checkpoint.checkpoints(out / "checkpoints")
    return (
        f"stopped at step {step + 1}, {int(learner.skipped[0])} steps in a row without a finite loss; first bad "
        f"tensor: {first[0] if first else 'the loss itself'}. "
        f"Last good checkpoint: {saved[-1] if saved else 'none yet'}. "
        "Lower --optim.base-lr, lengthen --optim.warmup, set --optim.clip, or use --run.precision float32"
    )
