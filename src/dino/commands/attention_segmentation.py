"""``dino eval attention-segmentation``."""

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any, Literal

import tyro

from dino.commands.shared import Flat, Forward, WithWeights
from dino.options import AttentionSegmentationOptions, ForwardOptions


@dataclass(frozen=True)
class AttentionSegmentation(WithWeights):
    """How well the best attention head outlines each object (section 4.2.2, figure 4 of the paper)."""

    data: tyro.conf.Positional[str]
    """Folder or .tar: PASCAL VOC 2012, DAVIS, or images/ and masks/ with the same names (0: no object)."""
    _: KW_ONLY
    split: str = "val"
    """PASCAL VOC: the list ImageSets/Segmentation/SPLIT.txt."""
    masks: Literal["object", "class"] = "object"
    """PASCAL VOC: each object its own (SegmentationObject), or all of a class as one (SegmentationClass)."""
    options: Annotated[AttentionSegmentationOptions, Flat] = AttentionSegmentationOptions()
    forward: Forward = ForwardOptions()
    batch_size: int = 16
    """Images of one size a forward pass."""

    def run(self) -> dict[str, Any]:
        from dino.data.masks import open_masks
        from dino.evaluation import attention_segmentation
        from dino.machine.progress import tracked

        encoder = self.open(self.forward, batch_size=self.batch_size)
        items = open_masks(self.data, self.split, self.masks)
        labelled = tracked((item.labelled() for item in items), "images", len(items))
        samples = ((pixels / 255, labels) for pixels, labels in labelled)
        results = attention_segmentation.run(encoder, samples, self.options)
        facts = {"images": len(items), "split": self.split, "masks": self.masks}
        return self.report(results, encoder, self.options, self.forward, **facts)
