"""Sets of images for ``learning.py``, each kept small once, and what a network knows of them.

FOLDER holds the archives that ``SETS`` names.
"""

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2.functional import rgb_to_grayscale

from dino.augment.resample import resize_and_center_crop
from dino.config import Config
from dino.data.decode import to_canvas
from dino.data.loader import rows_of_step
from dino.data.sources import open_source
from dino.evaluation.knn import knn_classify
from dino.evaluation.metrics import rankme
from dino.evaluation.probes import Labelled, Probe, accuracies, train_probes
from dino.machine import device as hardware
from dino.machine.randomness import generator
from dino.models.backbone import Tokens

# Name -> pixels an image is kept at, and its parts: what ``open_source`` takes, files of FOLDER before "/".
SETS: dict[str, tuple[int, dict[str, list[str]]]] = {
    "imagenette": (128, {"train": ["imagenette-train-*.tar"], "val": ["imagenette-val.tar"]}),
    "imagenette-full": (224, {"train": ["imagenette-train-*.tar"], "val": ["imagenette-val.tar"]}),
    "cifar10": (32, {"train": ["cifar10-12k.zip"], "val": ["cifar10-12k.zip"]}),
    "shapes": (48, {"train": ["shapes:2000x48"], "val": ["shapes:2000x48"]}),
    "digits": (8, {"train": [], "val": []}),  # Of scikit-learn: 1,797 grey images, every fifth judges.
}
# Made of another: how many of its train images (all: None), and without colour or with.
PARTS_OF: dict[str, tuple[str, int | None, bool]] = {
    "imagenette-1k": ("imagenette", 1000, False),
    "imagenette-3k": ("imagenette", 3000, False),
    "imagenette-grey": ("imagenette", None, True),
}
LRS = (0.001, 0.003, 0.01, 0.03, 0.1)  # Of the linear probes, for 256 images.


def keep_small(name: str, folder: Path, work: Path) -> Path:
    """The set as small PNG files, one folder a class, and ``pixels.pt`` of the same: decoded once."""
    out = work / "data" / name
    if not (out / "pixels.pt").exists():
        if name in PARTS_OF:
            kept = _part_of(*PARTS_OF[name], folder, work)
        else:
            side, parts = SETS[name]
            kept = {part: _pixels(name, part, wanted, folder, side) for part, wanted in parts.items()}
        for part, (images, labels) in kept.items():
            _write_images(out / part, images, labels)
        torch.save(kept, out / "pixels.partial")
        os.replace(out / "pixels.partial", out / "pixels.pt")
    return out


def _part_of(whole: str, count: int | None, grey: bool, folder: Path, work: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Some train images of another set, drawn once for all seeds; its val images are the judges of all parts."""
    kept = torch.load(keep_small(whole, folder, work) / "pixels.pt")
    images, labels = kept["train"]
    rows = torch.randperm(len(labels), generator=generator(0, "part"))[:count]
    kept["train"] = images[rows], labels[rows]
    if grey:
        kept = {part: (rgb_to_grayscale(images, 3), labels) for part, (images, labels) in kept.items()}
    return kept


def _pixels(name: str, part: str, wanted: list[str], folder: Path, side: int) -> tuple[Tensor, Tensor]:
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        rows = (torch.arange(len(digits.target)) % 5 == 0) == (part == "val")
        images = (torch.from_numpy(digits.images)[rows] * 255 / 16).round().byte()
        return images[:, None].expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(digits.target)[rows].long()
    data = [str(path) for one in wanted for path in sorted(folder.glob(one))] or wanted
    source = open_source(data)
    source = source.parts.get(part, source)
    if source.labels is None:
        raise ValueError(f"{data} has no labels to judge by")
    images = []
    for i in range(len(source)):
        image = source.load(i, 2 * side)
        small = resize_and_center_crop(image[None], torch.tensor([image.shape[-2:]]), side, side)
        images.append((small[0] * 255).round().clamp(0, 255).byte())
    return torch.stack(images), source.labels


def _write_images(folder: Path, images: Tensor, labels: Tensor) -> None:
    from PIL import Image

    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        path = folder / str(label) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, compress_level=1)


class Pixels(nn.Module):
    """The images themselves as features."""

    def forward(self, images: Tensor) -> Tokens:
        return Tokens(images.flatten(1), images.flatten(1)[:, None, None])


@torch.inference_mode()
def judged(backbone: nn.Module, data: Path, config: Config, size: int, linear: bool = True) -> dict[str, float]:
    """k-NN(20) of the [CLS] token (or pooled features), linear probes on it and with the mean patch, RankMe."""
    device = hardware.choose_device(config.run.device)
    backbone.eval().to(device)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (config.crops.mean, config.crops.std))
    kept = torch.load(data / "pixels.pt")
    tokens, labels = [], []
    for part in ("train", "val"):
        rows = []
        for images in kept[part][0].split(256):
            canvas = to_canvas(list(images), *images.shape[-2:])
            shown = (resize_and_center_crop(*canvas, round(size * 256 / 224), size) - mean) / std
            found = backbone(shown.to(device))
            rows.append(torch.stack([found.cls_token, found.patch_tokens.flatten(1, 2).mean(1)], 1).float().cpu())
        tokens.append(torch.cat(rows))
        labels.append(kept[part][1])
    unit = [F.normalize(part[:, 0], dim=-1) for part in tokens]
    found = {
        "knn_20": knn_classify(unit[0], labels[0], unit[1], labels[1], ks=(20,))["knn_20_top1"],
        "rankme": float(rankme(unit[0])),
    }
    if linear:
        shift, scale = tokens[0].mean(0), tokens[0].std(0).clamp_min(1e-6)
        train, val = (Labelled((part - shift) / scale, known) for part, known in zip(tokens, labels, strict=True))
        found |= {"linear": _linear(train, val, False), "linear_mean": _linear(train, val, True)}
    return {name: round(value, 2) for name, value in found.items()}


def _linear(train: Labelled, val: Labelled, avgpool: bool, epochs: int = 30, batch: int = 512) -> float:
    """Probes of a grid of learning rates on stored, standardised features; a tenth of the train images chooses."""
    chooses = torch.rand(len(train.labels), generator=generator(0, "probe")) < 0.1
    fits, chosen_by = (Labelled(train.tokens[rows], train.labels[rows]) for rows in (~chooses, chooses))
    batch = min(batch, len(fits.labels))
    steps = len(fits.labels) // batch
    order = (rows_of_step(step, len(fits.labels), batch, 0) for step in range(steps * epochs))
    batches = (Labelled(fits.tokens[rows], fits.labels[rows]) for rows in order)
    probes = [Probe(lr, 1, avgpool) for lr in LRS]
    classes = int(train.labels.max()) + 1
    *_, weights = train_probes(
        batches, probes, epochs=epochs, steps_per_epoch=steps, batch_size=batch, num_classes=classes
    )
    best = int(accuracies(probes, weights, chosen_by)[:, 0].argmax())
    return float(accuracies([probes[best]], [weights[best]], val)[0, 0])
