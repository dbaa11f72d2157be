"""A backbone in the files of another tool, and that tool's reading of them beside ours."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from dino.models.card import CardFacts, read_card, write_card
from dino.models.exported import Exported, difference, outputs, patch_of
from dino.models.to_files import to_reference, to_safetensors
from dino.models.to_hugging_face import to_hugging_face
from dino.models.to_onnx import to_onnx
from dino.models.to_timm import to_timm
from dino.models.weights import OURS, RELEASED, Weights, describe

Target = Literal["timm", "hf", "onnx", "reference", "safetensors"]
_WRITERS: dict[str, Callable[[Weights, Path], Exported]] = {
    "timm": to_timm,
    "hf": to_hugging_face,
    "reference": to_reference,
    "safetensors": to_safetensors,
}


def export(
    weights: Weights, target: Target, out: Path, size: tuple[int, int] | None = None, batch: int = 0
) -> Exported:
    """Writes a backbone as another tool's files: a folder for ``timm`` and ``hf``, a file for the others.

    ``size`` (height, width in pixels) and ``batch`` (images a call, 0: any number) are fixed in an ONNX file; the table
    of positions is resized for that size before it is written. By default the size it is shown images at.

    Raises:
        ValueError: the layout cannot hold this network, a size is not allowed, or a package is missing; says which.
    """
    shown = weights.preprocessing
    notes = []
    if shown.pixel_range is not None:
        low, high = shown.pixel_range
        notes.append(f"no layout of others says that raw values from {low:g} to {high:g} are mapped to 0 to 255 first")
    if target == "onnx":
        exported = to_onnx(weights, out, size or (shown.size, shown.size), batch)
    else:
        exported = _WRITERS[target](weights, out)
    return exported._replace(notes=notes + exported.notes)


def compare(
    weights: Weights, exported: Exported, size: tuple[int, int] | None = None, batch: int = 0
) -> dict[str, Any]:
    """The largest difference between the other tool's outputs and ours, on normalised noise.

    At the size that the weights are shown, and near 96 x 160 pixels, where tools resize positions each its own way;
    at ``size`` alone where the file is made for one (ONNX).
    """
    notes = list(exported.notes)
    if exported.open is None:
        return {"opened_with": None, "notes": [*notes, f"{exported.tool} is not installed: not read back"]}
    run, backbone, shown = exported.open(), weights.backbone.cpu(), weights.preprocessing
    patch = patch_of(backbone)
    wanted = [size or (shown.size, shown.size), *([] if exported.one_size else [(96, 160)])]
    sizes = [(max(height // patch, 1) * patch, max(width // patch, 1) * patch) for height, width in wanted]
    found: dict[str, Any] = {"opened_with": exported.tool}
    for place, (height, width) in enumerate(sizes):
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(batch or 3, shown.channels, height, width, generator=generator)
        ours = outputs(backbone, images)
        name = f"difference_{height}x{width}"
        found[name] = difference(ours, run(images))
        if not place:
            found["largest_output"] = max(part.abs().max().item() for part in ours)
        elif found[name] > 1e-3 * found["largest_output"]:
            notes.append(
                f"at other sizes than {sizes[0][0]} x {sizes[0][1]} this tool resizes the table of positions in its "
                f"own way: outputs differ by up to {found[name]:.2g} at {height} x {width}"
            )
    return {**found, "notes": notes}


def write_card_of(weights: Weights, exported: Exported, out: Path) -> Path | None:
    """The model card travels along: the facts of the one beside the weights, with how this tool opens them. None where
    nobody knows whether DINO trained them."""
    facts = None
    for name in ("model_card.md", "README.md"):
        with contextlib.suppress(ValueError, OSError):
            facts = facts or read_card(weights.path.parent / name)
    if facts is None and (weights.layout in OURS or weights.path.stem in RELEASED.values()):
        backbone = describe(weights.backbone)["backbone"].removeprefix("timm:")
        facts = dataclasses.replace(CardFacts.of(weights.backbone, weights.preprocessing), backbone=backbone)
    if facts is None:
        return None
    card = out / "README.md" if out.is_dir() else out.with_name(f"{out.stem}_card.md")
    return write_card(card, facts, usage=exported.usage, library=exported.library)
