"""A backbone by its name."""

from typing import Any

import torch
from torch import nn

from dino.config import ModelConfig
from dino.models.timm_backbone import TimmBackbone, parse
from dino.models.vision_transformer import VisionTransformer, vit_base, vit_large, vit_nano, vit_small, vit_tiny

VITS = {
    "vit_nano": vit_nano,
    "vit_tiny": vit_tiny,
    "vit_small": vit_small,
    "vit_base": vit_base,
    "vit_large": vit_large,
}


def build_backbone(config: ModelConfig, img_size: int, in_chans: int = 3) -> nn.Module:
    """A new backbone, by its name in the configuration.

    ``img_size``: side in pixels of the images it is trained on; sets the table of positions of the ViTs here.
    ``in_chans``: channels of the images.

    Raises:
        ValueError: the name is unknown; says what there is.
    """
    if config.backbone in VITS:
        return VITS[config.backbone](
            patch_size=config.patch_size,
            img_size=img_size,
            in_chans=in_chans,
            drop_path_rate=config.drop_path,
            pos_offset=config.pos_offset,
        )
    if config.backbone.startswith("vit("):
        return _vit(parse(config.backbone)[1], drop_path_rate=config.drop_path)
    if config.backbone.startswith("timm:"):
        name = config.backbone.removeprefix("timm:")
        options: dict[str, Any] = {} if in_chans == 3 else {"in_chans": in_chans}
        return TimmBackbone(name, drop_path_rate=config.drop_path, **options)
    raise ValueError(f"--model.backbone {config.backbone!r} is unknown: one of {', '.join(VITS)}, or timm:NAME")


def build_described(description: dict[str, Any]) -> nn.Module:
    """The backbone that a file of weights describes: a ``VisionTransformer`` on the meta device, its tensors not yet
    there; a network of timm with new ones.

    Raises:
        ValueError: the description does not describe a backbone.
    """
    name = description["backbone"]
    if name.startswith("timm:"):
        return TimmBackbone(name.removeprefix("timm:"))
    if "embed_dim" not in description:
        raise ValueError(f"a network of the caller's own ({name}) was trained: build it, and read its tensors into it")
    with torch.device("meta"):  # Without the initialisation, which takes longer than the reading.
        return _vit({key: value for key, value in description.items() if key != "backbone"})


def _vit(sizes: dict[str, Any], **options: Any) -> VisionTransformer:
    eps = sizes.get("norm_eps")
    try:
        backbone = VisionTransformer(**{key: value for key, value in sizes.items() if key != "norm_eps"}, **options)
    except TypeError as error:
        raise ValueError(f"{sizes} describes no vision transformer: {error}") from error
    for module in backbone.modules():
        if eps is not None and isinstance(module, nn.LayerNorm):
            module.eps = eps
    return backbone
