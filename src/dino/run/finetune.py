"""Fine-tuning: a backbone and a linear classifier on its [CLS] token, trained together on labelled images."""

import contextlib
import copy
import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer
from torchvision.transforms import v2

from dino.augment.multicrop import MultiCrop
from dino.augment.resample import resize_crops
from dino.config import CropConfig, DataConfig, ModelConfig, Preprocessing
from dino.data.classes import same_classes
from dino.data.decode import Canvas
from dino.data.loader import Loader
from dino.data.sources import Source
from dino.encoder.encoder import Encoder, open_encoder
from dino.encoder.stored_features import fingerprint
from dino.evaluation.classification import accuracy, predict, write_predictions
from dino.evaluation.parts import Data, opened
from dino.machine import device as hardware
from dino.machine.files import write_text
from dino.machine.randomness import generator, seeded
from dino.method.layers import layered_groups
from dino.method.optim import clip_gradients, make_optimizer, set_schedule
from dino.method.schedules import warmup_cosine
from dino.models.backbone import as_backbone
from dino.models.vision_transformer import VisionTransformer
from dino.models.weights import load_classifier, name_of, save_backbone
from dino.options import FinetuneOptions
from dino.run.checkpoint import Saver, State, load_latest
from dino.run.folder import own
from dino.run.interruption import Interruption, Stopped, interruption
from dino.run.logbook import Logbook

CLIP = 1.0  # The norm of all gradients together is held below it.
_BEST = "best.safetensors"  # Until the run ends.
_SPEED_ONLY = ("save_every", "patience")  # May differ in a run that goes on.


class Classifier(nn.Module):
    """A backbone with a linear layer on its [CLS] token (a convnet's pooled features)."""

    def __init__(self, backbone: nn.Module, classes: int, seed: int = 0) -> None:
        super().__init__()
        self.backbone = as_backbone(backbone)
        self.classifier = nn.Linear(int(self.backbone.embed_dim), classes)
        nn.init.trunc_normal_(self.classifier.weight, std=0.02, generator=generator(seed, "classifier"))
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        return self.classifier(self.backbone.cls_tokens([images])[0])


