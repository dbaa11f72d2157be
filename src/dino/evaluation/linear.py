"""Linear classification on frozen features (section 4.1; appendix F.2)."""

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dino.augment.multicrop import MultiCrop
from dino.augment.resample import resize_crops
from dino.config import CropConfig, DataConfig
from dino.data.classes import numbered_as, same_classes
from dino.data.loader import Loader, rows_of_step
from dino.data.sources import Source
from dino.encoder.encoder import Encoder
from dino.encoder.stored_features import fingerprint
from dino.evaluation.probes import Labelled, Probe, accuracies, paper_features, read_probe, save_probe, train_probes
from dino.machine.progress import tracked
from dino.machine.randomness import generator
from dino.options import LinearOptions

_log = logging.getLogger(__name__)
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


def probes_of(encoder: Encoder, options: LinearOptions) -> list[Probe]:
    """The probes that the options ask for; of a backbone without blocks those that see its pooled features."""
    pools = {"paper": (False, True) if options.grid else (), "off": (False,), "on": (True,), "both": (False, True)}
    probes = paper_probes(
        encoder.embed_dim,
        options.lr or (GRID if options.grid else (LR,)),
        options.n_last_blocks or ((1, 4) if options.grid else ()),
        pools[options.avgpool],
    )
    if encoder.backbone.has_blocks:
        return list(dict.fromkeys(probes))
    _log.warning("this backbone has no blocks to look into: the probes see its pooled features")
    return [Probe(lr, 1, False) for lr in dict.fromkeys(probe.lr for probe in probes)]


def run(
    encoder: Encoder,
    train: Source,
    test: Source,
    val: Source | None = None,
    options: LinearOptions = LinearOptions(),
) -> dict[str, float]:
    """Trains linear classifiers on the frozen backbone's features, and classifies the test images (section 4.1).

    One forward pass a step feeds all probes. Training images are randomly cropped and flipped; ``cached``: their
    features are extracted once, from centre crops. ``out``: file for the chosen probe.

    With validation images, ``linear_top1`` is the probe that is best on them after the last epoch, ``linear_best_top1``
    the probe and epoch that are best on them; test images choose nothing. Without, a single probe is what it is after
    the last epoch. Of every probe there is ``linear_{name}_top1`` after the last epoch. Accuracies are in per cent.

    Raises:
        ValueError: a source has no labels, images to judge by are of classes without train images, or ``out`` and
            nothing to choose one of several probes by.
    """
    probes, batch_size = probes_of(encoder, options), options.batch_size
    if options.out is not None and val is None and len(probes) > 1:
        raise ValueError(f"{len(probes)} probes and no validation images: nothing says which to write to {options.out}")
    if batch_size > len(train):
        _log.warning("there are only %d train images: a batch is all of them, not %d", len(train), batch_size)
        batch_size = len(train)
    sources = {"test": same_classes(train, test, "test")}
    if val is not None:
        sources["validation"] = same_classes(train, val, "validation")

    n = max(probe.n_last_blocks for probe in probes)
    judged = {part: _extract(encoder, source, n) for part, source in sources.items()}
    if options.cached:
        labelled = _extract(encoder, train, n)
        batch_size = min(batch_size, len(labelled.labels))  # Broken images are missing.
        steps_per_epoch = len(labelled.labels) // batch_size
        steps = options.epochs * steps_per_epoch
        batches = _from_memory(labelled, steps, batch_size, options.seed)
    else:
        # An evaluation goes on without broken images, as features do. A crop of 8 % of an image kept at 4 times the
        # crop's size still has as many pixels as it shows.
        data = DataConfig(max_broken=1.0, canvas=4 * encoder.size)
        source = train.with_pixels(encoder.channels, encoder.pixel_range)
        loader = Loader(source, batch_size, data=data, seed=options.seed, device=encoder.device)
        steps_per_epoch = loader.steps_per_epoch
        steps = options.epochs * steps_per_epoch
        batches = _augmented(encoder, train, loader, n, steps, options.seed)
    trained = train_probes(
        tracked(batches, "linear probes", steps, encoder.progress),
        probes,
        epochs=options.epochs,
        steps_per_epoch=steps_per_epoch,
        batch_size=batch_size,
        num_classes=len(train.classes),
        seed=options.seed,
    )
    weights: list[Tensor] = []
    last = best = _Chosen(0, options.epochs, -1.0, None)
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
    if options.out is not None:
        weight = weights[0] if best.weight is None else best.weight
        description = {"epoch": best.epoch, "epochs": options.epochs, "batch_size": batch_size}
        description |= {"cached": options.cached, "seed": options.seed, "classes": train.classes}
        description |= {**encoder.settings, "weights": fingerprint(encoder.backbone)}
        save_probe(options.out, probes[best.which], weight, description)
    return results


