"""``dino eval linear``."""

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any

import tyro

from dino.commands.shared import Cropped, Flat, WithData
from dino.options import CropOptions, LinearOptions


@dataclass(frozen=True)
class Linear(WithData):
    """Linear classification on frozen features: the paper's probe, or a grid of them in one pass (section 4.1)."""

    data: tyro.conf.Positional[tuple[str, ...]]
    """Labelled images. val is classified by train; with one part, a tenth of every class is held out to be classified.
    With --test, val chooses the probe and the epoch."""
    _: KW_ONLY
    test: str | None = None
    """Images to classify, when they are not part of DATA."""
    val: str | None = None
    """Images to choose the probe and the epoch by, when they are not part of DATA."""
    val_fraction: float | None = None
    """Share of every class of the train images held out to choose by, where there are no others. Default: 0.1 with
    several probes, 0 with one; 0 chooses nothing."""
    probe: str | None = None
    """Train nothing: evaluate this file (written by --out, or a released classifier)."""
    options: Annotated[LinearOptions, Flat] = LinearOptions()
    shown: Cropped = CropOptions()

    def run(self) -> dict[str, Any]:
        from dino.evaluation import linear
        from dino.evaluation.parts import train_val_test

        fraction = self.val_fraction
        if fraction is not None and not 0 <= fraction < 1:
            raise ValueError(f"--val-fraction {fraction} is not allowed: a share from 0 to below 1")
        if self.probe is not None:
            encoder = self.open(self.shown)
            source = self.other(self.test)
            if source is None:
                source = self.source()
                source = source.parts.get("val", source)
            results = linear.run_saved(encoder, source, self.probe)
            facts = {"probe": self.probe, "test": source.origin, "test_images": len(source)}
            return self.report(results, encoder, self.shown, **facts)

        encoder = self.open(self.shown)
        train, val, test, judged_by = train_val_test(self.source(), self.other(self.test), self.options.seed)
        chosen_by = "the val part of DATA"
        if self.val is not None:
            val, chosen_by = self.other(self.val), f"--val {self.val}"
        if fraction is None:
            fraction = 0.1 if len(linear.probes_of(encoder, self.options)) > 1 else 0.0
        if val is None and fraction > 0:
            train, val = train.split(fraction, self.options.seed)
            chosen_by = f"{fraction:g} of every class of the train images, held out by seed {self.options.seed}"
        results = linear.run(encoder, train, test, val, self.options)
        return self.report(
            results,
            encoder,
            self.options,
            self.shown,
            train_images=len(train),
            test=judged_by,
            test_images=len(test),
            chosen_by=chosen_by if val is not None else "nothing: the last epoch of each probe",
            val_images=len(val) if val is not None else 0,
            optimizer="SGD, momentum 0.9, no weight decay, cosine by epoch; learning rates for 256 images",
            augmentation="none (cached)" if self.options.cached else "RandomResizedCrop (0.08, 1), flip",
            classes=train.classes,
        )
