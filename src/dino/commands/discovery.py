"""``dino eval discovery``."""

from dataclasses import dataclass
from typing import Any

import tyro

from dino.commands.shared import Device, WithWeights


@dataclass(frozen=True)
class Discovery(WithWeights):
    """Object discovery without labels, by LOST and by TokenCut: share of images with a right box (CorLoc)."""

    data: tyro.conf.Positional[str]
    """Folder or .tar: PASCAL VOC (boxes from its XML files), images/ and masks/ with the same names, or DAVIS."""
    split: str = "trainval"
    """PASCAL VOC: the list ImageSets/Main/SPLIT.txt."""
    k: int = 100
    """LOST: patches of lowest degree that may join the seed."""
    threshold: float = 0.2
    """TokenCut: cosine from which on two patches are joined."""
    batch_size: int = 16
    """Images of one size a forward pass."""
    device: Device = "auto"
    """Where the backbone runs."""
    json: bool = False
    """End with one JSON object on stdout."""

    def run(self) -> dict[str, Any]:
        from dino.data.masks import open_boxes
        from dino.evaluation import discovery
        from dino.machine.device import choose_device
        from dino.machine.progress import tracked

        device = choose_device(self.device)
        items = open_boxes(self.data, self.split)
        backbone = self.backbone(device)
        results = discovery.run(
            backbone,
            ((item.pixels() / 255, item.annotation()) for item in tracked(items, "images", len(items))),
            k=self.k,
            threshold=self.threshold,
            batch_size=self.batch_size,
            device=device,
        )
        settings = {
            "images": len(items),
            "split": self.split,
            "features": "keys" if hasattr(backbone, "get_last_keys") else "patch tokens",
            "k": self.k,
            "threshold": self.threshold,
        }
        return {**results, "settings": settings}
