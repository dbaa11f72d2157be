"""``dino eval attention-segmentation``."""

from dataclasses import dataclass
from typing import Any, Literal

import tyro

from dino.commands.shared import Device, WithWeights


@dataclass(frozen=True)
class AttentionSegmentation(WithWeights):
    """How well the best attention head outlines each object (section 4.2.2, figure 4 of the paper)."""

    data: tyro.conf.Positional[str]
    """Folder or .tar: PASCAL VOC 2012, DAVIS, or images/ and masks/ with the same names (0: no object)."""
    split: str = "val"
    """PASCAL VOC: the list ImageSets/Segmentation/SPLIT.txt."""
    masks: Literal["object", "class"] = "object"
    """PASCAL VOC: each object its own (SegmentationObject), or all of a class as one (SegmentationClass)."""
    share: float = 0.6
    """Of the attention's mass that a mask keeps."""
    resize: int = 0
    """Side in pixels of the squares that images are resized to; 0: full size, cut to multiples of the patch."""
    batch_size: int = 16
    """Images of one size a forward pass."""
    device: Device = "auto"
    """Where the backbone runs."""
    json: bool = False
    """End with one JSON object on stdout."""

    def run(self) -> dict[str, Any]:
        from dino.data.masks import open_masks
        from dino.evaluation import attention_segmentation
        from dino.machine.device import choose_device
        from dino.machine.progress import tracked

        device = choose_device(self.device)
        items = open_masks(self.data, self.split, self.masks)
        results = attention_segmentation.run(
            self.backbone(device),
            (
                (pixels / 255, labels)
                for pixels, labels in tracked((item.labelled() for item in items), "images", len(items))
            ),
            share=self.share,
            resize=self.resize,
            batch_size=self.batch_size,
            device=device,
        )
        settings = {
            "images": len(items),
            "split": self.split,
            "masks": self.masks,
            "share": self.share,
            "resize": self.resize or "full size",
        }
        return {**results, "settings": settings}