def run_saved(encoder: Encoder, source: Source, path: Path | str) -> dict[str, float]:
    """Classifies the images of a source with a probe from a file: one that ``run`` wrote, or a released one.

    A released file names no classes: theirs are taken to be in the order of the source's.

    Raises:
        ValueError: the probe is one of other weights, or does not know a class of the source.
    """
    probe, weight, description = read_probe(path, encoder.embed_dim)
    if description and description["weights"] != fingerprint(encoder.backbone):
        raise ValueError(f"{path} was trained on other weights than these")
    source = numbered_as(source, description.get("classes", source.classes))
    if source.labels is None:
        raise ValueError(
            f"{source.origin}: linear classification needs labels: sort the images into one folder a class"
        )
    if int(source.labels.max()) >= len(weight):
        raise ValueError(f"{path} tells {len(weight)} classes apart, and these images are of others too")
    judged = _extract(encoder, source, probe.n_last_blocks)
    (accuracy,) = accuracies([probe], [weight.to(encoder.device)], judged)
    return _described("linear", probe, accuracy)


def _described(prefix: str, probe: Probe, accuracy: Tensor) -> dict[str, float]:
    results = {"top1": accuracy[0], "top5": accuracy[1], **probe._asdict()}
    # Released files do not say their learning rate.
    return {f"{prefix}_{name}": float(value) for name, value in results.items() if not math.isnan(value)}


def _extract(encoder: Encoder, source: Source, n: int) -> Labelled:
    read = lambda images: encoder.last_blocks(images, n).flatten(1)  # noqa: E731
    features, labels, _ = encoder.features(source, unit_length=False, read=read)
    assert labels is not None
    tokens = features.unflatten(1, (-1, encoder.embed_dim))
    return Labelled(tokens.to(encoder.device), labels.to(encoder.device))


def _from_memory(train: Labelled, steps: int, batch_size: int, seed: int) -> Iterator[Labelled]:
    for step in range(steps):
        rows = rows_of_step(step, len(train.labels), batch_size, seed).to(train.labels.device)
        yield Labelled(train.tokens[rows], train.labels[rows])


def _augmented(encoder: Encoder, source: Source, loader: Loader, n: int, steps: int, seed: int) -> Iterator[Labelled]:
    """RandomResizedCrop (bilinear, as released) and flip, then the backbone; a part of the batch at a time."""
    assert source.labels is not None
    draw = MultiCrop(CropConfig(local_count=0, global_scale=(0.08, 1.0)))
    for step, (canvas, indices) in enumerate(loader.batches(0, steps)):
        draws = draw.sample(canvas.sizes, generator(seed, "linear crops", step))
        boxes, flip = draws.boxes[:, :1], draws.flip[:, :1]  # One view an image.
        parts = []
        for start in range(0, len(indices), encoder.batch_size):
            part = slice(start, start + encoder.batch_size)
            levels = resize_crops(canvas.pixels[part], boxes[part], flip[part], encoder.size, "bilinear")[:, 0]
            parts.append(encoder.last_blocks(levels / 255, n))
        yield Labelled(torch.cat(parts), source.labels[indices].to(encoder.device))
    if loader.broken:
        name, reason = next(iter(loader.broken.items()))
        _log.warning("%d train images cannot be read, others stood in: %s (%s)", len(loader.broken), name, reason)
