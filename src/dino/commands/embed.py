"""``dino embed``."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import tyro

from dino.commands.shared import Cropped, WithWeights
from dino.options import CropOptions


@dataclass(frozen=True)
class Embed(WithWeights):
    """Features of every image as one file; the same command again goes on where it was stopped."""

    data: tyro.conf.Positional[tuple[str, ...]]
    """Images; labels and parts are not needed, and all parts are taken."""
    _: KW_ONLY
    out: Path
    """File to write: .npz (read with numpy) or .parquet."""
    patch_tokens: bool = False
    """Write the patch tokens too, a grid an image: about 200 times as much."""
    n_last_blocks: int = 1
    """Number of last blocks whose [CLS] tokens are written, concatenated, older first."""
    float16: bool = False
    """Write half precision: half the size."""
    shown: Cropped = CropOptions()
    batch_size: int = 128
    """Images a forward pass."""

    def run(self) -> dict[str, Any]:
        from dino.data.sources import open_source
        from dino.encoder.embed import embed

        source = open_source(self.data)
        encoder = self.open(self.shown, batch_size=self.batch_size)
        how = {"n_last_blocks": self.n_last_blocks, "patch_tokens": self.patch_tokens, "float16": self.float16}
        results = embed(encoder, source, self.out, **how)
        return self.report({"out": str(self.out), **results}, encoder, self.shown, **how, data=source.description)
