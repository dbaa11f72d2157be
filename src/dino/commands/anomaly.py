"""``dino anomaly fit`` and ``dino anomaly score``."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from dino.commands.shared import Cropped, Flat, WithData
from dino.options import AnomalyOptions, CropOptions


@dataclass(frozen=True)
class AnomalyFit(WithData):
    """Keeps patches of normal images, which anomalies are far from."""

    data: tyro.conf.Positional[tuple[str, ...]]
    """Normal images; of DATA with parts the train part."""
    _: KW_ONLY
    out: Path
    """File (.safetensors) for the patches."""
    normal: tuple[str, ...] = ()
    """Classes that are normal, where DATA has others too."""
    options: Annotated[AnomalyOptions, Flat] = AnomalyOptions()
    shown: Cropped = CropOptions()
    batch_size: int = 64
    """Images a forward pass."""

    def run(self) -> dict[str, Any]:
        from dino.evaluation import anomaly

        if self.out.suffix != ".safetensors":
            raise ValueError(f"--out {self.out} is not allowed: a bank is written as .safetensors")
        encoder = self.open(self.shown, batch_size=self.batch_size)
        source = self.source()
        source = source.parts.get("train", source)
        if self.normal:
            source = source.subset(anomaly.of_class(source, self.normal).nonzero().flatten())
        bank = anomaly.fit(encoder, source, self.options)
        anomaly.save_bank(self.out, bank, encoder, self.options, len(source))
        results = {"out": str(self.out), "images": len(source), "patches": len(bank)}
        return self.report(results, encoder, self.options, self.shown)


@dataclass(frozen=True)
class AnomalyScore(WithData):
    """How anomalous images are, and where; AUROC where their classes say which are normal."""

    data: tyro.conf.Positional[tuple[str, ...]]
    """Images; of DATA with parts the val or test part."""
    _: KW_ONLY
    bank: Path
    """File that `dino anomaly fit` wrote with the same weights."""
    normal: tuple[str, ...] = ()
    """Classes that are normal; all others are anomalies. Default: good or normal, if there is such a class."""
    out: Path | None = None
    """File (.csv) for the scores: image, score, most anomalous first."""
    maps: Path | None = None
    """Folder for heat maps over the images, all on one scale."""
    shown: Cropped = CropOptions()
    batch_size: int = 64
    """Images a forward pass."""

    def run(self) -> dict[str, Any]:
        from dino.evaluation import anomaly

        encoder = self.open(self.shown, batch_size=self.batch_size)
        source = self.source()
        source = source.parts.get("val", source)
        bank, around = anomaly.load_bank(self.bank, encoder)
        scored = anomaly.score(encoder, source, bank, around)
        results: dict[str, Any] = {"images": len(scored.scores), "highest": float(scored.scores.max())}
        normal = self.normal or tuple(name for name in ("good", "normal") if name in source.classes)[:1]
        if normal:
            anomalous = ~anomaly.of_class(source, normal)[scored.indices]
            if anomalous.all() or not anomalous.any():
                raise ValueError(
                    f"{source.origin}: AUROC needs normal and anomalous images; normal are {', '.join(normal)}"
                )
            results |= {"auroc": anomaly.auroc(scored.scores, anomalous), "anomalous": int(anomalous.sum())}
        if self.out is not None:
            _write_table(self.out, source, scored)
        if self.maps is not None:
            _draw(self.maps, encoder, source, scored)
        return self.report(results, encoder, self.shown, bank=str(self.bank), bank_patches=len(bank), around=around)


def _write_table(path: Path, source: Any, scored: Any) -> None:
    import csv

    from dino.machine.files import printable, whole_file

    with whole_file(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "score"])
        for i in scored.scores.argsort(descending=True).tolist():
            writer.writerow([printable(source.name(int(scored.indices[i]))), f"{float(scored.scores[i]):.6f}"])


def _draw(folder: Path, encoder: Any, source: Any, scored: Any) -> None:
    from dino.pictures.sheet import colorize, resize, to_pil

    folder.mkdir(parents=True, exist_ok=True)
    rows, highest = {int(i): row for row, i in enumerate(scored.indices)}, max(float(scored.scores.max()), 1e-6)
    for images, indices in encoder.batches(source, {}, "heat maps"):
        for image, i in zip(images, indices.tolist(), strict=True):
            heat = resize(scored.maps[rows[i]], tuple(image.shape[1:]), smooth=True)
            picture = image[:3].expand(3, -1, -1).cpu() / 255
            drawn = 0.5 * picture + 0.5 * colorize(heat, scale=(0.0, highest))
            to_pil(drawn).save(folder / f"{i:06d}_{float(scored.scores[rows[i]]):.4f}.png")
