"""``dino embed``."""

import os
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import tyro

from dino.commands.shared import Cropped, WithData
from dino.options import CropOptions, quoted


@dataclass(frozen=True)
class Embed(WithData):
    """Features of every image as one file, with a map and neighbours; the same command again goes on.

    dino search, duplicates, clusters and outliers read the file, and so do pandas, faiss, LanceDB and embedding-atlas.
    """

    data: tyro.conf.Positional[tuple[str, ...]]
    """Images; labels and parts are not needed, and all parts are taken."""
    _: KW_ONLY
    out: Path
    """File to write: .parquet (features, map, neighbours), or .npz (features, read with numpy alone). A name without an
    ending: a folder, to which each process of torchrun writes one .parquet (features)."""
    thumbnails: bool = False
    """Write a small JPEG of every image too (some 4 kB each), so that the file can be looked at without the images."""
    neighbors: int = 10
    """Nearest other images that a .parquet names for each."""
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
        from dino.encoder.embed import embed
        from dino.encoder.encoder import open_encoder
        from dino.machine.device import choose_device
        from dino.machine.distributed import process_group

        if self.neighbors < 1:
            raise ValueError(f"--neighbors {self.neighbors} is not allowed: at least 1")
        with process_group(choose_device(self.shown.device)) as device:
            encoder = open_encoder(self.open(self.shown, batch_size=self.batch_size), device=device)
            source = self.source()
            how = {"n_last_blocks": self.n_last_blocks, "patch_tokens": self.patch_tokens, "float16": self.float16}
            made_from = {
                "weights": os.path.abspath(self.weights) if os.path.exists(self.weights) else self.weights,
                "checkpoint_key": self.checkpoint_key,
                "data": list(self.data),
                "read": quoted(self.read),
                "folder": os.getcwd(),
            }
            extras = {"thumbnails": self.thumbnails, "neighbors": self.neighbors, "made_from": made_from}
            results = embed(encoder, source, self.out, **how, **extras)
        return self.report({"out": str(self.out), **results}, encoder, self.shown, **how, data=source.description)
