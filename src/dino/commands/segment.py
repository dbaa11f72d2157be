"""``dino segment train`` and ``dino segment apply``."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from dino.commands.shared import Flat, Forward, WithWeights
from dino.options import ForwardOptions, SegmentOptions

if TYPE_CHECKING:
    from dino.data.masks import Annotated as AnnotatedImage


@dataclass(frozen=True)
class SegmentTrain(WithWeights):
    """Trains a head on the patch tokens of a frozen backbone that says the class of every pixel.

    Gives mIoU on the val images. A class is a value of the masks; the background, 0, is one.
    """

    data: tyro.conf.Positional[str]
    """Folder or .tar: images/ and masks/ with the same names (parts: train/ and val/ around or in them), PASCAL VOC
    (its lists train and val), or DAVIS (object or not; whole videos are held out)."""
    _: KW_ONLY
    out: Path
    """File (.safetensors) for the head."""
    options: Annotated[SegmentOptions, Flat] = SegmentOptions()
    forward: Forward = ForwardOptions()

    def run(self) -> dict[str, Any]:
        from dino.data.mask_parts import open_classes
        from dino.evaluation import segmentation

        if self.out.suffix != ".safetensors":
            raise ValueError(f"--out {self.out} is not allowed: a head is written as .safetensors")
        encoder = self.open(self.forward)
        train, val = open_classes(self.data, self.options.val_fraction, self.options.seed)
        values = segmentation.values_of([*train, *val], self.options.void)
        made = segmentation.fit(encoder, train, values, self.options)
        segmentation.save_head(self.out, made, encoder)
        results = {"out": str(self.out), **segmentation.score(encoder, made, val)}
        facts = {"train_images": len(train), "val_images": len(val), "classes": len(values)}
        return self.report(results, encoder, made.options, self.forward, **facts)


@dataclass(frozen=True)
class SegmentApply(WithWeights):
    """Writes the masks that a head sees in images, as PNGs whose values are those of the masks it learned from."""

    data: tyro.conf.Positional[tuple[str, ...]]
    """Images. In a layout of `dino segment train`: the images that have a mask, which then judges too."""
    _: KW_ONLY
    head: Path
    """File that `dino segment train` wrote with the same weights."""
    out: Path
    """Folder for the masks: the image's name, .png, with the palette of PASCAL VOC."""
    forward: Forward = ForwardOptions()

    def run(self) -> dict[str, Any]:
        import torch

        from dino.data.davis import write_mask
        from dino.evaluation import segmentation
        from dino.pictures.inputs import read_images

        encoder = self.open(self.forward)
        made = segmentation.load_head(self.head, encoder)
        items, results = self._with_masks(), dict[str, Any]()
        named = ((item.name, item.pixels()) for item in items)
        if not items:
            named = ((given.stem, given.image) for given in read_images(self.data, encoder=encoder))
        values, written = torch.tensor(made.values), 0
        # Values that no byte holds (colours) are written as the numbers of their classes.
        table = values if int(values.max()) < 256 else torch.arange(len(values))
        for name, pixels in named:
            mask = table[segmentation.segment(encoder, made, pixels)].to(torch.uint8)
            write_mask(self.out / f"{name}.png", mask)
            written += 1
        results |= {"out": str(self.out), "images": written}
        if items:
            results |= segmentation.score(encoder, made, items)
        return self.report(results, encoder, self.forward, head=str(self.head), values=made.values)

    def _with_masks(self) -> "list[AnnotatedImage]":
        from dino.data.masks import open_masks

        if len(self.data) == 1:
            try:
                return open_masks(self.data[0], kind="class")
            except (ValueError, OSError):  # Other images.
                return []
        return []
