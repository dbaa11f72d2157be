"""``dino eval discovery``."""

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any

import tyro

from dino.commands.shared import Flat, Forward, WithWeights
from dino.options import DiscoveryOptions, ForwardOptions


@dataclass(frozen=True)
class Discovery(WithWeights):
    """Object discovery without labels, by LOST and by TokenCut: share of images with a right box (CorLoc)."""

    data: tyro.conf.Positional[str]
    """Folder or .tar: PASCAL VOC (boxes from its XML files), images/ and masks/ with the same names, or DAVIS."""
    _: KW_ONLY
    split: str = "trainval"
    """PASCAL VOC: the list ImageSets/Main/SPLIT.txt."""
    options: Annotated[DiscoveryOptions, Flat] = DiscoveryOptions()
    forward: Forward = ForwardOptions()
    batch_size: int = 16
    """Images of one size a forward pass."""

    def run(self) -> dict[str, Any]:
        from dino.data.masks import open_boxes
        from dino.evaluation import discovery
        from dino.machine.progress import tracked

        encoder = self.open(self.forward, batch_size=self.batch_size)
        items = open_boxes(self.data, self.split)
        samples = ((item.pixels() / 255, item.annotation()) for item in tracked(items, "images", len(items)))
        results = discovery.run(encoder, samples, self.options)
        facts = {"images": len(items), "split": self.split}
        facts["features"] = "keys" if encoder.backbone.has_keys else "patch tokens"
        return self.report(results, encoder, self.options, self.forward, **facts)