class Augmentation:
    """From a batch as it is to what the network is shown, and its targets; randomness from (seed, step) alone.

    A random crop (8 % of the area or more) and a flip by this package, the rest by torchvision.
    """

    def __init__(self, encoder: Encoder, classes: int, options: FinetuneOptions) -> None:
        self.encoder, self.seed = encoder, options.seed
        self.crop = MultiCrop(CropConfig(local_count=0, global_scale=(0.08, 1.0)))
        # Their colour operations know grey and RGB alone.
        kinds = {"trivial": v2.TrivialAugmentWide, "rand": v2.RandAugment} if encoder.channels in (1, 3) else {}
        self.each = kinds[options.augment]() if options.augment in kinds else None
        self.erase = v2.RandomErasing(options.erase)
        chosen = [(v2.MixUp, options.mixup), (v2.CutMix, options.cutmix)]
        mixes = [mix(alpha=alpha, num_classes=classes) for mix, alpha in chosen if alpha > 0]
        self.mix: Callable[..., Any] | None = v2.RandomChoice(mixes) if mixes and classes > 1 else None

    def __call__(
        self, canvas: Canvas, labels: Int[Tensor, " b"], step: int
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b classes"] | Int[Tensor, " b"]]:
        draws = self.crop.sample(canvas.sizes, generator(self.seed, "finetune crops", step))
        boxes, flip = draws.boxes[:, :1], draws.flip[:, :1]  # One view an image.
        levels = resize_crops(canvas.pixels, boxes, flip, self.encoder.size, "bilinear")[:, 0]
        with seeded(self.seed, "finetune", step):  # torchvision draws from torch's own generator.
            if self.each is not None:
                levels = torch.stack([self.each(image) for image in levels.to(torch.uint8)])
            images = self.encoder.normalize(levels / 255)
            if self.erase.p > 0:
                images = torch.stack([self.erase(image) for image in images])
            return self.mix(images, labels) if self.mix is not None else (images, labels)


@dataclass
class _Run:
    """A run under way; ``history``: val accuracy of every epoch so far."""

    model: Classifier
    ema: ModelEmaV3
    optimizer: Optimizer
    start: int
    history: list[float]

    def state(self, step: int, known: dict[str, Any]) -> State:
        return {
            "step": step,
            "known": json.dumps(known),
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": list(self.history),
        }

    def resume(self, state: State, known: dict[str, Any], out: Path) -> None:
        before = json.loads(state["known"])
        differing = [name for name in known if before.get(name) != known[name]]
        if differing:
            values = ", ".join(f"{name} {before.get(name)} there, {known[name]} now" for name in differing)
            raise ValueError(f"--out {out} holds a run with other settings ({values}): use another --out")
        self.model.load_state_dict(state["model"])
        self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.start, self.history = state["step"], list(state["history"])


def finetune(
    weights: str | Path | nn.Module | Encoder,
    data: Data,
    out: str | os.PathLike[str],
    test: Data | None = None,
    *,
    precision: str = "auto",
    quiet: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Trains backbone and classifier on labelled images; the same call on the same folder resumes.

    Args:
        weights: what ``dino.load`` reads, a backbone, or an encoder, which says at which size images are shown.
        data: its train part is learnt from, its val part (or a share held out by seed) chooses the epoch.
        out: the run folder: ``backbone.safetensors`` (backbone and classifier, the average of the best epoch),
            ``predictions.csv`` (of ``test``, else of val), ``metrics.jsonl``, ``checkpoints/``, ``results.json``.
        test: images to be judged by; without, the accuracy is that on val, which chose the epoch.
        precision: of the steps: ``auto``, ``float32`` or ``bfloat16``.
        options: the fields of ``FinetuneOptions``.

    Raises:
        Stopped: a signal asked the run to stop; it is saved, and the same call goes on from there.
        ValueError: there are no labels, or the folder holds another run.
        FloatingPointError: the loss is not finite.
    """
    given, folder = FinetuneOptions(**options), Path(out)
    train, val, judge = _parts(data, test, given)
    encoder = open_encoder(weights)
    if isinstance(weights, Encoder | nn.Module):  # It may be used further on.
        encoder = dataclasses.replace(encoder, backbone=copy.deepcopy(encoder.backbone))
    encoder = dataclasses.replace(encoder, progress=encoder.progress and not quiet)
    known = {
        "weights": fingerprint(encoder.backbone),
        **{name: value for name, value in dataclasses.asdict(given).items() if name not in _SPEED_ONLY},
        **json.loads(json.dumps(encoder.settings)),
        "steps_in": precision,
        "images": len(train),
        "classes": train.classes,
    }
    device = torch.device(encoder.device)
    with hardware.prepared(device), interruption() as asked, own(folder), contextlib.ExitStack() as resources:
        if (done := _finished(folder, known)) is not None:
            return done
        return _train(encoder, train, val, judge, folder, given, known, precision, quiet, asked, resources)


def _train(
    encoder: Encoder,
    train: Source,
    val: Source,
    test: Source | None,
    out: Path,
    options: FinetuneOptions,
    known: dict[str, Any],
    precision: str,
    quiet: bool,
    asked: Interruption,
    resources: contextlib.ExitStack,
) -> dict[str, Any]:
    device, batch = torch.device(encoder.device), min(options.batch_size, len(train))
    model = Classifier(encoder.backbone, len(train.classes), options.seed).to(device)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    if isinstance(backbone := model.backbone, VisionTransformer):
        depth = len(backbone.drop_path_rates)
        backbone.drop_path_rates = [options.drop_path * i / max(depth - 1, 1) for i in range(depth)]
    groups = layered_groups(model, options.layer_decay)
    run = _Run(model, ModelEmaV3(model, options.ema, use_warmup=True), make_optimizer("adamw", model, groups), 0, [])
    state = load_latest(out / "checkpoints")
    if state is not None:
        run.resume(state, known, out)
    images = train.with_pixels(encoder.channels, encoder.pixel_range)
    canvas = DataConfig(canvas=round(encoder.size * 16 / 7))
    loader = Loader(images, batch, data=canvas, seed=options.seed, device=device)
    each = loader.steps_per_epoch
    total = options.epochs * each
    warmup = min(options.warmup * each, total // 5)

    book = Logbook(out, total, run.start, quiet=quiet)
    resources.callback(book.close)
    saver = Saver(out / "checkpoints", minutes=options.save_every, steps=1, keep=2, milestones=0, warn=book.warn)
    resources.callback(saver.close)
    said = f"resumed after step {run.start}" if run.start else f"{options.epochs} epochs of {each} steps"
    book.say(f"{train.description}; {len(val)} val images; batches of {batch}; {device}; {said}")

    augment = Augmentation(encoder, len(train.classes), options)
    labels, peak = train.labels, options.lr * batch / 256
    assert labels is not None
    autocast, losses = hardware.autocast(device, precision), list[Tensor]()
    model.train()
    for step, (canvas, indices) in enumerate(loader.batches(run.start, total), start=run.start):
        set_schedule(run.optimizer, warmup_cosine(step, peak, 0.0, total, warmup), options.weight_decay)
        shown, targets = augment(canvas, labels[indices].to(device), step)
        with autocast, seeded(options.seed, "finetune network", step):  # Drop path draws too.
            logits = model(shown)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=options.label_smoothing)
        run.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clip_gradients(model.parameters(), CLIP, "global")
        run.optimizer.step()
        run.ema.update(model, step + 1)
        losses.append(loss.detach())
        if (step + 1) % each == 0:
            _end_of_epoch(run, encoder, val, out, step + 1, torch.stack(losses), book)
            losses.clear()
        stops = (step + 1) % each == 0 and _stops(run.history, options.patience)
        if asked.asked or stops or step + 1 == total or saver.due(step + 1):
            saver.save(step + 1, run.state(step + 1, known))
        if asked.asked and not stops and step + 1 < total:
            if not saver.wait():
                raise OSError("stopped, but the checkpoint could not be written: the same command repeats some steps")
            raise Stopped(f"stopped after step {step + 1} of {total}; the same command goes on from there", step + 1)
        if stops:
            break
    saver.wait()
    return _finish(run, encoder, val, test, out, known, loader.broken)


def _end_of_epoch(
    run: _Run, encoder: Encoder, val: Source, out: Path, step: int, losses: Float[Tensor, " n"], book: Logbook
) -> None:
    """Judges the average of the weights, and keeps it if it is the best so far (of equals the later)."""
    loss = float(losses.mean())
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is not finite before step {step}: take a smaller --lr")
    found = _judged(encoder, run.ema.module, val)["top1"]
    run.history.append(found)
    book.write(step, {"loss": loss, "val_top1": found})
    book.say(f"epoch {len(run.history)}: loss {loss:.3f}, val {found:.1f} %")
    if found >= max(run.history):
        _save(run.ema.module, encoder, val.classes, out / _BEST)


def _judged(encoder: Encoder, model: Any, source: Source) -> dict[str, float]:
    shown = dataclasses.replace(encoder, backbone=model.backbone, progress=False)
    return accuracy(predict(shown, model.classifier, source.classes, source))


def _save(model: Any, encoder: Encoder, classes: Sequence[str], path: Path) -> None:
    low_high = encoder.pixel_range
    shown = Preprocessing(
        encoder.size, encoder.resize, tuple(encoder.mean), tuple(encoder.std), encoder.channels, low_high
    )
    config = ModelConfig(name_of(model.backbone), patch_size=encoder.patch_size)
    save_backbone(model.backbone, path, config, shown, classifier=(model.classifier, classes))


def _stops(history: Sequence[float], patience: int) -> bool:
    """Whether the last ``patience`` epochs were all worse than the best before them.

    >>> _stops([50.0, 60.0, 55.0], 2), _stops([50.0, 60.0, 55.0, 59.0], 2), _stops([60.0, 60.0, 60.0], 2)
    (False, True, False)
    """
    best = max(history)
    return patience > 0 and len(history) - 1 - max(i for i, value in enumerate(history) if value == best) >= patience


def _finish(
    run: _Run, encoder: Encoder, val: Source, test: Source | None, out: Path, known: dict[str, Any], broken: dict
) -> dict[str, Any]:
    if (out / _BEST).exists():
        os.replace(out / _BEST, out / "backbone.safetensors")
    best = max(run.history)
    results: dict[str, Any] = {
        "epochs": len(run.history),
        "best_epoch": max(i for i, value in enumerate(run.history, start=1) if value == best),
        "val_top1": best,
        "broken": len(broken),
    }
    # From the file, as whoever opens it will find it.
    backbone, classifier, classes, _ = load_classifier(out / "backbone.safetensors", encoder.device)
    encode = dataclasses.replace(encoder, backbone=backbone)
    judge = val if test is None else test
    predictions = predict(encode, classifier, classes, judge)
    write_predictions(out / "predictions.csv", judge, predictions)
    results |= accuracy(predictions)
    results |= {"judged_by": "val, which chose the epoch" if test is None else test.origin, "images": len(judge)}
    write_text(out / "results.json", json.dumps({"results": results, "known": known}, indent=2))
    return results


def _finished(out: Path, known: dict[str, Any]) -> dict[str, Any] | None:
    """The results of a run with the same settings that is complete."""
    with contextlib.suppress(OSError, json.JSONDecodeError, KeyError):
        written = json.loads((out / "results.json").read_text())
        if written["known"] == known and (out / "backbone.safetensors").is_file():
            return written["results"]
    return None


def _parts(data: Data, test: Data | None, options: FinetuneOptions) -> tuple[Source, Source, Source | None]:
    """What is learnt from, what chooses the epoch, and what judges (None: the same)."""
    source = opened(data)
    train, val = source.parts.get("train", source), source.parts.get("val")
    if train.labels is None:
        raise ValueError(f"{train.origin}: fine-tuning needs labels: sort the images into one folder a class")
    if len(train.classes) < 2:
        raise ValueError(f"{train.origin} has one class: a classifier needs at least two")
    if val is None or "train" not in source.parts:
        train, val = train.split(options.val_fraction, options.seed)
    if not len(val):
        raise ValueError(f"{train.origin}: no class has two images, so that none can be held out to choose by")
    judge = None if test is None else same_classes(train, _judge(test), "test")
    return train, same_classes(train, val, "val"), judge


def _judge(data: Data) -> Source:
    """The val or test part of DATA, else all of it."""
    source = opened(data)
    return source.parts.get("val", source)
