"""Features kept in a file, with all that decides whether they may be used again."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from dino.data.sources import Source
from dino.encoder.encoder import Encoder, Features
from dino.machine import distributed
from dino.machine.files import whole_file


def fingerprint(backbone: nn.Module) -> str:
    """16 hexadecimal digits that differ when any weight differs, or what else changes the features."""
    options = [getattr(backbone, name, None) for name in ("num_heads", "patch_size", "pos_offset", "name")]
    digest = hashlib.blake2b(f"{type(backbone).__name__} {options}".encode(), digest_size=8)
    for name, tensor in backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def provenance(encoder: Encoder, sources: Mapping[str, Source], **settings: Any) -> dict[str, Any]:
    """What features depend on: weights, images (by name and number) and how they are shown, as JSON would give it back.

    ``settings``: what else they depend on.
    """
    described: dict[str, Any] = {"weights": fingerprint(encoder.backbone), **encoder.settings, **settings}
    for part, source in sources.items():
        names = "\n".join(map(source.name, range(len(source))))
        digest = hashlib.blake2b(names.encode(errors="surrogateescape"), digest_size=8).hexdigest()
        described[f"{part} images"] = f"{len(source)}, {digest}"
    return json.loads(json.dumps(described))


def check_provenance(path: Path, kept: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises:
    ValueError: what is kept at ``path`` was made from other weights, images or settings; names them.
    """
    differing = [name for name in {**wanted, **kept} if kept.get(name) != wanted.get(name)]
    if differing:
        values = "; ".join(f"{name}: {kept.get(name)} there, {wanted.get(name)} now" for name in differing)
        raise ValueError(f"{path} was made in another way ({values}): delete it, or name another file")


def stored_features(path: Path | None, encoder: Encoder, sources: Mapping[str, Source]) -> dict[str, Features]:
    """The [CLS] features of every source, read from ``path``; without the file they are extracted and written to it.

    ``path`` None: they are only extracted.

    Raises:
        ValueError: the file holds features of other weights, images or settings, or is no file of features.
    """
    if path is None:
        return {part: encoder.features(source) for part, source in sources.items()}
    wanted = provenance(encoder, sources)
    if not any(distributed.gather(path.exists())):
        made = {part: encoder.features(source) for part, source in sources.items()}
        tensors = {}
        for part, (features, _, indices) in made.items():
            tensors |= {f"{part}.features": features.contiguous(), f"{part}.indices": indices.contiguous()}
        if distributed.is_main():
            with whole_file(path) as partial:
                save_file(tensors, partial, metadata={"dino_features": json.dumps(wanted)})
        return made
    try:
        with safe_open(path, framework="pt") as file:
            kept = json.loads((file.metadata() or {})["dino_features"])
            check_provenance(path, kept, wanted)
            return {part: _read(file, part, source) for part, source in sources.items()}
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is no file of features that dino wrote: delete it, or name another file") from error


def _read(file: Any, part: str, source: Source) -> Features:
    indices = file.get_tensor(f"{part}.indices")
    labels = None if source.labels is None else source.labels[indices]  # Names of classes may change, images not.
    return Features(file.get_tensor(f"{part}.features"), labels, indices)
