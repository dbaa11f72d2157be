"""``dino eval knn``."""

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any

import tyro

from dino.commands.shared import Cropped, Flat, WithData
from dino.options import CropOptions, KnnOptions


@dataclass(frozen=True)
class Knn(WithData):
    """Weighted k-NN classification with frozen features (section 4.1 of the paper)."""

    data: tyro.conf.Positional[tuple[str, ...]]
    """Labelled images. With train and val parts, val is classified by train; with one part, each image by the
    others."""
    _: KW_ONLY
    test: str | None = None
    """Images to classify, when they are not part of DATA."""
    options: Annotated[KnnOptions, Flat] = KnnOptions()
    shown: Cropped = CropOptions()
    batch_size: int = 128
    """Images a forward pass."""

    def run(self) -> dict[str, Any]:
        from dino.evaluation import knn
        from dino.evaluation.parts import train_and_test

        encoder = self.open(self.shown, batch_size=self.batch_size)
        train, test = train_and_test(self.source(), self.other(self.test))
        return self.report(
            knn.run(encoder, train, test, self.options),
            encoder,
            self.options,
            self.shown,
            train_images=len(train),
            test_images=len(train if test is None else test),
            protocol="leave one out" if test is None else "test part",
            classes=train.classes,
        )
