"""Classes of several sources, brought to one numbering."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from dino.data.sources import Source


def numbered_as(source: Source, classes: Sequence[str]) -> Source:
    """The same images with the labels numbered as in ``classes``, by name; classes that are not there come after them.

    >>> from dino.data.sources import open_source
    >>> numbered_as(open_source("shapes:10x8"), ["star", "disc"]).classes[:3]
    ['star', 'disc', 'square']
    """
    if source.labels is None or source.classes == list(classes):
        return source
    every = [*classes, *(name for name in source.classes if name not in classes)]
    number = torch.tensor([every.index(name) for name in source.classes])
    return replace(source, labels=number[source.labels], classes=every)


def same_classes(train: Source, source: Source, part: str) -> Source:
    """The images that a classifier learned from ``train`` is judged by, their labels numbered as those of ``train``.

    Raises:
        ValueError: one of the sources has no labels, or ``train`` has no image of a class; names the ``part``.
    """
    if train.labels is None or source.labels is None:
        raise ValueError("classification needs labels: sort the images into one folder a class")
    source = numbered_as(source, train.classes)
    assert source.labels is not None
    assert train.labels is not None
    unseen = [source.classes[i] for i in sorted(set(source.labels.tolist()) - set(train.labels.tolist()))]
    if unseen:
        names = ", ".join(unseen[:5]) + (", ..." if len(unseen) > 5 else "")
        raise ValueError(f"{len(unseen)} classes of the {part} images have no train images: {names}")
    return source
