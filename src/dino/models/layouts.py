"""How others call the tensors of a backbone: one table, and how the backbone of a file is found by it.

A layout is told by the names of a few tensors, under any prefix that a trainer may have put before them. What is left
over inside the backbone must be a head that the layout names; whatever else is left is refused when it is loaded.
"""

import re
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor

from dino.models.conversions import Hints, State, hugging_face, resnet, vit, vit_sizes, xcit
from dino.models.timm_backbone import TimmBackbone, spec
from dino.models.vision_transformer import VisionTransformer
from dino.models.weight_files import Stored


class Layout(NamedTuple):
    name: str  # As messages call it.
    marks: tuple[str, ...]  # Tensors that tell it.
    renames: tuple[tuple[str, str], ...]  # Regular expressions, applied one after the other.
    describe: Callable[[State, Hints], tuple[State, dict[str, Any]]]  # Names of the network, and what builds it.
    hints: Hints = MappingProxyType({})  # Unless the file says otherwise.


class Found(NamedTuple):
    layout: str
    state: State  # Under the names of the network.
    description: dict[str, Any]  # For ``build_described``.
    left: list[str]  # Tensors of the file that the backbone does not need.


# Heads, and what is there for pretraining only: the backbone's output does not depend on them.
_HEADS = re.compile(
    r"(head|heads|head_dist|fc|classifier|pooler|norm_head|decoder\w*|(embeddings\.)?mask_token|local_cls_norm"
    r"|dino_head|ibot_head)(\.|$)"
)
# Wrappers that leave their name inside others' names.
_WRAPPERS = re.compile(r"(^|\.)(?:_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.)+")
_ROLES = {
    "teacher": {"teacher", "momentum", "ema", "target", "k"},
    "student": {"student", "online", "query", "q"},
}


