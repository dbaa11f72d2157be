"""A folder that ``timm.create_model("local-dir:...")`` opens."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from dino.machine.files import whole_file, write_text
from dino.models.conversions import vit_sizes
from dino.models.exported import Exported, Outputs, plain_vit
from dino.models.timm_backbone import TimmBackbone, parse
from dino.models.weights import Weights, cpu_state, describe


def to_timm(weights: Weights, out: Path) -> Exported:
    backbone, shown = weights.backbone, weights.preprocessing
    notes, header = [], {"format": "pt"}
    if isinstance(backbone, TimmBackbone):
        architecture, options = parse(backbone.name)
        state, eps = cpu_state(backbone.model), options.pop("norm_eps", None)
        pool = getattr(backbone.model, "global_pool", "avg")
        pool = pool if isinstance(pool, str) else "avg"
        if getattr(backbone.model, "dynamic_img_size", False):
            options["dynamic_img_size"] = True
    else:
        vit = plain_vit(backbone, "timm")
        options: dict[str, Any] = {**vit_sizes(vit.state_dict()), "num_heads": vit.num_heads}
        architecture = f"vit_{_NAMES.get((vit.embed_dim, len(vit.blocks)), 'small')}_patch{vit.patch_size}_224"
        architecture = architecture if timm.is_model(architecture) else "vit_small_patch16_224"
        options |= {"dynamic_img_size": True, "global_pool": "token"}
        state, eps, pool = cpu_state(vit), None if vit.norm.eps == 1e-6 else vit.norm.eps, "token"
        # timm looks at the tensors alone; dino.load finds its own network again.
        header["dino"] = json.dumps({**describe(vit), "preprocessing": dataclasses.asdict(shown)})
    if eps is not None:
        notes.append(f"timm's layer norms add 1e-6 to the variance, this network's {eps:g}: config.json cannot say it")
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": backbone.embed_dim,
        "global_pool": pool,
        "model_args": {**options, "num_classes": 0},
        "pretrained_cfg": {
            "tag": "dino",
            "custom_load": False,
            "input_size": [shown.channels, shown.size, shown.size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": shown.size / shown.resize,
            "crop_mode": "center",
            "mean": list(shown.mean),
            "std": list(shown.std),
            "num_classes": 0,
        },
    }
    with whole_file(out / "model.safetensors") as partial:
        save_file(state, partial, metadata=header)
    write_text(out / "config.json", json.dumps(config, indent=2) + "\n")

    def reopen() -> Callable[[Tensor], Outputs]:
        network = timm.create_model(f"local-dir:{out.resolve()}", pretrained=True).eval()
        return lambda images: _of_timm(network, images)

    usage = (
        f'import timm\n\nmodel = timm.create_model("local-dir:{out.name}", pretrained=True).eval()\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
    )
    files = [out / "config.json", out / "model.safetensors"]
    return Exported(files, f"timm {timm.__version__}", usage, reopen, notes, "timm")


_NAMES = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large"}


@torch.no_grad()
def _of_timm(network: Any, images: Tensor) -> Outputs:
    x = network.forward_features(images)
    if x.ndim == 4:
        maps = x if getattr(network, "output_fmt", "NCHW") == "NHWC" else x.permute(0, 2, 3, 1)
        return network.forward_head(x, pre_logits=True), maps.flatten(1, 2)
    has_cls_token = getattr(network, "cls_token", None) is not None
    pooled = x[:, 0] if has_cls_token else network.forward_head(x, pre_logits=True)
    return pooled, x[:, getattr(network, "num_prefix_tokens", 0) :]
