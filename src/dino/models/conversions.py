"""What turns the tensors of a known layout into those of a network here, and says what builds that network.

A plain vision transformer becomes ours; what has registers, layer scale, gates or rotary positions (DINOv2, DINOv3)
becomes timm's, with sizes read off the tensors.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dino.models.timm_backbone import spec

State = dict[str, Tensor]
Hints = Mapping[str, Any]
"""What the file says about the network: ``num_heads``, ``norm_eps``, ``pos_offset``, ``activation``."""

# Blocks per stage, and whether they are bottlenecks.
RESNETS: dict[tuple[tuple[int, ...], bool], str] = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}
XCIT_SIZES = {128: "nano", 192: "tiny", 384: "small", 512: "medium", 768: "large"}  # By width.


def vit_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The sizes of a ``VisionTransformer``, read off its tensors."""
    embed_dim, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
    return {
        "img_size": math.isqrt(state["pos_embed"].shape[1] - 1) * patch_size,
        "patch_size": patch_size,
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / embed_dim,
    }


_EXTRAS = re.compile(
    r"^(storage_tokens|reg_token|dist_token|fc_norm\.|norm_pre\.)|\.(ls1\.|gamma_1$|q_norm\.|w12\.|w1\.|fc1_g\.)"
)


def _is_plain(state: Mapping[str, Tensor]) -> bool:
    """Whether ``VisionTransformer`` is the network: none of the parts that came after the first ViT."""
    return {"pos_embed", "blocks.0.attn.qkv.bias"} <= state.keys() and not any(map(_EXTRAS.search, state))


def vit(state: State, hints: Hints) -> tuple[State, dict[str, Any]]:
    """A vision transformer under timm's names: ours where nothing but the first ViT's parts are there, else timm's."""
    state = _joined(state)
    embed_dim = state["cls_token"].shape[-1]
    heads = _heads(embed_dim, hints, plain="storage_tokens" not in state and "reg_token" not in state)
    if _is_plain(state):
        extras = {name: hints[name] for name in ("norm_eps", "pos_offset") if name in hints}
        return state, {"backbone": "vit", **vit_sizes(state), "num_heads": heads, **extras}
    rotary = "pos_embed" not in state
    state = _dinov3(state) if rotary else _dinov2(state)
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    patch_size = state["patch_embed.proj.weight"].shape[-1]
    gated = "blocks.0.mlp.fc1_g.weight" in state
    first, second = (state[f"blocks.0.mlp.{name}.weight"] for name in ("fc1_g" if gated else "fc1", "fc2"))
    packed = not gated and first.shape[0] == 2 * second.shape[1]
    options: dict[str, Any] = {
        "patch_size": patch_size,
        "in_chans": state["patch_embed.proj.weight"].shape[1],
        "embed_dim": embed_dim,
        "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "num_heads": heads,
        "mlp_ratio": first.shape[0] / embed_dim,
    }
    # timm's own name for each family; the sizes come from the tensors.
    if rotary:
        name = "vit_small_plus_patch16_dinov3" if gated else "vit_small_patch16_dinov3"
        options |= {"num_reg_tokens": registers, "qkv_bias": "blocks.0.attn.q_bias" in state, "img_size": 224}
        eps = 1e-5
    else:
        prefix_tokens = (2 if "dist_token" in state else 1) + registers
        positions, name = state["pos_embed"].shape[1], "vit_small_patch16_224"
        if "dist_token" in state:
            name = "deit_small_distilled_patch16_224"
        elif packed:
            name = "vit_giant_patch14_dinov2"
        if math.isqrt(positions) ** 2 == positions:  # No positions of the [CLS] token and the registers.
            options["no_embed_class"], prefix_tokens = True, 0
        options["img_size"] = math.isqrt(positions - prefix_tokens) * patch_size
        options |= {"reg_tokens": registers} if registers else {}
        options |= {"init_values": 1.0} if "blocks.0.ls1.gamma" in state else {}
        options |= {"qkv_bias": False} if "blocks.0.attn.qkv.bias" not in state else {}
        options |= {"qk_norm": True} if "blocks.0.attn.q_norm.weight" in state else {}
        options |= {"global_pool": "avg"} if "fc_norm.weight" in state else {}
        eps = 1e-6
    if abs(hints.get("norm_eps", eps) - eps) > eps * 1e-3:
        options["norm_eps"] = hints["norm_eps"]
    return {f"model.{name}": t for name, t in state.items()}, {"backbone": f"timm:{spec(name, options)}"}


def _heads(embed_dim: int, hints: Hints, plain: bool) -> int:
    heads = hints.get("num_heads")
    if heads is None:  # All of the literature has heads of 64 channels, but for the largest.
        heads = 16 if embed_dim == 1280 and plain else embed_dim // 64 if embed_dim <= 1536 else 0
    if not heads or embed_dim % heads:
        raise ValueError(f"it does not say how many heads its {embed_dim} channels have")
    return heads


