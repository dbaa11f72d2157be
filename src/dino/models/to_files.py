"""The released layout, and ours."""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dino.config import ModelConfig
from dino.machine.files import whole_file
from dino.models.exported import Exported, Outputs, outputs, plain_vit
from dino.models.timm_backbone import TimmBackbone, parse
from dino.models.weights import Weights, cpu_state, load, save_backbone


def to_reference(weights: Weights, out: Path) -> Exported:
    backbone, notes = weights.backbone, []
    state = cpu_state(backbone)
    if isinstance(backbone, TimmBackbone):
        name, options = parse(backbone.name)
        if not re.fullmatch(r"resnet(18|34|50|101|152)(\..*)?", name) or options:
            raise ValueError(f"timm:{backbone.name} has no released layout: the ViTs and plain ResNets have one")
        state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
        usage = "model = torchvision.models.resnet50(weights=None)\nmodel.fc = torch.nn.Identity()\n"
        usage = f'import torch, torchvision\n\n{usage}model.load_state_dict(torch.load("{out.name}"))'
    else:
        vit = plain_vit(backbone, "reference")
        usual = 16 if vit.embed_dim == 1280 else vit.embed_dim // 64
        if vit.num_heads != usual:
            raise ValueError(
                f"the released layout does not say the number of heads: readers would take {usual}, this network has "
                f"{vit.num_heads}; use --to safetensors or --to timm"
            )
        if vit.pos_offset != 0.1 or vit.norm.eps != 1e-6:
            notes.append(
                "the released layout says neither how positions are resized (readers add 0.1, this network "
                f"{vit.pos_offset:g}) nor what layer norms add to the variance (1e-6; {vit.norm.eps:g})"
            )
        usage = f'import torch\n\nvit_small(patch_size={vit.patch_size}).load_state_dict(torch.load("{out.name}"))'
    with whole_file(out) as partial:
        torch.save(state, partial)

    def reopen() -> Callable[[Tensor], Outputs]:
        again = load(out)
        return lambda images: outputs(again, images)

    return Exported([out], "dino.load, as a released file", usage, reopen, notes, "pytorch")


def to_safetensors(weights: Weights, out: Path) -> Exported:
    save_backbone(weights.backbone, out, ModelConfig(backbone="vit"), weights.preprocessing)

    def reopen() -> Callable[[Tensor], Outputs]:
        again = load(out)
        return lambda images: outputs(again, images)

    return Exported([out], "dino.load", f'import dino\n\nbackbone = dino.load("{out.name}")', reopen, [], "dino-ssl")
