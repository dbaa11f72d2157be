"""Weighted nearest-neighbour classification of frozen features (section 4.1, "k-NN"; appendix F.1)."""

import logging
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dino.data.classes import same_classes
from dino.data.sources import Source
from dino.encoder.encoder import Encoder
from dino.encoder.neighbors import nearest_neighbors
from dino.encoder.stored_features import stored_features
from dino.evaluation.metrics import top_k_hits
from dino.options import KnnOptions

_log = logging.getLogger(__name__)


def knn_votes(
    similarities: Float[Tensor, "n k"],
    neighbor_labels: Int[Tensor, "n k"],
    ks: Sequence[int],
    num_classes: int,
    temperature: float = 0.07,
) -> Iterator[tuple[int, Float[Tensor, "n c"]]]:
    """Votes of the k nearest neighbours for each class, for every k in one pass: sums of exp(similarity / temperature).

    The neighbours come nearest first; every k is at most their number. Yields (k, votes in float64, so that small
    temperatures do not overflow), k ascending. The same tensor is added to between two yields: copy what is to be kept.

    >>> similar, labels = torch.tensor([[0.9, 0.8, 0.7]]), torch.tensor([[1, 0, 0]])
    >>> [(k, votes.argmax(1).item()) for k, votes in knn_votes(similar, labels, (1, 3), num_classes=2, temperature=1.0)]
    [(1, 1), (3, 0)]
    """
    weights = (similarities.double() / temperature).exp()
    votes = weights.new_zeros(len(weights), num_classes)
    done = 0
    for k in sorted(set(ks)):
        votes.scatter_add_(1, neighbor_labels[:, done:k].long(), weights[:, done:k])
        done = k
        yield k, votes


def knn_classify(
    train_features: Float[Tensor, "n d"],
    train_labels: Int[Tensor, " n"],
    test_features: Float[Tensor, "m d"] | None = None,
    test_labels: Int[Tensor, " m"] | None = None,
    *,
    ks: Sequence[int] = KnnOptions.k,
    temperature: float = 0.07,
    num_classes: int | None = None,
    tile: int = 1024,
) -> dict[str, float]:
    """Accuracy of the weighted vote of the k nearest neighbours, the paper's k-NN protocol.

    Features are L2-normalised, so a dot product is a cosine. Without a test set every train image is classified by the
    others (leave one out). Top-5 is strict: a class without a vote is never credited, and k < 5 neighbours give at most
    k classes. A k above the number of images is lowered to it, with a note in the log; the result keeps its name.

    Returns ``{"knn_10_top1": per cent, "knn_10_top5": ..., ...}``. Memory is bounded by ``tile`` test images.

    Raises:
        ValueError: no image to learn from or to classify, a k or temperature not above 0, or a label out of range.
    """
    leave_one_out = test_features is None or test_labels is None
    if leave_one_out:
        test_features, test_labels = train_features, train_labels
    assert test_features is not None
    assert test_labels is not None
    available = len(train_features) - leave_one_out
    if available < 1 or len(test_features) < 1:
        raise ValueError(
            f"k-NN has {len(train_features)} train and {len(test_features)} test images: it needs at least one of each "
            "(two in all without a test set)"
        )
    if not ks or min(ks) < 1 or temperature <= 0:
        raise ValueError(f"k-NN with k = {tuple(ks)} and temperature {temperature}: each must be above 0")
    train_labels, test_labels = train_labels.cpu(), test_labels.cpu()
    present = torch.cat([train_labels, test_labels])
    if num_classes is None:
        num_classes = int(present.max()) + 1
    if present.min() < 0 or present.max() >= num_classes:
        raise ValueError(
            f"k-NN labels run from {present.min()} to {present.max()}: they must be 0 to {num_classes - 1}"
        )
    if max(ks) > available:
        _log.warning(
            "k-NN: only %d neighbours exist, so k = %s use them all", available, [k for k in ks if k > available]
        )

    clamped = {k: min(k, available) for k in ks}
    hits = {(k, top): 0 for k in clamped.values() for top in (1, 5)}
    for start in range(0, len(test_features), tile):
        rows = slice(start, start + tile)
        similarities, indices = nearest_neighbors(
            test_features[rows], train_features, max(clamped.values()), skip_from=start if leave_one_out else None
        )
        truth = test_labels[rows]
        # The vote is small: it is counted on the CPU, where float64 always exists.
        for k, votes in knn_votes(
            similarities.cpu(), train_labels[indices.cpu()], list(clamped.values()), num_classes, temperature
        ):
            voted = votes.gather(1, truth[:, None].long())[:, 0] > 0
            for top in (1, 5):
                hits[k, top] += int((top_k_hits(votes, truth, min(top, k)) & voted).sum())
    return {f"knn_{k}_top{top}": 100 * hits[clamped[k], top] / len(test_features) for k in ks for top in (1, 5)}


def run(
    encoder: Encoder, train: Source, test: Source | None = None, options: KnnOptions = KnnOptions()
) -> dict[str, float]:
    """Classifies the test images by their nearest train images in the encoder's features (section 4.1).

    No test source: leave one out on the train source. Results as in ``knn_classify``.

    Raises:
        ValueError: a source has no labels, the test source has a class that the train source has not, or the file
            of features holds those of something else.
    """
    if train.labels is None:
        raise ValueError(f"{train.origin}: k-NN needs labels: sort the images into one folder a class")
    sources = {"train": train}
    if test is not None:
        sources["test"] = same_classes(train, test, "test")
    found = stored_features(options.features, encoder, sources)
    of_train, of_test = found["train"], found.get("test")
    assert of_train.labels is not None
    return knn_classify(
        of_train.features.to(encoder.device),
        of_train.labels,
        of_test.features.to(encoder.device) if of_test else None,
        of_test.labels if of_test else None,
        ks=options.k,
        temperature=options.temperature,
    )
