"""Every known weight file becomes a backbone: the released weights, our files, the checkpoints of both.

All reading of weights and all renaming of keys is here. Nothing in a file is ever executed: pickles are read with
``weights_only`` and a short list of harmless types.
"""

import argparse
import dataclasses
import hashlib
import http.client
import json
import math
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dino.config import Config, ModelConfig, Preprocessing
from dino.models.build import build_backbone, build_described
from dino.models.vision_transformer import VisionTransformer

RELEASED_URL = "https://dl.fbaipublicfiles.com/dino/"
RELEASED = {
    "dino_vits16": "dino_deitsmall16_pretrain",
    "dino_vits8": "dino_deitsmall8_pretrain",
    "dino_vitb16": "dino_vitbase16_pretrain",
    "dino_vitb8": "dino_vitbase8_pretrain",
    "dino_resnet50": "dino_resnet50_pretrain",
    "dino_xcit_small_12_p16": "dino_xcit_small_12_p16_pretrain",
    "dino_xcit_small_12_p8": "dino_xcit_small_12_p8_pretrain",
    "dino_xcit_medium_24_p16": "dino_xcit_medium_24_p16_pretrain",
    "dino_xcit_medium_24_p8": "dino_xcit_medium_24_p8_pretrain",
}

# Blocks per stage, and whether they are bottlenecks.
RESNETS: dict[tuple[tuple[int, ...], bool], str] = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}
XCIT_SIZES = {128: "nano", 192: "tiny", 384: "small", 512: "medium", 768: "large"}  # By width.

# The reference keeps its options as a Namespace and learning rates as numpy scalars, under numpy 1's or 2's name.
_SCALAR: Any = type(np.float64(0)).__reduce__(np.float64(0))[0]
_SAFE_TYPES: list[Any] = [
    argparse.Namespace,
    np.dtype,
    type(np.dtype(np.float64)),
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
]


