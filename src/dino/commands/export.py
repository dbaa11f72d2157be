"""``dino export``."""

from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

from dino.commands.shared import WithWeights


@dataclass(frozen=True)
class Export(WithWeights):
    """Weights for another tool, read back with that tool: the largest difference is printed."""

    _: KW_ONLY
    to: Literal["timm", "hf", "onnx", "reference", "safetensors"]
    """timm and hf (Hugging Face's ViTModel with its image processor): a folder; onnx, reference (as DINO was released)
    and safetensors (dino's own): a file."""
    out: str
    """Folder or file to write; a model card is written into or beside it."""
    size: tuple[int, int] | None = None
    """Of onnx: height and width in pixels of its images; by default those that the weights are shown."""
    batch: int = 0
    """Of onnx: images a call; 0: any number."""

    def run(self) -> dict[str, Any]:
        from pathlib import Path

        from dino.models import export
        from dino.models.weights import open_weights

        if not 0 <= self.batch <= 10_000:
            raise ValueError(f"--batch {self.batch} is not allowed: 0 (any number) or a number of images up to 10000")
        if self.to != "onnx" and (self.size or self.batch):
            raise ValueError(f"--size and --batch are of --to onnx: --to {self.to} takes images of any size and number")
        weights = open_weights(self.weights, checkpoint_key=self.checkpoint_key)
        out = Path(self.out)
        if self.to in ("timm", "hf") and out.is_file():
            raise ValueError(f"--out {self.out} is a file: --to {self.to} writes a folder")
        if self.to not in ("timm", "hf") and out.is_dir():
            raise ValueError(f"--out {self.out} is a folder: --to {self.to} writes a file")
        exported = export.export(weights, self.to, out, self.size, self.batch)
        card = export.write_card_of(weights, exported, out)
        return {
            "weights": self.weights,
            "read": weights.summary,
            "to": self.to,
            "files": [str(path) for path in [*exported.files, card] if path],
            **export.compare(weights, exported, self.size, self.batch),
        }
