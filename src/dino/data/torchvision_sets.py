"""Public data sets by name, through torchvision."""

import functools
import os
from pathlib import Path
from typing import Any

import torch
import torchvision.datasets
from jaxtyping import Int64
from torch import Tensor

# Name -> (torchvision class, what selects the train part, what selects the val part).
TORCHVISION: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "cifar10": ("CIFAR10", {"train": True}, {"train": False}),
    "cifar100": ("CIFAR100", {"train": True}, {"train": False}),
    "mnist": ("MNIST", {"train": True}, {"train": False}),
    "fashion-mnist": ("FashionMNIST", {"train": True}, {"train": False}),
    "stl10": ("STL10", {"split": "train"}, {"split": "test"}),
    "stl10-unlabeled": ("STL10", {"split": "unlabeled"}, {"split": "test"}),
    "svhn": ("SVHN", {"split": "train"}, {"split": "test"}),
    "imagenette": ("Imagenette", {"split": "train", "size": "320px"}, {"split": "val", "size": "320px"}),
    "flowers102": ("Flowers102", {"split": "train"}, {"split": "test"}),
    "food101": ("Food101", {"split": "train"}, {"split": "test"}),
    "oxford-pets": ("OxfordIIITPet", {"split": "trainval"}, {"split": "test"}),
    "aircraft": ("FGVCAircraft", {"split": "trainval"}, {"split": "test"}),
    "dtd": ("DTD", {"split": "train"}, {"split": "test"}),
}


@functools.lru_cache(maxsize=4)
def torchvision_set(name: str, part: str) -> Any:
    """The data set ``name`` of TORCHVISION, part ``train`` or ``val``, from ``DINO_DATA`` or else ~/.cache/dino/data.

    Downloads it where it is not there yet. Kept, so that a process builds it once.

    Raises:
        ValueError: it is not there and cannot be downloaded; says why.
    """

    kind, *selects = TORCHVISION[name]
    root = Path(os.environ.get("DINO_DATA", "~/.cache/dino/data")).expanduser()
    make = functools.partial(getattr(torchvision.datasets, kind), root, **selects[part == "val"])
    try:
        root.mkdir(parents=True, exist_ok=True)
        try:
            return make(download=False)
        except RuntimeError:  # Not there yet.
            return make(download=True)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{name} is not in {root} (set DINO_DATA) and cannot be downloaded: {reason}") from None


def labels_and_classes(dataset: Any) -> tuple[Int64[Tensor, " n"] | None, list[str]]:
    """What torchvision keeps under a different name in nearly every class; (None, []) for unlabelled images."""
    kept = next((getattr(dataset, name) for name in ("targets", "labels", "_labels") if hasattr(dataset, name)), None)
    labels = torch.as_tensor([label for _, label in dataset._samples] if kept is None else kept, dtype=torch.int64)
    if (labels < 0).any():
        return None, []
    classes = getattr(dataset, "classes", range(int(labels.max()) + 1))
    return labels, [str(name[0] if isinstance(name, tuple) else name) for name in classes]
