"""``dino eval retrieval``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from dino.commands.shared import Device, WithWeights


@dataclass(frozen=True)
class Retrieval(WithWeights):
    """Image retrieval with frozen features (table 3 of the paper): revisited Oxford and Paris, or any labelled set."""

    data: tyro.conf.Positional[tuple[str, ...]]
    """A folder with gnd_roxford5k.pkl or gnd_rparis6k.pkl and jpg/; or labelled images, each a query for the others."""
    side: int = 512
    """Longest side in pixels; larger images are shrunk to it, smaller ones stay."""
    multi_scale: bool = True
    """Average the features at the scales 1, 1/sqrt(2) and 1/2, as released."""
    crop_queries: bool = False
    """Show only the box of each query (Oxford, Paris), as the authors of the data do; released DINO code does not."""
    whitening: str | None = None
    """Images to learn a PCA whitening from; "database" takes the images that are searched."""
    batch_size: int = 32
    """Images of equal size a forward pass."""
    device: Device = "auto"
    """Where the backbone runs."""
    json: bool = False
    """End with one JSON object on stdout."""

    def run(self) -> dict[str, Any]:
        from dino.data.sources import open_source
        from dino.evaluation import retrieval
        from dino.machine.device import choose_device

        device = choose_device(self.device)
        truths = sorted(Path(self.data[0]).glob("gnd_*.pkl")) if len(self.data) == 1 else []
        settings = {
            "side": self.side,
            "scales": retrieval.SCALES if self.multi_scale else (1.0,),
            "batch_size": self.batch_size,
            "device": device,
        }
        if self.whitening is not None:
            settings["whitening"] = self.whitening if self.whitening == "database" else open_source(self.whitening)
        quoted: dict[str, Any] = {
            "side": self.side,
            "scales": [round(scale, 4) for scale in settings["scales"]],
            "whitening": self.whitening,
        }
        results: dict[str, float] = {}
        if truths:
            backbone = self.backbone(device)
            for truth in truths:
                results |= retrieval.run_revisited(backbone, truth, crop_queries=self.crop_queries, **settings)
            quoted |= {"ground_truth": [truth.name for truth in truths], "crop_queries": self.crop_queries}
        else:
            if self.crop_queries:
                raise ValueError(f"--crop-queries: {' '.join(self.data)} has no gnd_*.pkl that says what to crop")
            source = open_source(self.data)
            results = retrieval.run(self.backbone(device), source, **settings)
            quoted |= {"images": len(source), "protocol": "each image against all others"}
        return {**results, "settings": quoted}
