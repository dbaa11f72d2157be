"""``dino eval lowshot``."""

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any

import tyro

from dino.commands.shared import Cropped, Flat, WithData
from dino.options import CropOptions, LowshotOptions


@dataclass(frozen=True)
class Lowshot(WithData):
    """Classification with few labels: logistic regression on frozen features (appendix A of the paper)."""

    data: tyro.conf.Positional[tuple[str, ...]]
    """Labelled images. val is classified by a few of train; with one part, a tenth of every class is classified."""
    _: KW_ONLY
    test: str | None = None
    """Images to classify, when they are not part of DATA."""
    options: Annotated[LowshotOptions, Flat] = LowshotOptions()
    shown: Cropped = CropOptions()
    batch_size: int = 128
    """Images a forward pass."""

    def run(self) -> dict[str, Any]:
        from dino.evaluation import lowshot
        from dino.evaluation.parts import train_val_test

        encoder = self.open(self.shown, batch_size=self.batch_size)
        train, _, test, judged_by = train_val_test(self.source(), self.other(self.test), self.options.seed)
        per_class = self.options.per_class
        labels = f"{self.options.fraction or 0.01:g} of every class" if per_class is None else f"{per_class} per class"
        return self.report(
            lowshot.run(encoder, train, test, self.options),
            encoder,
            self.options,
            self.shown,
            labels=labels,
            train_images=len(train),
            test=judged_by,
            test_images=len(test),
            classifier="multinomial logistic regression, L2, no intercept, L2-normalised [CLS] tokens",
            classes=train.classes,
        )
