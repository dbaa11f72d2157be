"""Linear classification on frozen features (section 4.1; appendix F.2)."""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from dino.augment.multicrop import MultiCrop
from dino.augment.resample import resize_crops
from dino.config import IMAGENET_MEAN, IMAGENET_STD, CropConfig, DataConfig
from dino.data.classes import numbered_as, same_classes
from dino.data.loader import Loader, rows_of_step
from dino.data.sources import Source
from dino.encoder.features import extract_features, frozen, last_blocks
from dino.encoder.stored_features import fingerprint
from dino.evaluation.probes import Labelled, Probe, accuracies, paper_features, read_probe, save_probe, train_probes
from dino.machine.randomness import generator

_log = logging.getLogger(__name__)
_FORWARD = 128  # Images a forward pass: a whole batch would need the memory of a large GPU.
LR = 0.001  # The paper's, for 256 images.
GRID = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)


class _Chosen(NamedTuple):
    """What validation images chose: a probe and an epoch. Without them, the only probe at the end."""

    which: int
    epoch: int
    on_val: float
    weight: Tensor | None


def paper_probes(
    embed_dim: int, lrs: Sequence[float] = (LR,), n_last_blocks: Sequence[int] = (), avgpool: Sequence[bool] = ()
) -> list[Probe]:
    """Every combination of the values given; of features not given, the paper's for a ViT of this width.

    >>> [probe.name for probe in paper_probes(384, (0.001, 0.01), avgpool=(False, True))]
    ['n4_lr0.001', 'n4_lr0.01', 'n4_avgpool_lr0.001', 'n4_avgpool_lr0.01']
    """
    paper_n, paper_avgpool = paper_features(embed_dim)
    ns, pools = list(n_last_blocks) or [paper_n], list(avgpool) or [paper_avgpool]
    return [Probe(lr, n, pool) for n in ns for pool in pools for lr in lrs]


def run(
    backbone: nn.Module,
    train_source: Source,
    test_source: Source,
    val_source: Source | None = None,
    *,
    probes: Sequence[Probe] = (),
    epochs: int = 100,
    batch_size: int = 1024,
    cached: bool = False,
    out: Path | None = None,
    seed: int = 0,
    resize: int = 256,
    crop: int = 224,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> dict[str, float]:
    """Trains linear classifiers on the frozen backbone's features, and classifies the test images (section 4.1).

    One forward pass a step feeds all ``probes`` (none given: the paper's one). Training images are randomly cropped and
    flipped; ``cached``: their features are extracted once, from centre crops. ``out``: file for the chosen probe.

    With validation images, ``linear_top1`` is the probe that is best on them after the last epoch, ``linear_best_top1``
    the probe and epoch that are best on them; test images choose nothing. Without, a single probe is what it is after
    the last epoch. Of every probe there is ``linear_{name}_top1`` after the last epoch. Accuracies are in per cent.

    Raises:
        ValueError: a source has no labels, images to judge by are of classes without train images, a number is not
            allowed, or ``out`` and nothing to choose one of several probes by.
    """
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"{epochs} epochs with batches of {batch_size}: each must be at least 1")
    if out is not None and out.suffix != ".safetensors":
        raise ValueError(f"{out} is not allowed: a probe is written as .safetensors")
    probes = list(dict.fromkeys(probes)) or paper_probes(_width(backbone))
    if not hasattr(backbone, "get_intermediate_layers"):
        _log.warning("this backbone has no blocks to look into: the probes see its pooled features")
        probes = [Probe(lr, 1, False) for lr in dict.fromkeys(probe.lr for probe in probes)]
    if out is not None and val_source is None and len(probes) > 1:
        raise ValueError(f"{len(probes)} probes and no validation images: nothing says which to write to {out}")
    if batch_size > len(train_source):
        _log.warning("there are only %d train images: a batch is all of them, not %d", len(train_source), batch_size)
        batch_size = len(train_source)
    sources = {"test": same_classes(train_source, test_source, "test")}
    if val_source is not None:
        sources["validation"] = same_classes(train_source, val_source, "validation")

    read = partial(last_blocks, n=max(probe.n_last_blocks for probe in probes))
    shown: dict[str, Any] = {"crop": crop, "mean": mean, "std": std, "device": device}
    judged = {
        part: _extract(backbone, source, read, resize=resize, progress=progress, **shown)
        for part, source in sources.items()
    }
    if cached:
        train = _extract(backbone, train_source, read, resize=resize, progress=progress, **shown)
        batch_size = min(batch_size, len(train.labels))  # Broken images are missing.
        steps_per_epoch = len(train.labels) // batch_size
        steps = epochs * steps_per_epoch
        batches = _from_memory(train, steps, batch_size, seed)
    else:
        data = DataConfig(max_broken=1.0)  # An evaluation goes on without them, as features do.
        loader = Loader(train_source, batch_size, data=data, seed=seed, device=device)
        steps_per_epoch = loader.steps_per_epoch
        steps = epochs * steps_per_epoch
        batches = _augmented(backbone, train_source, loader, read, steps, seed=seed, **shown)
    trained = train_probes(
        _tracked(batches, steps, progress),
        probes,
        epochs=epochs,
        steps_per_epoch=steps_per_epoch,
        batch_size=batch_size,
        num_classes=len(train_source.classes),
        seed=seed,
    )
    weights: list[Tensor] = []
    last = best = _Chosen(0, epochs, -1.0, None)
    for epoch, weights in enumerate(trained, start=1):
        if "validation" in judged:
            on_val = accuracies(probes, weights, judged["validation"])[:, 0]
            which = int(on_val.argmax())
            last = _Chosen(which, epoch, float(on_val[which]), weights[which])
            if last.on_val > best.on_val:
                best = last._replace(weight=weights[which].clone())

    results: dict[str, float] = {}
    on_test = accuracies(probes, weights, judged["test"])
    if "validation" in judged or len(probes) == 1:
        results |= _described("linear", probes[last.which], on_test[last.which])
    if best.weight is not None:
        (accuracy,) = accuracies([probes[best.which]], [best.weight], judged["test"])
        results["linear_val_top1"] = last.on_val
        results |= _described("linear_best", probes[best.which], accuracy)
        results |= {"linear_best_epoch": best.epoch, "linear_best_val_top1": best.on_val}
    results |= {f"linear_{probe.name}_top1": float(row[0]) for probe, row in zip(probes, on_test, strict=True)}
    if out is not None:
        weight = weights[0] if best.weight is None else best.weight
        description = {"epoch": best.epoch, "epochs": epochs, "batch_size": batch_size, "cached": cached, "seed": seed}
        description |= {"resize": resize, "crop": crop, "weights": fingerprint(backbone)}
        save_probe(out, probes[best.which], weight, {**description, "classes": train_source.classes})
    return results


