"""``dino finetune`` and ``dino predict``."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dino.commands.shared import Cropped, Flat, WithData
from dino.options import CropOptions, Device, FinetuneOptions, quoted


@dataclass(frozen=True)
class Finetune(WithData):
    """Trains a classifier on labelled images, the backbone with it. The same command again resumes.

    RUN/backbone.safetensors holds backbone and classifier: every command takes RUN as WEIGHTS, and `dino predict`
    classifies with it.
    """

    data: tyro.conf.Positional[tuple[str, ...]]
    """Labelled images. The train part is learnt from, the val part (or a share held out by seed) chooses the epoch."""
    _: KW_ONLY
    out: Path
    """The run folder."""
    test: str | None = None
    """Images to be judged by; without, by those that chose the epoch."""
    options: Annotated[FinetuneOptions, Flat] = FinetuneOptions()
    resize: int | None = None
    """Shorter side in pixels before the center crop. Default: what the weights were trained at."""
    crop: int | None = None
    """Side of the center crop, and of the random crops of training, in pixels. Default: as the weights."""
    device: Device = "auto"
    """Where it is trained."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the steps; auto: bfloat16 where the device has it."""
    quiet: bool = False
    """Show nothing while it runs."""

    def run(self) -> dict[str, Any]:
        from dino.encoder.encoder import open_encoder
        from dino.run.finetune import finetune

        shown = CropOptions(device=self.device, resize=self.resize, crop=self.crop)  # Says what is not allowed.
        encoder = open_encoder(
            self.weights,
            checkpoint_key=self.checkpoint_key,
            device=shown.device,
            resize=shown.resize,
            size=shown.crop,
            progress=not (self.quiet or self.json),
        )
        options = {name: getattr(self.options, name) for name in quoted(self.options)}
        source, test, quiet = self.source(), self.other(self.test), self.quiet or self.json
        return finetune(encoder, source, self.out, test, precision=self.precision, quiet=quiet, **options)


@dataclass(frozen=True)
class Predict(WithData):
    """Classifies images with what `dino finetune` made."""

    data: tyro.conf.Positional[tuple[str, ...]]
    """Images; of DATA with parts the val or test part. Where they have classes, accuracy is given too."""
    _: KW_ONLY
    out: Path | None = None
    """File (.csv): image, class, probability, and the true class where it is known."""
    shown: Cropped = CropOptions()
    batch_size: int = 64
    """Images a forward pass."""

    def run(self) -> dict[str, Any]:
        import dataclasses

        from dino.evaluation.classification import accuracy, predict, write_predictions
        from dino.models.weights import load_classifier

        encoder = self.open(self.shown, batch_size=self.batch_size)
        source = self.source()
        source = source.parts.get("val", source)
        backbone, classifier, classes, _ = load_classifier(self.weights, encoder.device)
        encoder = dataclasses.replace(encoder, backbone=backbone)
        predictions = predict(encoder, classifier, classes, source)
        results: dict[str, Any] = {"images": len(predictions.indices), **accuracy(predictions)}
        if self.out is not None:
            write_predictions(self.out, source, predictions)
            results["out"] = str(self.out)
        return self.report(results, encoder, self.shown, classes=classes)
