"""The layers of a backbone in order: which are trained, and how fast each is."""

import re
from typing import Any

from timm.models import group_parameters
from torch import nn

from dino.models.timm_backbone import TimmBackbone


def layer_numbers(backbone: nn.Module) -> dict[str, int]:
    """For every parameter the number of its layer: 0 makes the tokens, 1 is the first block, the last number the last
    block and the norm after it. A timm model says it itself; a network without blocks is one layer.

    >>> from dino.models.vision_transformer import VisionTransformer
    >>> numbers = layer_numbers(VisionTransformer(img_size=8, patch_size=8, embed_dim=4, depth=2, num_heads=1))
    >>> numbers["pos_embed"], numbers["blocks.0.norm1.weight"], numbers["blocks.1.norm1.weight"], numbers["norm.bias"]
    (0, 1, 2, 2)
    """
    names = [name for name, _ in backbone.named_parameters()]
    if isinstance(backbone, TimmBackbone):
        model = backbone.model
        found: Any = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
        return {name: found[name.removeprefix("model.")] for name in names}
    blocks = {name: re.match(r"blocks\.(\d+)\.", name) for name in names}
    last = max((1 + int(match[1]) for match in blocks.values() if match), default=0)
    return {
        name: 1 + int(match[1]) if match else last if name.startswith("norm.") else 0 for name, match in blocks.items()
    }


def train_last(backbone: nn.Module, count: int) -> None:
    """Only the last ``count`` blocks (and the norm after them) keep their gradients.

    Raises:
        ValueError: the backbone has no so many.
    """
    numbers = layer_numbers(backbone)
    last = max(numbers.values())
    if count > last:
        raise ValueError(f"--train 'last {count}' is not allowed: the backbone has {last} blocks")
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(numbers[name] > last - count)


def layered_groups(network: nn.Module, decay: float) -> list[dict]:
    """Parameter groups of a network of a ``backbone`` and something on it, for ``set_schedule``: each layer of the
    backbone has ``decay`` times the learning rate of the next one, the first of all that is on it.

    As in ``parameter_groups``, weight decay leaves out biases and 1-D tensors, and frozen parameters are left out.
    """
    numbers = layer_numbers(network.backbone)  # pyright: ignore[reportArgumentType]
    top = max(numbers.values()) + 1
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        of_backbone = name.startswith("backbone.")
        layer = numbers.get(name.removeprefix("backbone."), top) if of_backbone else top
        decayed = not (parameter.ndim == 1 or name.endswith(".bias"))
        new = {"params": [], "decayed": decayed, "of_backbone": of_backbone, "scale": decay ** (top - layer)}
        groups.setdefault((layer, decayed), new | ({} if decayed else {"weight_decay": 0.0}))["params"].append(
            parameter
        )
    return list(groups.values())
