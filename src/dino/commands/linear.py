"""``dino eval linear``."""

from dataclasses import dataclass
from typing import Any, Literal

import tyro

from dino.commands.shared import Device, WithWeights, train_val_test


@dataclass(frozen=True)
class Linear(WithWeights):
    """Linear classification on frozen features: the paper's probe, or a grid of them in one pass (section 4.1)."""

    data: tyro.conf.Positional[tuple[str, ...]]
    """Labelled images. val is classified by train; with one part, a tenth of every class is held out to be classified.
    With --test, val chooses the probe and the epoch."""
    test: str | None = None
    """Images to classify, when they are not part of DATA."""
    val: str | None = None
    """Images to choose the probe and the epoch by, when they are not part of DATA."""
    val_fraction: float | None = None
    """Share of every class of the train images held out to choose by, where there are no others. Default: 0.1 with
    several probes, 0 with one; 0 chooses nothing."""
    grid: bool = False
    """Train 28 probes at once: 7 learning rates, 1 or 4 last blocks, with and without average pooling."""
    lr: tuple[float, ...] = ()
    """Learning rates for 256 images. Default: 0.001, the paper's."""
    n_last_blocks: tuple[int, ...] = ()
    """Numbers of last blocks whose [CLS] tokens the probes see. Default: the paper's, 4 for ViT-S and 1 for ViT-B."""
    avgpool: Literal["paper", "off", "on", "both"] = "paper"
    """Show the probes the mean patch token too. The paper does for ViT-B."""
    epochs: int = 100
    """Times the probes see every train image."""
    batch_size: int = 1024
    """Images a step."""
    cached: bool = False
    """Extract the train features once, from center crops: minutes in place of hours, without random crops."""
    probe: str | None = None
    """Train nothing: evaluate this file (written by --out, or a released classifier)."""
    out: str | None = None
    """File (.safetensors) for the weights of the chosen probe."""
    seed: int = 0
    """Of what is held out, the order, the crops and the first weights."""
    resize: int = 256
    """Shorter side in pixels before the center crop of images that are classified."""
    crop: int = 224
    """Side of the crops in pixels."""
    device: Device = "auto"
    """Where the backbone and the probes run."""
    json: bool = False
    """End with one JSON object on stdout."""

    def run(self) -> dict[str, Any]:
        from pathlib import Path

        from dino.data.sources import open_source
        from dino.evaluation import linear
        from dino.machine.device import choose_device

        device = choose_device(self.device)
        sizes: dict[str, Any] = {"resize": self.resize, "crop": self.crop}
        if self.probe is not None:
            source = open_source(self.data if self.test is None else self.test)
            source = source.parts.get("val", source) if self.test is None else source
            results = linear.run_saved(self.backbone(device), source, self.probe, device=device, **sizes)
            return {
                **results,
                "settings": {"probe": self.probe, "test": source.origin, "test_images": len(source), **sizes},
            }

        train, val, test, judged_by = train_val_test(self.data, self.test, self.seed)
        backbone = self.backbone(device)
        pools = {"paper": (False, True) if self.grid else (), "off": (False,), "on": (True,), "both": (False, True)}
        probes = linear.paper_probes(
            backbone.embed_dim,  # pyright: ignore[reportArgumentType]
            self.lr or (linear.GRID if self.grid else (linear.LR,)),
            self.n_last_blocks or ((1, 4) if self.grid else ()),
            pools[self.avgpool],
        )
        chosen_by = "the val part of DATA"
        if self.val is not None:
            val, chosen_by = open_source(self.val), f"--val {self.val}"
        fraction = self.val_fraction if self.val_fraction is not None else 0.1 if len(probes) > 1 else 0.0
        if not 0 <= fraction < 1:
            raise ValueError(f"--val-fraction {fraction} is not allowed: a share from 0 to below 1")
        if val is None and fraction > 0:
            train, val = train.split(fraction, self.seed)
            chosen_by = f"{fraction:g} of every class of the train images, held out by seed {self.seed}"
        results = linear.run(
            backbone,
            train,
            test,
            val,
            probes=probes,
            epochs=self.epochs,
            batch_size=self.batch_size,
            cached=self.cached,
            out=Path(self.out) if self.out else None,
            seed=self.seed,
            device=device,
            **sizes,
        )
        settings = {
            "train_images": len(train),
            "test": judged_by,
            "test_images": len(test),
            "chosen_by": chosen_by if val is not None else "nothing: the last epoch of each probe",
            "val_images": len(val) if val is not None else 0,
            "optimizer": "SGD, momentum 0.9, no weight decay, cosine by epoch; learning rates for 256 images",
            "augmentation": "none (cached)" if self.cached else "RandomResizedCrop (0.08, 1), flip",
            "epochs": self.epochs,
            "batch_size": min(self.batch_size, len(train)),
            "seed": self.seed,
            **sizes,
        }
        return {**results, "settings": settings}
