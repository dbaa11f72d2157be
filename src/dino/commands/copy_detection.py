"""``dino eval copy-detection``."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from dino.commands.shared import Flat, Forward, WithWeights
from dino.options import CopyDetectionOptions, ForwardOptions


@dataclass(frozen=True)
class CopyDetection(WithWeights):
    """Copy detection with frozen features on Copydays (table 4 of the paper)."""

    data: tyro.conf.Positional[Path]
    """A folder with original/ and some of strong/, crops/NUMBER/ and jpegqual/NUMBER/."""
    _: KW_ONLY
    distractors: tuple[str, ...] = ()
    """More images to search among, that nothing was made from; the paper takes 10,000 of YFCC100M."""
    whitening: tuple[str, ...] = ()
    """Images to learn a PCA whitening from; the paper takes 20,000 others of YFCC100M."""
    options: Annotated[CopyDetectionOptions, Flat] = CopyDetectionOptions()
    forward: Forward = ForwardOptions()
    batch_size: int = 32
    """Images a forward pass."""

    def run(self) -> dict[str, Any]:
        from dino.data.sources import open_source
        from dino.evaluation import copy_detection

        blocks = copy_detection.find_blocks(self.data)
        encoder = self.open(self.forward, batch_size=self.batch_size)
        distractors = open_source(self.distractors) if self.distractors else None
        whitening = open_source(self.whitening) if self.whitening else None
        results = copy_detection.run(encoder, self.data, self.options, distractors=distractors, whitening=whitening)
        return self.report(
            results,
            encoder,
            self.options,
            self.forward,
            parts=list(blocks),
            distractors=len(distractors or ()),
            whitening_images=len(whitening or ()),
            top=copy_detection.TOP,
        )