def save_backbone(
    backbone: nn.Module,
    path: Path | str,
    config: ModelConfig,
    preprocessing: Preprocessing | int,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Writes the weights as safetensors, with all that ``load`` needs to build the backbone in the header.

    The file appears whole or not at all. ``preprocessing``: how it is shown images, which travels along; a number
    stands for the paper's at this size in pixels. ``extra``: more strings for the header's metadata.
    """
    if isinstance(preprocessing, int):
        preprocessing = Preprocessing.at(preprocessing, channels=getattr(backbone, "in_chans", 3))
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    description: dict[str, Any] = {"backbone": config.backbone, "img_size": preprocessing.size}
    description["preprocessing"] = dataclasses.asdict(preprocessing)
    if isinstance(backbone, VisionTransformer):
        description |= _vit_sizes(state) | {"num_heads": backbone.num_heads, "pos_offset": backbone.pos_offset}
    temporary = Path(f"{path}.tmp{os.getpid()}")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file(state, temporary, metadata={**(extra or {}), "format": "pt", "dino": json.dumps(description)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(name_or_path: str | Path, device: str | torch.device = "cpu", checkpoint_key: str = "teacher") -> nn.Module:
    """Loads a pretrained backbone, in eval mode and without drop path.

    Takes the name of released weights (``dino_vits16``, ``dino_resnet50``, ...), a run folder, a file of
    ``save_backbone``, a checkpoint of ours or of the reference implementation, its backbone-only files, or a URL of
    any of these files. Downloads are kept in torch.hub's folder. ``checkpoint_key``: ``"teacher"`` or ``"student"``,
    where a file holds both.

    Raises:
        ValueError: there is no such name or file, it holds no known weights, its keys or shapes do not fit (lists
            them), or reading it would execute code.
        ConnectionError: the download failed; says where the file can be put by hand.
    """
    return load_with_preprocessing(name_or_path, device, checkpoint_key)[0]


def load_with_preprocessing(
    name_or_path: str | Path, device: str | torch.device = "cpu", checkpoint_key: str = "teacher"
) -> tuple[nn.Module, Preprocessing]:
    """As ``load``, with how the backbone is shown images: what its file says, else what its run's configuration says,
    else the paper's evaluations at the size it was trained on."""
    path = _locate(name_or_path)
    state, description = _read(path, checkpoint_key)
    if isinstance(description, Config):
        preprocessing = Preprocessing.of(description)
        model = dataclasses.replace(description.model, drop_path=0.0)
        backbone = build_backbone(model, description.crops.global_size)
    else:
        preprocessing = _preprocessing(description, path)
        backbone = build_described(description)
    _check_keys(backbone, state, path)
    backbone.load_state_dict(state)
    return backbone.to(device).eval(), preprocessing


def _preprocessing(description: dict[str, Any], path: Path) -> Preprocessing:
    if (stored := description.pop("preprocessing", None)) is not None:
        return Preprocessing.from_dict(stored)
    beside = path.parent / "config.json"
    # Runs of version 0.1 said it in their configuration only.
    if path.name == "backbone.safetensors" and beside.is_file() and '"crops"' in (text := beside.read_text("utf-8")):
        return Preprocessing.of(Config.from_json(text))
    return Preprocessing.at(description.get("img_size", 224), channels=description.get("in_chans", 3))


def load_linear(name_or_path: str | Path) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """A linear classifier's weight (c, f), bias (c) and description (empty for released ones), from a file or URL.

    Raises:
        ValueError: the file holds no linear classifier.
    """
    path = _locate(name_or_path)
    description: dict[str, Any] = {}
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                description = json.loads((file.metadata() or {}).get("dino_probe", "{}"))
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
    else:
        content = _unpickle(path)
        state = content.get("state_dict", content) if isinstance(content, dict) else {}
    state = {name.removeprefix("module.").removeprefix("linear."): tensor for name, tensor in state.items()}
    if state.keys() != {"weight", "bias"} or state["weight"].ndim != 2:
        raise ValueError(f"{path} holds no linear classifier (linear.weight, linear.bias): {', '.join([*state][:5])}")
    return state["weight"], state["bias"], description


# Finding the file.


def _locate(name_or_path: str | Path) -> Path:
    name = str(name_or_path)
    if name in RELEASED:
        stem = RELEASED[name]
        return _download(f"{RELEASED_URL}{stem}/{stem}.pth", f"{stem}.pth")
    if name.startswith(("https://", "http://", "file://")):
        # The address is part of the cached name: many files are called backbone.safetensors.
        tag = hashlib.blake2b(name.encode(), digest_size=4).hexdigest()
        return _download(name, f"{tag}-{name.split('?')[0].rsplit('/', 1)[-1]}")
    path = Path(name_or_path)
    if path.is_dir():
        kinds = ("step_*.safetensors", "*.pt")
        checkpoints = [file for kind in kinds for file in (path / "checkpoints").glob(kind)]
        checkpoints.sort(key=lambda p: (p.stat().st_mtime_ns, p.name))
        found = [p for p in [path / "backbone.safetensors", *reversed(checkpoints)] if p.is_file()]
        if not found:
            raise ValueError(f"the folder {path} holds neither backbone.safetensors nor checkpoints")
        return found[0]
    if not path.is_file():
        raise ValueError(
            f"{name!r} is neither a file, a run folder, a URL, nor released weights: {', '.join(RELEASED)}"
        )
    return path


def _download(url: str, filename: str) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / filename
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(f"could not download {url} ({error}); put the file at {path} by hand") from error
    return path


# Reading it.


def _read(path: Path, checkpoint_key: str) -> tuple[dict[str, Tensor], Config | dict[str, Any]]:
    """The backbone's tensors under our names, and what is needed to build it."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
        if "dino_checkpoint" in metadata:  # Of a run: all its tensors by their path, and the rest as JSON.
            config = dict(json.loads(metadata["dino_checkpoint"])["dict"])["config"]
            prefix = f"{checkpoint_key}."
            own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
            return _strip(own), Config.from_json(config)
        return (state, json.loads(metadata["dino"])) if "dino" in metadata else _reference(state, path, {})
    content = _unpickle(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not weights")
    if isinstance(config := content.get("config"), str):
        return _strip(_part(content, checkpoint_key, path)), Config.from_json(config)
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return _reference(content, path, {})
    return _reference(_part(content, checkpoint_key, path), path, getattr(content.get("args"), "__dict__", {}))


def _unpickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_SAFE_TYPES):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, UnicodeError) as error:
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(f"{path} is refused: reading it would execute code ({code[1]})") from error
        raise ValueError(f"{path} is not a file of weights (.pt, .pth or .safetensors), or is damaged") from error


def _part(content: dict[str, Any], key: str, path: Path) -> dict[str, Tensor]:
    parts = [name for name, value in content.items() if isinstance(value, dict)]
    if key not in parts:
        raise ValueError(
            f"{path} has no {key!r} (it holds {', '.join(map(str, content))}): choose another checkpoint_key"
        )
    return content[key]


def _strip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone of a network: without the head, and without the prefixes of wrappers."""
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if any(name.startswith("backbone.") for name in state):
        return {name.removeprefix("backbone."): t for name, t in state.items() if name.startswith("backbone.")}
    return {name: tensor for name, tensor in state.items() if not name.startswith(("head.", "fc."))}


def _reference(
    state: Mapping[str, Tensor], path: Path, args: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tells the architecture from the tensors of a file that does not say it, and gives them our names."""
    state = _strip(state)
    if "cls_attn_blocks.0.norm1.weight" in state:
        return _xcit(state)
    if "layer1.0.conv1.weight" in state:
        stages = tuple(
            sum(re.fullmatch(rf"layer{i}\.\d+\.conv1\.weight", k) is not None for k in state) for i in range(1, 5)
        )
        name = RESNETS.get((stages, "layer1.0.conv3.weight" in state))
        if name is None:
            raise ValueError(f"{path} holds a ResNet of {stages} blocks, which is not known")
        return {f"model.{key}": tensor for key, tensor in state.items()}, {"backbone": f"timm:{name}"}
    if not {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"} <= state.keys():
        raise ValueError(
            f"{path} holds no known backbone (a ViT, ResNet or XCiT); its keys: {', '.join(list(state)[:5])}, ..."
        )
    sizes = _vit_sizes(state)
    width = sizes["embed_dim"]
    heads = args.get("num_heads") or width // 64
    if not heads or width % heads:
        raise ValueError(f"{path} does not say how many heads its {width} channels have")
    return state, {"backbone": "vit", **sizes, "num_heads": heads}


def _vit_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    embed_dim, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
    return {
        "img_size": math.isqrt(state["pos_embed"].shape[1] - 1) * patch_size,
        "patch_size": patch_size,
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / embed_dim,
    }


def _xcit(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """timm's names: the positions are called differently, and class attention keeps q, k and v apart."""
    width = state["cls_token"].shape[-1]
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    patch_size = 2 ** len(
        {name.split(".")[2] for name in state if re.match(r"patch_embed\.proj\.\d+\.0\.weight", name)}
    )
    renamed = {}
    for name, tensor in state.items():
        name = "model." + name.replace("pos_embeder.", "pos_embed.")
        if "cls_attn_blocks" in name and ".qkv." in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace(".qkv.", f".{letter}.")] = part
        else:
            renamed[name] = tensor
    return renamed, {"backbone": f"timm:xcit_{XCIT_SIZES.get(width, width)}_{depth}_p{patch_size}_224"}


def _check_keys(backbone: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    wanted = backbone.state_dict()
    for name in wanted.keys() - state.keys():
        if name.endswith("num_batches_tracked"):  # Older files lack this counter, which only matters without momentum.
            state[name] = torch.zeros_like(wanted[name])
    shapes = {k: f"{k} {tuple(state[k].shape)} for {tuple(wanted[k].shape)}" for k in wanted.keys() & state.keys()}
    problems = {
        "missing": sorted(wanted.keys() - state.keys()),
        "unexpected": sorted(state.keys() - wanted.keys()),
        "of another shape": [shapes[k] for k in sorted(shapes) if state[k].shape != wanted[k].shape],
    }
    if any(problems.values()):
        listed = "; ".join(f"{len(names)} {kind}: {', '.join(names[:6])}" for kind, names in problems.items() if names)
        raise ValueError(f"{path} does not fit its model: {listed}")
