"""What every layout of others answers once it is written, and what their writers share."""

import importlib.util
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dino.models.timm_backbone import TimmBackbone
from dino.models.vision_transformer import VisionTransformer

Outputs = tuple[Tensor, Tensor]  # The [CLS] token (b, d), and the patch tokens (b, patches, d).


class Exported(NamedTuple):
    """What was written, and how it is opened again."""

    files: list[Path]
    tool: str  # That opens them.
    usage: str  # Lines of Python that do.
    open: Callable[[], Callable[[Float[Tensor, "b c h w"]], Outputs]] | None  # None: the tool is not installed.
    notes: list[str]  # What this layout does not say.
    library: str  # As the front matter of a model card calls it.
    one_size: bool = False  # Of images.


@torch.no_grad()
def outputs(backbone: nn.Module, images: Float[Tensor, "b c h w"]) -> Outputs:
    """What a backbone here gives, as ``Exported.open``'s result gives it."""
    tokens = backbone(images)
    return tokens.cls_token, tokens.patch_tokens.flatten(1, 2)


def difference(ours: Outputs, theirs: Outputs) -> float:
    """The largest between two readings of the same weights."""
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"outputs of another shape: {tuple(b.shape)} for {tuple(a.shape)}")
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def plain_vit(backbone: nn.Module, target: str) -> VisionTransformer:
    if isinstance(backbone, VisionTransformer):
        return backbone
    name = f"timm:{backbone.name}" if isinstance(backbone, TimmBackbone) else type(backbone).__name__
    raise ValueError(f"{name} is no plain vision transformer, which --to {target} writes: use --to timm or --to onnx")


def patch_of(backbone: nn.Module) -> int:
    return int(backbone.patch_size)  # pyright: ignore[reportArgumentType]


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def installed(package: str) -> str:
    return f"{package} {version(package)}" if has(package) else package
