"""``dino eval copy-detection``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from dino.commands.shared import Device, WithWeights


@dataclass(frozen=True)
class CopyDetection(WithWeights):
    """Copy detection with frozen features on Copydays (table 4 of the paper)."""

    data: tyro.conf.Positional[Path]
    """A folder with original/ and some of strong/, crops/NUMBER/ and jpegqual/NUMBER/."""
    distractors: tuple[str, ...] = ()
    """More images to search among, that nothing was made from; the paper takes 10,000 of YFCC100M."""
    whitening: tuple[str, ...] = ()
    """Images to learn a PCA whitening from; the paper takes 20,000 others of YFCC100M."""
    side: int = 320
    """Every image is squeezed to a square of so many pixels a side."""
    batch_size: int = 32
    """Images a forward pass."""
    device: Device = "auto"
    """Where the backbone runs."""
    json: bool = False
    """End with one JSON object on stdout."""

    def run(self) -> dict[str, Any]:
        from dino.data.sources import open_source
        from dino.evaluation import copy_detection
        from dino.machine.device import choose_device

        device = choose_device(self.device)
        blocks = copy_detection.find_blocks(self.data)
        distractors = open_source(self.distractors) if self.distractors else None
        whitening = open_source(self.whitening) if self.whitening else None
        results = copy_detection.run(
            self.backbone(device),
            self.data,
            distractors=distractors,
            whitening=whitening,
            side=self.side,
            batch_size=self.batch_size,
            device=device,
        )
        settings = {
            "parts": list(blocks),
            "distractors": len(distractors or ()),
            "whitening_images": len(whitening or ()),
            "side": self.side,
            "top": copy_detection.TOP,
        }
        return {**results, "settings": settings}
