"""``dino eval knn``."""

from dataclasses import dataclass
from typing import Any

import tyro

from dino.commands.shared import Device, WithWeights, train_and_test


@dataclass(frozen=True)
class Knn(WithWeights):
    """Weighted k-NN classification with frozen features (section 4.1 of the paper)."""

    data: tyro.conf.Positional[tuple[str, ...]]
    """Labelled images. With train and val parts, val is classified by train; with one part, each image by the
    others."""
    test: str | None = None
    """Images to classify, when they are not part of DATA."""
    k: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbours."""
    temperature: float = 0.07
    """Of the vote exp(similarity / temperature)."""
    resize: int = 256
    """Shorter side in pixels before the center crop."""
    crop: int = 224
    """Side of the center crop in pixels."""
    batch_size: int = 128
    """Images a forward pass."""
    features: str | None = None
    """File (.safetensors) that features are kept in: read when it is there and fits, else written."""
    device: Device = "auto"
    """Where the backbone runs."""
    json: bool = False
    """End with one JSON object on stdout."""

    def run(self) -> dict[str, Any]:
        from pathlib import Path

        from dino.evaluation import knn
        from dino.machine.device import choose_device

        device = choose_device(self.device)
        train, test = train_and_test(self.data, self.test)
        results = knn.run(
            self.backbone(device),
            train,
            test,
            ks=self.k,
            temperature=self.temperature,
            resize=self.resize,
            crop=self.crop,
            batch_size=self.batch_size,
            device=device,
            features_file=Path(self.features) if self.features else None,
        )
        settings = {
            "train_images": len(train),
            "test_images": len(train if test is None else test),
            "protocol": "leave one out" if test is None else "test part",
            "temperature": self.temperature,
            "resize": self.resize,
            "crop": self.crop,
        }
        return {**results, "settings": settings}
