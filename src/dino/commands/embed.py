"""``dino embed``."""

from dataclasses import dataclass
from typing import Any

import tyro

from dino.commands.shared import Device, WithWeights


@dataclass(frozen=True)
class Embed(WithWeights):
    """Features of every image as one file; the same command again goes on where it was stopped."""

    data: tyro.conf.Positional[tuple[str, ...]]
    """Images; labels and parts are not needed, and all parts are taken."""
    out: str
    """File to write: .npz (read with numpy) or .parquet."""
    patch_tokens: bool = False
    """Write the patch tokens too, a grid an image: about 200 times as much."""
    n_last_blocks: int = 1
    """Number of last blocks whose [CLS] tokens are written, concatenated, older first."""
    float16: bool = False
    """Write half precision: half the size."""
    resize: int = 256
    """Shorter side in pixels before the center crop."""
    crop: int = 224
    """Side of the center crop in pixels."""
    batch_size: int = 128
    """Images a forward pass."""
    device: Device = "auto"
    """Where the backbone runs."""
    json: bool = False
    """End with one JSON object on stdout."""

    def run(self) -> dict[str, Any]:
        from pathlib import Path

        from dino.data.sources import open_source
        from dino.encoder.embed import embed
        from dino.machine.device import choose_device

        device = choose_device(self.device)
        source = open_source(self.data)
        settings: dict[str, Any] = {
            "n_last_blocks": self.n_last_blocks,
            "patch_tokens": self.patch_tokens,
            "float16": self.float16,
            "resize": self.resize,
            "crop": self.crop,
        }
        results = embed(
            self.backbone(device), source, Path(self.out), batch_size=self.batch_size, device=device, **settings
        )
        return {"out": self.out, **results, "settings": {**settings, "data": source.description}}
