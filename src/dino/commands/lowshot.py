"""``dino eval lowshot``."""

from dataclasses import dataclass
from typing import Any

import tyro

from dino.commands.shared import Device, WithWeights, train_val_test


@dataclass(frozen=True)
class Lowshot(WithWeights):
    """Classification with few labels: logistic regression on frozen features (appendix A of the paper)."""

    data: tyro.conf.Positional[tuple[str, ...]]
    """Labelled images. val is classified by a few of train; with one part, a tenth of every class is classified."""
    test: str | None = None
    """Images to classify, when they are not part of DATA."""
    fraction: float | None = None
    """Share of every class that is learned from; the paper has 0.01 and 0.1. Default: 0.01."""
    per_class: int | None = None
    """In place of a share: number of images of every class."""
    subsets: int = 5
    """Subsets drawn; the results are their mean and standard deviation."""
    strength: float = 0.1
    """Of the L2 penalty, lambda = strength / number of images. The authors' choice."""
    seed: int = 0
    """Of the first subset; the next ones follow."""
    resize: int = 256
    """Shorter side in pixels before the center crop."""
    crop: int = 224
    """Side of the center crop in pixels."""
    batch_size: int = 128
    """Images a forward pass."""
    device: Device = "auto"
    """Where the backbone runs."""
    json: bool = False
    """End with one JSON object on stdout."""

    def run(self) -> dict[str, Any]:
        from dino.evaluation import lowshot
        from dino.machine.device import choose_device

        device = choose_device(self.device)
        train, _, test, judged_by = train_val_test(self.data, self.test, self.seed)
        fraction = 0.01 if self.fraction is None and self.per_class is None else self.fraction
        results = lowshot.run(
            self.backbone(device),
            train,
            test,
            fraction=fraction,
            per_class=self.per_class,
            subsets=self.subsets,
            strength=self.strength,
            seed=self.seed,
            resize=self.resize,
            crop=self.crop,
            batch_size=self.batch_size,
            device=device,
        )
        settings = {
            "labels": f"{fraction:g} of every class" if fraction is not None else f"{self.per_class} per class",
            "subsets": self.subsets,
            "seed": self.seed,
            "train_images": len(train),
            "test": judged_by,
            "test_images": len(test),
            "classifier": "multinomial logistic regression, L2, no intercept, L2-normalised [CLS] tokens",
            "strength": self.strength,
            "resize": self.resize,
            "crop": self.crop,
        }
        return {**results, "settings": settings}