def _joined(state: State) -> State:
    """Queries, keys and values as the one matrix that most networks have; gates likewise."""
    joined = {name: tensor for name, tensor in state.items() if not re.search(r"\.attn\.[kv]\.", name)}
    for name in [name for name in joined if ".attn.q." in name]:
        keys, values = (state.get(name.replace(".attn.q.", f".attn.{letter}.")) for letter in "kv")
        if values is None or (keys is None and not name.endswith(".bias")):
            raise ValueError(f"queries without keys and values: {name}")
        queries = joined.pop(name)  # DINOv3's keys have no bias.
        parts = [queries, torch.zeros_like(queries) if keys is None else keys, values]
        joined[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
    return joined


def _dinov2(state: State) -> State:
    """DINOv2: registers without positions, a gated MLP as one matrix."""
    for name in [name for name in state if re.search(r"\.mlp\.w1\.", name)]:
        state[name.replace(".w1.", ".w12.")] = torch.cat([state.pop(name), state.pop(name.replace(".w1.", ".w2."))])
    state = {name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): t for name, t in state.items()}
    if "storage_tokens" in state:
        state["reg_token"] = state.pop("storage_tokens")
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    return state


def _dinov3(state: State) -> State:
    """DINOv3: rotary positions, which are computed; queries and values may have a bias, keys have none."""
    head_dims = state.pop("rope_embed.periods", None)
    if head_dims is not None:
        expected = 100.0 ** torch.linspace(0, 1, len(head_dims) + 1)[:-1]
        if not torch.allclose(head_dims.float(), expected, rtol=0.02):
            raise ValueError("its rotary positions have a base other than 100")
    masks = {name: state.pop(name) for name in list(state) if name.endswith(".qkv.bias_mask")}
    for name in [name for name in state if name.endswith(".attn.qkv.bias")]:
        bias = state.pop(name)
        mask = masks.get(f"{name}_mask")
        queries, keys, values = (bias if mask is None else torch.where(mask == 0, 0.0, bias)).chunk(3)
        if keys.any():
            raise ValueError(f"keys with a bias: {name}")
        state |= {name.replace("qkv.bias", "q_bias"): queries, name.replace("qkv.bias", "v_bias"): values}
    renames = {".ls1.gamma": ".gamma_1", ".ls2.gamma": ".gamma_2"}
    renames |= {".mlp.w1.": ".mlp.fc1_g.", ".mlp.w2.": ".mlp.fc1_x.", ".mlp.w3.": ".mlp.fc2."}
    for old, new in renames.items():
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    if "storage_tokens" in state:
        state["reg_token"] = state.pop("storage_tokens")
    return state


def resnet(state: State, hints: Hints) -> tuple[State, dict[str, Any]]:  # noqa: ARG001
    stages = tuple(
        sum(re.fullmatch(rf"layer{i}\.\d+\.conv1\.weight", k) is not None for k in state) for i in range(1, 5)
    )
    name = RESNETS.get((stages, "layer1.0.conv3.weight" in state))
    if name is None:
        raise ValueError(f"its stages of {stages} blocks are no known ResNet's")
    return {f"model.{key}": tensor for key, tensor in state.items()}, {"backbone": f"timm:{name}"}


def xcit(state: State, hints: Hints) -> tuple[State, dict[str, Any]]:  # noqa: ARG001
    """timm's names: the positions are called differently, and class attention keeps q, k and v apart."""
    width = state["cls_token"].shape[-1]
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    patch_size = 2 ** len(
        {name.split(".")[2] for name in state if re.match(r"patch_embed\.proj\.\d+\.0\.weight", name)}
    )
    renamed = {}
    for name, tensor in state.items():
        if "cls_attn_blocks" in name and ".qkv." in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed["model." + name.replace(".qkv.", f".{letter}.")] = part
        else:
            renamed["model." + name] = tensor
    return renamed, {"backbone": f"timm:xcit_{XCIT_SIZES.get(width, width)}_{depth}_p{patch_size}_224"}


def hugging_face(state: State, hints: Hints) -> tuple[State, dict[str, Any]]:
    gated, rotary = any(".mlp.w1." in name for name in state), "pos_embed" not in state
    known = "silu" if gated and rotary else "gelu"  # DINOv2's gates are always silu.
    if (activation := hints.get("activation", known)) != known and (rotary or not gated):
        raise ValueError(f"its activation is {activation!r} instead of {known!r}")
    up, down = ("w2", "w3") if gated else ("fc1", "fc2")
    state = {name.replace(".up_proj.", f".{up}.").replace(".down_proj.", f".{down}."): t for name, t in state.items()}
    if "storage_tokens" in state and not state["storage_tokens"].shape[1]:
        del state["storage_tokens"]
    if _is_plain(_joined(state)):  # The default of ViTConfig; DINOv2 and DINOv3 have that of their authors.
        hints = {"norm_eps": 1e-12, **hints}
    return vit(state, hints)
