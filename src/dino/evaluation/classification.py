"""What a fine-tuned network says of images: classes with their probabilities, accuracy, and a table."""

import csv
from pathlib import Path
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn

from dino.data.classes import numbered_as
from dino.data.sources import Source
from dino.encoder.encoder import Encoder
from dino.evaluation.metrics import top_k_hits
from dino.machine.files import printable, whole_file


class Predictions(NamedTuple):
    """Of the readable images of a source, in its order."""

    probabilities: Float[Tensor, "n c"]
    labels: Int[Tensor, " n"] | None  # True classes, where the source has them; those that are not known come last.
    indices: Int[Tensor, " n"]  # In the source.
    classes: list[str]


def predict(encoder: Encoder, classifier: nn.Linear, classes: list[str], source: Source) -> Predictions:
    """Classifies every image of a source. Its own labels, if any, are matched by name.

    Raises:
        ValueError: none of the images can be read.
    """
    source = numbered_as(source, classes)
    read = lambda images: classifier(encoder.cls_tokens(images)).detach()  # noqa: E731
    found = encoder.features(source, unit_length=False, read=read)
    return Predictions(found.features.softmax(-1), found.labels, found.indices, classes)


def accuracy(predictions: Predictions) -> dict[str, float]:
    """Top-1 and top-5 accuracy in per cent, over images of known classes; empty where there are none.

    >>> import torch
    >>> accuracy(Predictions(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.tensor([0, 1]), torch.arange(2), ["a", "b"]))
    {'top1': 50.0, 'top5': 100.0}
    """
    if predictions.labels is None:
        return {}
    known = predictions.labels < len(predictions.classes)
    if not known.any():
        return {}
    scores, labels = predictions.probabilities[known], predictions.labels[known]
    return {f"top{k}": 100 * float(top_k_hits(scores, labels, k).float().mean()) for k in (1, 5)}


def write_predictions(path: Path, source: Source, predictions: Predictions) -> None:
    """A CSV: image, the most probable class, its probability, and the true class where the source has labels."""
    values, chosen = predictions.probabilities.max(-1)
    with whole_file(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "predicted", "probability", *(["true"] if source.labels is not None else [])])
        for row, i in enumerate(predictions.indices.tolist()):
            true = [] if source.labels is None else [source.classes[int(source.labels[i])]]
            cells = [printable(source.name(i)), predictions.classes[int(chosen[row])], f"{float(values[row]):.6f}"]
            writer.writerow([*cells, *true])
