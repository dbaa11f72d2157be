"""A ``ViTModel`` folder of transformers, with its image processor."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dino.machine.files import whole_file, write_text
from dino.models.conversions import vit_sizes
from dino.models.exported import Exported, Outputs, has, installed, plain_vit
from dino.models.weights import Weights, cpu_state


def to_hugging_face(weights: Weights, out: Path) -> Exported:
    vit, shown = plain_vit(weights.backbone, "hf"), weights.preprocessing
    sizes = vit_sizes(vit.state_dict())
    hidden = vit.state_dict()["blocks.0.mlp.fc1.weight"].shape[0]
    config = {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": sizes["depth"],
        "num_attention_heads": vit.num_heads,
        "intermediate_size": hidden,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": vit.norm.eps,
        "image_size": sizes["img_size"],
        "patch_size": vit.patch_size,
        "num_channels": vit.in_chans,
        "qkv_bias": True,
        "pooler_output_size": vit.embed_dim,
        "pooler_act": "tanh",
        "dtype": "float32",
    }
    processor = {
        "image_processor_type": "BitImageProcessor",  # The one that resizes the shorter side and cuts out the middle.
        "do_convert_rgb": shown.channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": shown.resize},
        "resample": 3,  # Bicubic.
        "do_center_crop": True,
        "crop_size": {"height": shown.size, "width": shown.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(shown.mean),
        "image_std": list(shown.std),
    }
    with whole_file(out / "model.safetensors") as partial:
        save_file(_hugging_face_names(cpu_state(vit)), partial, metadata={"format": "pt"})
    write_text(out / "config.json", json.dumps(config, indent=2) + "\n")
    write_text(out / "preprocessor_config.json", json.dumps(processor, indent=2) + "\n")

    def reopen() -> Callable[[Tensor], Outputs]:
        import transformers

        network = transformers.AutoModel.from_pretrained(out.resolve()).eval()

        @torch.no_grad()
        def run(images: Tensor) -> Outputs:
            x = network(pixel_values=images, interpolate_pos_encoding=True).last_hidden_state
            return x[:, 0], x[:, 1:]

        return run

    usage = (
        "from transformers import AutoImageProcessor, AutoModel\n\n"
        f'processor = AutoImageProcessor.from_pretrained("{out.name}")\n'
        f'model = AutoModel.from_pretrained("{out.name}")\n'
        'cls_token = model(**processor(image, return_tensors="pt")).last_hidden_state[:, 0]'
    )
    notes = ["ViTModel has a pooler, which DINO has not: it is the identity with a tanh; read last_hidden_state"]
    files = [out / name for name in ("config.json", "model.safetensors", "preprocessor_config.json")]
    return Exported(
        files, installed("transformers"), usage, reopen if has("transformers") else None, notes, "transformers"
    )


def _hugging_face_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``ViTModel``'s names, queries, keys and values apart; its pooler is the identity."""
    renames = (
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^cls_token$", "embeddings.cls_token"),
        (r"^pos_embed$", "embeddings.position_embeddings"),
        (r"^norm\.", "layernorm."),
        (r"^blocks\.", "encoder.layer."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    )
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        if ".attn.qkv." in name:
            for word, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[name.replace(".attn.qkv.", f".attention.attention.{word}.")] = part.contiguous()
        else:
            renamed[name] = tensor
    d = state["cls_token"].shape[-1]
    return renamed | {"pooler.dense.weight": torch.eye(d), "pooler.dense.bias": torch.zeros(d)}