def recognise(stored: Stored, key: str) -> Found:
    """Tells the network of a file that is not ours, and gives its tensors our names.

    ``key``: ``"teacher"`` or ``"student"`` where a file holds both, or the name of the part wanted.

    Raises:
        ValueError: no layout fits, the part wanted is not there or not the only one, or it is ambiguous.
    """
    tensors = {_WRAPPERS.sub(r"\1", name): tensor for name, tensor in stored.tensors.items()}
    if (found := _named(stored, tensors, key)) is not None:
        return found
    fitting: dict[str, Layout] = {}
    for layout in LAYOUTS:
        for prefix in _prefixes(tensors, layout.marks):
            fitting.setdefault(prefix, layout)
    if not fitting:
        kind = stored.says.get("hub", {}).get("model_type") or stored.says.get("arch")
        raise ValueError(
            f"{stored.path} holds no known backbone (a ViT, ResNet or XCiT); "
            f"{f'it calls itself {kind!r}, ' if kind else ''}its keys: {', '.join(list(tensors)[:5])}, ..."
        )
    prefix = _choose(fitting, key, stored.path)
    layout = fitting[prefix]
    state, left = _part(tensors, prefix)
    for pattern, replacement in layout.renames:
        state = {re.sub(pattern, replacement, name): tensor for name, tensor in state.items()}
    try:
        state, description = layout.describe(state, {**layout.hints, **_hints(stored)})
    except (ValueError, KeyError, IndexError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{stored.path} holds a {layout.name} that cannot be read: {reason}") from error
    return Found(layout.name, state, description, left)


def _prefixes(tensors: Mapping[str, Tensor], marks: Iterable[str]) -> list[str]:
    """The prefixes under which all these tensors stand."""
    first, *rest = marks
    ends = [name[: -len(first)] for name in tensors if name == first or name.endswith(f".{first}")]
    return [prefix for prefix in ends if all(prefix + mark in tensors for mark in rest)]


def _choose(prefixes: Iterable[str], key: str, path: Path) -> str:
    """The part of a file that is wanted: of the role asked for, else the only one that has no role."""
    prefixes = list(dict.fromkeys(prefixes))
    if key in _ROLES:
        roles = {prefix: _role(prefix) for prefix in prefixes}
        wanted = [p for p in prefixes if roles[p] == key] or [p for p in prefixes if roles[p] is None]
    else:
        wanted = [p for p in prefixes if key in (p.rstrip("."), *p.split("."))]
    if len(wanted) == 1:
        return wanted[0]
    holds = ", ".join(prefix.rstrip(".") or "the backbone alone" for prefix in prefixes)
    problem = f"has more than one {key!r}" if wanted else f"has no {key!r}"
    raise ValueError(f"{path} {problem} (it holds {holds}): choose another with checkpoint_key (--checkpoint-key)")


def _role(prefix: str) -> str | None:
    words = set(re.split(r"[._]", prefix))
    return next((role for role, names in _ROLES.items() if words & names), None)


def _part(
    tensors: State, prefix: str, keep: Container[str] = (), heads: tuple[str, ...] = ()
) -> tuple[State, list[str]]:
    """The backbone's tensors, and the names of what is left: other parts of the file, and known heads."""
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    state = {
        name: tensor
        for name, tensor in own.items()
        if name in keep or not (_HEADS.match(name) or name.startswith(heads))
    }
    return state, [name for name in tensors if not (name.startswith(prefix) and name.removeprefix(prefix) in state)]


def _hints(stored: Stored) -> dict[str, Any]:
    """What trainers and Hugging Face say about a ViT, beside its tensors."""
    hub, args = stored.says.get("hub", {}), stored.says.get("args", {})
    if hub.get("rope_theta", 100) != 100 or (hub.get("rope_parameters") or {}).get("rope_theta", 100) != 100:
        raise ValueError(f"{stored.path}: a rope_theta other than 100 is not known")
    said = {
        "num_heads": hub.get("num_attention_heads") or args.get("num_heads"),
        "norm_eps": hub.get("layer_norm_eps"),
        "activation": hub.get("hidden_act"),
    }
    return {name: value for name, value in said.items() if value}


def _named(stored: Stored, tensors: State, key: str) -> Found | None:
    """A network of timm that the file or the config.json beside it names, if its tensors are all there."""
    hub, args = stored.says.get("hub", {}), stored.says.get("args", {})
    name = hub.get("architecture") or stored.says.get("arch") or args.get("model") or args.get("arch")
    if not isinstance(name, str) or not timm.is_model(name):
        return None
    options = dict(hub.get("model_args") or {})
    for ours in ("num_classes", "dynamic_img_size"):  # TimmBackbone says them itself.
        options.pop(ours, None)
    cfg = hub.get("pretrained_cfg") or {}
    if cfg.get("fixed_input_size") and cfg.get("input_size"):
        options.setdefault("img_size", cfg["input_size"][-1])
    try:
        with torch.device("meta"):
            network: Any = TimmBackbone(name, **options).model
    except (TypeError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{stored.path}: timm cannot build {spec(name, options)}: {error}") from error
    wanted = network.state_dict().keys()
    prefixes = _prefixes(tensors, wanted)
    if not prefixes:
        return None
    prefix = _choose(prefixes, key, stored.path)
    heads = network.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
    state, left = _part(tensors, prefix, wanted, heads)
    if _is_ours(network):
        hints = {"num_heads": network.blocks[0].attn.num_heads, "norm_eps": network.norm.eps, "pos_offset": 0.0}
        state, description = vit(state, hints)
    else:
        state = {f"model.{name}": tensor for name, tensor in state.items()}
        description = {"backbone": f"timm:{spec(name, options)}"}
    return Found(f"timm {name}", state, description, left)


def _is_ours(network: Any) -> bool:
    """Whether a network of timm is what ``VisionTransformer`` is."""
    if (
        type(network).__name__ != "VisionTransformer"
        or network.no_embed_class
        or network.global_pool not in ("token", "")
    ):
        return False
    act, sizes = network.blocks[0].mlp.act, vit_sizes(network.state_dict()) if network.pos_embed is not None else None
    if sizes is None or not isinstance(act, torch.nn.GELU) or act.approximate != "none":
        return False
    with torch.device("meta"):
        return VisionTransformer(**sizes, num_heads=1).state_dict().keys() == network.state_dict().keys()


_HF = (
    (r"^embeddings\.patch_embeddings\.(?:projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.register_tokens$", "storage_tokens"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.", ""),
    (r"^(?:model\.|encoder\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.(?:attention\.)?(?:query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(?:attention\.)?(?:key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(?:attention\.)?(?:value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"\.mlp\.gate_proj\.", ".mlp.w1."),
    (r"^layernorm\.", "norm."),
)


LAYOUTS = (
    Layout("XCiT", ("cls_attn_blocks.0.norm1.weight",), ((r"^pos_embeder\.", "pos_embed."),), xcit),
    Layout(
        "vision transformer",  # DINO, DINOv2, DINOv3, DeiT, MAE, timm; trained in pieces: blocks.PIECE.BLOCK.
        ("patch_embed.proj.weight", "cls_token"),
        ((r"^blocks\.\d+\.(\d+\.)", r"blocks.\1"), (r"^(register_tokens|register_token)$", "storage_tokens")),
        vit,
    ),
    Layout(
        "vision transformer of Hugging Face",
        ("embeddings.cls_token",),
        _HF,
        hugging_face,
        {"pos_offset": 0.0},  # Positions are resized to exactly the size.
    ),
    Layout(
        "vision transformer of torchvision",
        ("conv_proj.weight", "class_token"),
        (
            (r"^class_token$", "cls_token"),
            (r"^conv_proj\.", "patch_embed.proj."),
            (r"^encoder\.pos_embedding$", "pos_embed"),
            (r"^encoder\.layers\.encoder_layer_", "blocks."),
            (r"\.ln_([12])\.", r".norm\1."),
            (r"\.self_attention\.in_proj_", ".attn.qkv."),
            (r"\.self_attention\.out_proj\.", ".attn.proj."),
            (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
            (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
            (r"^encoder\.ln\.", "norm."),
        ),
        vit,
        {"pos_offset": 0.0},
    ),
    Layout("ResNet", ("layer1.0.conv1.weight",), (), resnet),
    Layout(
        "ResNet as a sequence",  # lightly's examples: torch.nn.Sequential(*list(resnet.children())[:-1]).
        ("0.weight", "1.running_mean", "4.0.conv1.weight"),
        ((r"^0\.", "conv1."), (r"^1\.", "bn1."), *((rf"^{i + 3}\.(\d)", rf"layer{i}.\1") for i in range(1, 5))),
        resnet,
    ),
)