def run_saved(
    backbone: nn.Module,
    source: Source,
    path: Path | str,
    *,
    resize: int = 256,
    crop: int = 224,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> dict[str, float]:
    """Classifies the images of a source with a probe from a file: one that ``run`` wrote, or a released one.

    A released file names no classes: theirs are taken to be in the order of the source's.

    Raises:
        ValueError: the probe is one of other weights, or does not know a class of the source.
    """
    probe, weight, description = read_probe(path, _width(backbone))
    if description and description["weights"] != fingerprint(backbone):
        raise ValueError(f"{path} was trained on other weights than these")
    classes = description.get("classes", source.classes)
    source = numbered_as(source, classes)
    if source.labels is None:
        raise ValueError("linear classification needs labels: sort the images into one folder a class")
    if int(source.labels.max()) >= len(weight):
        raise ValueError(f"{path} tells {len(weight)} classes apart, and these images are of others too")
    read = partial(last_blocks, n=probe.n_last_blocks)
    judged = _extract(
        backbone, source, read, resize=resize, crop=crop, mean=mean, std=std, device=device, progress=progress
    )
    (accuracy,) = accuracies([probe], [weight.to(device)], judged)
    return _described("linear", probe, accuracy)


def _described(prefix: str, probe: Probe, accuracy: Tensor) -> dict[str, float]:
    results = {"top1": accuracy[0], "top5": accuracy[1], **probe._asdict()}
    # Released files do not say their learning rate.
    return {f"{prefix}_{name}": float(value) for name, value in results.items() if not math.isnan(value)}


def _width(backbone: nn.Module) -> int:
    return int(backbone.embed_dim)  # pyright: ignore[reportArgumentType]


def _extract(backbone: nn.Module, source: Source, read: partial[Tensor], *, device: Any, **shown: Any) -> Labelled:
    def flat(backbone: nn.Module, images: Tensor) -> Tensor:
        return read(backbone, images).flatten(1)

    features, labels, _ = extract_features(
        backbone, source, batch_size=_FORWARD, device=device, normalize=False, read=flat, **shown
    )
    assert labels is not None
    return Labelled(features.unflatten(1, (-1, _width(backbone))).to(device), labels.to(device))


def _from_memory(train: Labelled, steps: int, batch_size: int, seed: int) -> Iterator[Labelled]:
    for step in range(steps):
        rows = rows_of_step(step, len(train.labels), batch_size, seed).to(train.labels.device)
        yield Labelled(train.tokens[rows], train.labels[rows])


def _augmented(
    backbone: nn.Module,
    source: Source,
    loader: Loader,
    read: partial[Tensor],
    steps: int,
    *,
    seed: int,
    crop: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
) -> Iterator[Labelled]:
    """RandomResizedCrop (bilinear, as released) and flip, then the backbone; a part of the batch at a time."""
    assert source.labels is not None
    draw = MultiCrop(CropConfig(local_count=0, global_scale=(0.08, 1.0)))
    shift, scale = (torch.tensor(tuple(v), device=device).view(-1, 1, 1) for v in (mean, std))
    for step, (canvas, indices) in enumerate(loader.batches(0, steps)):
        draws = draw.sample(canvas.sizes, generator(seed, "linear crops", step))
        boxes, flip = draws.boxes[:, :1], draws.flip[:, :1]  # One view an image.
        parts = []
        for start in range(0, len(indices), _FORWARD):
            part = slice(start, start + _FORWARD)
            levels = resize_crops(canvas.pixels[part], boxes[part], flip[part], crop, "bilinear")[:, 0]
            with frozen(backbone, device):
                parts.append(read(backbone, (levels / 255 - shift) / scale).float())
        yield Labelled(torch.cat(parts), source.labels[indices].to(device))
    if loader.broken:
        name, reason = next(iter(loader.broken.items()))
        _log.warning("%d train images cannot be read, others stood in: %s (%s)", len(loader.broken), name, reason)


def _tracked(batches: Iterator[Labelled], steps: int, progress: bool) -> Iterable[Labelled]:
    console = Console(stderr=True)
    shown = progress and console.is_terminal
    return track(batches, "linear probes", total=steps, console=console, transient=True) if shown else batches
