"""``dino explore``."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import tyro

from dino.commands.shared import Cropped, WithData
from dino.options import CropOptions


@dataclass(frozen=True)
class Explore(WithData):
    """Makes one page (.html) to look around in a set: a map of it, neighbours, patches that are alike, attention.

    The page holds all it needs, images too, and asks no network. Click a patch, and every image shows where it is
    alike. 100 images take up to 10 MB.
    """

    data: tyro.conf.Positional[tuple[str, ...]]
    """Images; labels and parts are not needed, and all parts are taken."""
    _: KW_ONLY
    out: Path
    """The page to write (.html). In a run's folder, the report links to it."""
    patches: int = 100
    """Images whose patches and attention are in the page, evenly spread: about 90 kB each (28 x 28 patches)."""
    limit: int = 5000
    """Images on the map; of more, so many evenly spread ones."""
    shown: Cropped = CropOptions()
    batch_size: int = 32
    """Images a forward pass."""

    def run(self) -> dict[str, Any]:
        from dino.pictures.explore import explore

        if self.out.suffix not in (".html", ".htm"):
            raise ValueError(f"--out {self.out} is no name of a page: end it in .html")
        if self.patches < 1 or self.limit < 1:
            raise ValueError(f"--patches {self.patches} --limit {self.limit} is not allowed: at least 1 each")
        encoder = self.open(self.shown, batch_size=self.batch_size)
        source = self.source()
        results = explore(encoder, source, self.out, patches=self.patches, limit=self.limit, weights=self.weights)
        return self.report({"out": str(self.out), **results}, encoder, self.shown, data=source.description)
