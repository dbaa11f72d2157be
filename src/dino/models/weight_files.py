"""Finds a file of weights and reads what it holds: nothing is executed, nothing is allocated that is not in the file.

Pickles are read with ``weights_only`` and a short list of harmless types.
"""

import argparse
import collections
import hashlib
import http.client
import json
import pathlib
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

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
EXAMPLE = Path(__file__).parent / "example" / "backbone.safetensors"  # Inside the package; its card lies beside it.
HUB_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

# The reference keeps its options as a Namespace and learning rates as numpy scalars, under numpy 1's or 2's name.
_SCALAR: Any = type(np.float64(0)).__reduce__(np.float64(0))[0]
_SAFE_TYPES: list[Any] = [
    argparse.Namespace,
    np.dtype,
    type(np.dtype(np.float64)),
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    collections.defaultdict,
    (dict, "builtins.dict"),
    (pathlib.PurePosixPath, "pathlib.PosixPath"),
    (pathlib.PurePosixPath, "pathlib._local.PosixPath"),
]
# Options that trainers keep beside the weights: read as a dictionary that does nothing, whatever class it was.
_OPTIONS = re.compile(r"(pytorch_lightning|lightning|lightning_fabric|omegaconf|yacs|ml_collections)\.|typing\.Any$")


class Stored(NamedTuple):
    """What a file of weights holds."""

    path: Path
    tensors: dict[str, Tensor]  # Names joined by dots where the file nests them.
    says: dict[str, Any]
    """What it says beside: ``dino`` (our header), ``config`` (our checkpoint's), ``args`` and ``arch`` of trainers,
    ``hub`` (a config.json of timm or Hugging Face), ``processor`` (Hugging Face's preprocessor_config.json)."""


def locate(name_or_path: str | Path) -> Path:
    """The file behind a released model's name or ``example``, a URL, a run folder, a folder of timm or Hugging Face, or
    itself."""
    name = str(name_or_path)
    if name == "example":
        return EXAMPLE
    if name in RELEASED:
        stem = RELEASED[name]
        return _download(f"{RELEASED_URL}{stem}/{stem}.pth", f"{stem}.pth")
    if name.startswith(("https://", "http://", "file://")):
        # The address is part of the cached name: many files are called backbone.safetensors.
        tag = hashlib.blake2b(name.encode(), digest_size=4).hexdigest()
        return _download(name, f"{tag}-{name.split('?')[0].rsplit('/', 1)[-1]}")
    path = Path(name_or_path)
    if path.is_dir():
        kinds = ("step_*.safetensors", "*.pt")  # .pt: of version 0.1.
        checkpoints = [file for kind in kinds for file in (path / "checkpoints").glob(kind)]
        checkpoints.sort(key=lambda p: (p.stat().st_mtime_ns, p.name))
        candidates = [path / "backbone.safetensors", *reversed(checkpoints), *(path / file for file in HUB_FILES)]
        found = [candidate for candidate in candidates if candidate.is_file()]
        if not found:
            raise ValueError(
                f"the folder {path} holds neither backbone.safetensors nor checkpoints (a run), "
                "nor model.safetensors or pytorch_model.bin (a folder of timm or Hugging Face)"
            )
        return found[0]
    if not path.is_file():
        raise ValueError(
            f"{name!r} is neither a file, a run folder, a folder of timm or Hugging Face, a URL, timm:NAME, "
            f"'example' (a small network inside the package), nor released weights: {', '.join(RELEASED)}"
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


def read(path: Path) -> Stored:
    """All tensors of a file, and what it says about them.

    Raises:
        ValueError: it is no file of weights, is damaged, would execute code, or claims tensors that it does not hold.
    """
    says = {}
    if path.name.endswith(".index.json"):  # Hugging Face cuts large models into several files.
        names = sorted(set(_json(path).get("weight_map", {}).values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError(f"{path} lists no files of weights beside it")
        parts = [read(path.parent / name) for name in names if (path.parent / name).is_file()]
        if len(parts) < len(names):
            raise ValueError(f"{path} names {len(names)} files, of which {len(names) - len(parts)} are missing")
        return Stored(path, {name: tensor for part in parts for name, tensor in part.tensors.items()}, parts[0].says)
    if path.suffix == ".safetensors":
        tensors, metadata = open_safetensors(path)
        if "dino" in metadata:
            says["dino"] = _description(metadata["dino"], path)
        if "dino_checkpoint" in metadata:  # Of a run: all its tensors by their path, and the rest as JSON.
            says["config"] = dict(json.loads(metadata["dino_checkpoint"])["dict"])["config"]
    else:
        content = unpickle(path)
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds a {type(content).__name__}, not weights")
        tensors = dict(_flat(content))
        if isinstance(config := content.get("config"), str):
            says["config"] = config
        args = content.get("args")
        says["args"] = args if isinstance(args, dict) else getattr(args, "__dict__", {})
        if isinstance(arch := content.get("arch"), str):
            says["arch"] = arch
    beside = path.parent / "config.json"
    if "dino" not in says and "config" not in says and beside.is_file():
        hub = _json(beside)
        if "architecture" in hub or "model_type" in hub:
            says["hub"] = hub
            if (processor := path.parent / "preprocessor_config.json").is_file():
                says["processor"] = _json(processor)
    return Stored(path, tensors, says)


def open_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, UnicodeError) as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def unpickle(path: Path) -> Any:
    """What ``torch.save`` wrote, as far as it is harmless."""
    try:
        options = [name for name in torch.serialization.get_unsafe_globals_in_checkpoint(path) if _OPTIONS.match(name)]
    except (
        ValueError,
        RuntimeError,
        pickle.UnpicklingError,
        OSError,
        KeyError,
        EOFError,
    ):  # A file of before torch 1.6.
        options = []
    inert: list[Any] = [(collections.OrderedDict, name) for name in options]
    try:
        with torch.serialization.safe_globals([*_SAFE_TYPES, *inert]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, UnicodeError, TypeError) as error:
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(f"{path} is refused: reading it would execute code ({code[1]})") from error
        raise ValueError(f"{path} is not a file of weights (.pt, .pth or .safetensors), or is damaged") from error


def _flat(content: Mapping[Any, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    for name, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping) and depth < 5 and not str(name).startswith("optim"):
            yield from _flat(value, f"{prefix}{name}.", depth + 1)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not settings")
    return content


def _description(text: str, path: Path) -> dict[str, Any]:
    try:
        description = json.loads(text)
    except ValueError:
        description = None
    if not isinstance(description, dict) or not isinstance(description.get("backbone"), str):
        raise ValueError(f"{path} has a damaged header: {text[:80]!r} describes no backbone")
    return description
