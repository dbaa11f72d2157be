"""Backbone and projection head joined, the momentum teacher, and its update (section 3.1, algorithm 1)."""

import copy
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dino.config import Config, Preprocessing
from dino.machine import device as hardware
from dino.machine import private_calls, sharding
from dino.models.backbone import as_backbone
from dino.models.build import build_backbone
from dino.models.head import DINOHead
from dino.models.products import Product


class Network(nn.Module):
    """g = h o f: a backbone f and a projection head h (section 3.1).

    Args:
        backbone: gives ``Tokens`` and has ``embed_dim``; what else ``Backbone`` has it is given.
        head: from (..., embed_dim) to (..., out_dim).
    """

    def __init__(self, backbone: nn.Module, head: DINOHead) -> None:
        super().__init__()
        self.backbone = as_backbone(backbone)
        self.head = head

    def features(
        self, *crops: Float[Tensor, "b _ c _ _"], drop_path: list[Tensor | None] | None = None
    ) -> Float[Tensor, "b s d"]:
        """The class tokens of all crops.

        Args:
            crops: groups of crops of one resolution each, (B, n, C, H, W); empty groups are passed over.
            drop_path: for each group the stochastic-depth multipliers (``draw_drop_path``), or None.
        """
        groups = [group for group in crops if group.shape[1]]
        images = [group.flatten(0, 1) for group in groups]
        masks = [mask for mask in drop_path or [] if mask is not None]
        tokens = self.backbone.cls_tokens(images, masks or None)  # pyright: ignore[reportCallIssue]
        return torch.cat([x.unflatten(0, group.shape[:2]) for x, group in zip(tokens, groups, strict=True)], 1)

    def forward(
        self, *crops: Float[Tensor, "b _ c _ _"], drop_path: list[Tensor | None] | None = None, features: bool = False
    ) -> Product | tuple[Product, Float[Tensor, "b s d"]]:
        """The logits (b, s, k) of all crops over the K prototypes, not multiplied out; with ``features`` the class
        tokens too."""
        tokens = self.features(*crops, drop_path=drop_path)
        logits = self.head.product(tokens)
        return (logits, tokens) if features else logits

    def draw_drop_path(
        self, crops: tuple[Tensor, ...], generator: torch.Generator, rank: int = 0, world_size: int = 1
    ) -> list[Tensor | None]:
        """Stochastic depth for the rows of one process, drawn for the whole global batch: any number of processes
        drops the same.

        A timm backbone draws its own (from torch's global generator): its entry is None.
        """
        masks: list[Tensor | None] = []
        for group in crops:
            b, n = group.shape[:2]
            draw: Any = self.backbone.sample_drop_path
            mask = draw(world_size * b * n, generator) if n else None  # (depth, 2, world b n)
            if mask is not None:
                mask = hardware.upload(mask[..., rank * b * n : (rank + 1) * b * n], group.device)
            masks.append(mask)
        return masks


def build_networks(
    config: Config, own: nn.Module | None = None, initial: Mapping[str, Tensor] | None = None
) -> tuple[Network, Network]:
    """Student and teacher: the same architecture, the teacher an exact copy (head too) without drop path and without
    gradient.

    ``own``: the student's backbone, that the caller built; the teacher's is a copy of it, drop path and all.
    ``initial``: weights that both backbones begin with, in place of random ones.

    Raises:
        ValueError: ``own`` is no backbone.
    """
    model = config.model
    if own is not None and not isinstance(getattr(own, "embed_dim", None), int):
        raise ValueError(
            f"the backbone, a {type(own).__name__}, has no embed_dim: a backbone has that number, and its forward "
            "gives dino.Tokens (dino.TimmBackbone wraps any network of timm)"
        )

    def build(drop_path: float, own: Any) -> Network:
        backbone: Any = own
        if own is None:
            backbone = build_backbone(
                dataclasses.replace(model, drop_path=drop_path),
                config.crops.global_size,
                Preprocessing.of(config).channels,
            )
        head = DINOHead(
            backbone.embed_dim,
            model.out_dim,
            use_bn=model.use_bn,
            norm_last_layer=model.norm_last_layer,
            nlayers=model.head_layers,
            hidden_dim=model.hidden_dim,
            bottleneck_dim=model.bottleneck_dim,
        )
        return Network(backbone, head)

    student, teacher = build(model.drop_path, own), build(0.0, copy.deepcopy(own))
    if initial is not None:
        student.backbone.load_state_dict(initial)
    teacher.load_state_dict(student.state_dict())
    return student, teacher.requires_grad_(False)


def has_batchnorm(module: nn.Module) -> bool:
    """Whether what a network gives for one image depends on the others of the batch."""
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


def shard_network(network: Network) -> None:
    """Shares out the parameters of a student over the processes: each block by itself, then what is left."""
    for block in getattr(getattr(network.backbone, "model", network.backbone), "blocks", ()):
        sharding.shard(block, *(["of_first"] if hasattr(block, "of_first") else []))
    sharding.shard(network.backbone, "cls_tokens")
    sharding.shard(network.head, "product")


def compile_blocks(network: Network, **options: Any) -> None:
    """Compiles the repeated part of the network in place: the blocks of a vision transformer, a timm model as a whole.

    All blocks share their code, so it is compiled once. ``options`` go to ``torch.compile``.
    """
    blocks: Any = getattr(network.backbone, "blocks", None)
    if blocks is None:
        network.backbone.compile(**options)
        return
    for block in blocks:
        block.compile(**options)
        block.of_first = torch.compile(block.of_first, **options)


def recompute_blocks(network: Network) -> None:
    """Keeps only what goes into each block, and works it out again in the backward pass: the same gradients in less
    memory (activation checkpointing).

    Raises:
        ValueError: a timm network that has no such option.
    """
    blocks: Any = getattr(network.backbone, "blocks", None)
    if blocks is not None:
        for block in blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        return
    option = getattr(getattr(network.backbone, "model", None), "set_grad_checkpointing", None)
    if option is None:
        raise ValueError(f"--run.recompute: {type(network.backbone).__name__} has no blocks to work twice")
    option(True)


class TeacherUpdate:
    """theta_t <- lambda theta_t + (1 - lambda) theta_s (section 3.1), over parameters; buffers are each network's own.

    Keeps the two lists of tensors, so that one update is one fused operation.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        self._teacher = [p.data for p in teacher.parameters()]
        self._student = [p.data for p in student.parameters()]

    @torch.no_grad()
    def __call__(self, momentum: float) -> None:
        private_calls.lerp_(self._teacher, self._student, 1.0 - momentum)


class ShardedTeacherUpdate(TeacherUpdate):
    """The same from a student that is shared out over the processes: each of its parameters is put together for it.

    The teacher is whole in every process: it has neither gradients nor optimizer state, and is evaluated as it is.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        self._pairs = list(zip(teacher.parameters(), student.parameters(), strict=True))

    @torch.no_grad()
    def __call__(self, momentum: float) -> None:
        for ours, theirs in self._pairs:
            ours.lerp_(sharding.whole(theirs), 1.0 - momentum)


def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """One exponential-moving-average update of the teacher (``TeacherUpdate`` for many)."""
    TeacherUpdate(teacher, student)(momentum)
