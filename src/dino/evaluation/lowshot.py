"""Few labels: logistic regression on frozen features (appendix A, tables 10 and 12 of the paper)."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dino.data.classes import same_classes
from dino.data.sources import Source
from dino.encoder.encoder import Encoder
from dino.evaluation.metrics import top_k_hits
from dino.machine.progress import tracked
from dino.machine.randomness import generator
from dino.options import LowshotOptions

# Of the authors' regression (github.com/facebookresearch/dino, issue 121): cyanure's multi-class logistic loss and L2
# penalty of 0.1 / n, without intercept, on L2-normalised [CLS] tokens extracted as for k-NN, in float64. They stop at a
# relative duality gap of 1e-3 or after 100 epochs; here the optimum itself is found.
STRENGTH = LowshotOptions.strength


def stratified_subset(
    labels: Int[Tensor, " n"], *, fraction: float | None = None, per_class: int | None = None, seed: int = 0
) -> Int[Tensor, " m"]:
    """Indices of a share of every class, or of a number of its images; at least one and at most all, drawn by seed.

    Subsets of one seed are nested: that of a smaller share lies in that of a larger one.

    Raises:
        ValueError: not exactly one of ``fraction`` (above 0, at most 1) and ``per_class`` (at least 1).

    >>> labels = torch.tensor([0] * 100 + [1] * 7)
    >>> labels[stratified_subset(labels, fraction=0.1)].bincount().tolist()
    [10, 1]
    """
    if (fraction is None) == (per_class is None):
        raise ValueError("few labels: give either a fraction of every class, or a number of images per class")
    if not (0 < fraction <= 1 if fraction is not None else per_class is not None and per_class >= 1):
        raise ValueError(f"few labels: fraction {fraction}, per class {per_class}: above 0 to 1, or at least 1")
    chosen = []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0]
        count = per_class if fraction is None else max(1, round(fraction * len(members)))
        order = torch.randperm(len(members), generator=generator(seed, "few labels", label))
        chosen.append(members[order[:count]])
    return torch.cat(chosen).sort().values


def inverse_penalty(classes: int, strength: float = STRENGTH) -> float:
    """scikit-learn's C for the objective ``mean loss + lambda / 2 |W|^2`` with ``lambda = strength / n`` (n images).

    scikit-learn minimises ``|W|^2 / 2 + C * sum of losses``. Divided by C n this is ``mean loss + |W|^2 / (2 C n)``, so
    lambda = 1 / (C n) and C = 1 / (lambda n) = 1 / strength, whatever n. Two classes are one row u to scikit-learn,
    where the multi-class objective has two: w and -w by symmetry, u = 2 w. Then ``|W|^2 = 2 |w|^2 = |u|^2 / 2``: the
    same penalty on u needs half the lambda, twice the C.

    >>> inverse_penalty(1000), inverse_penalty(2)
    (10.0, 20.0)
    """
    return (2 if classes == 2 else 1) / strength


def logistic_regression(
    features: Float[Tensor, "n d"], labels: Int[Tensor, " n"], num_classes: int, strength: float = STRENGTH
) -> Float[Tensor, "c d"]:
    """L2-regularised multinomial logistic regression without intercept, at its optimum; in float64.

    The rows of classes that ``labels`` do not hold are zero.

    Raises:
        ValueError: the labels are all of one class.
    """
    from sklearn.linear_model import LogisticRegression  # Slow to import.

    present = labels.unique()
    if len(present) < 2:
        raise ValueError("logistic regression needs at least two classes")
    penalty = inverse_penalty(len(present), strength)
    solver = LogisticRegression(C=penalty, fit_intercept=False, tol=1e-6, max_iter=10_000)
    solver.fit(features.double().cpu().numpy(), labels.cpu().numpy())
    rows = torch.from_numpy(np.asarray(solver.coef_, dtype=np.float64))
    weight = torch.zeros(num_classes, features.shape[1], dtype=torch.float64)
    weight[present.cpu()] = torch.cat([-rows, rows]) / 2 if len(present) == 2 else rows
    return weight


def run(encoder: Encoder, train: Source, test: Source, options: LowshotOptions = LowshotOptions()) -> dict[str, float]:
    """Classifies the test images by logistic regression on the frozen features of few labelled images.

    Gives the mean and the standard deviation (n - 1) over ``subsets`` of the train images, with seeds from ``seed`` on:
    ``{"lowshot_top1": per cent, "lowshot_top1_std": ..., "lowshot_top5": ..., "lowshot_images": mean of a subset}``.

    Raises:
        ValueError: a source has no labels, test images are of classes without train images, or see the functions above.
    """
    test = same_classes(train, test, "test")
    assert train.labels is not None
    fraction = options.fraction if options.per_class or options.fraction else 0.01
    drawn = [
        stratified_subset(train.labels, fraction=fraction, per_class=options.per_class, seed=options.seed + i)
        for i in range(options.subsets)
    ]
    needed = torch.cat(drawn).unique()  # Nothing else is looked at.
    of_train, of_test = encoder.features(train.subset(needed)), encoder.features(test)
    assert of_train.labels is not None
    assert of_test.labels is not None

    readable = needed[of_train.indices]
    accuracies, sizes = [], []
    for subset in tracked(drawn, "regressions", shown=encoder.progress):
        rows = torch.isin(readable, subset)
        few = of_train.features[rows], of_train.labels[rows]
        weight = logistic_regression(*few, len(train.classes), options.strength)
        scores = of_test.features.double() @ weight.mT
        accuracies.append([100 * float(top_k_hits(scores, of_test.labels, k).double().mean()) for k in (1, 5)])
        sizes.append(float(rows.sum()))
    results: dict[str, float] = {}
    for name, values in zip(("top1", "top5"), zip(*accuracies, strict=True), strict=True):
        spread = float(np.std(values, ddof=1)) if options.subsets > 1 else 0.0
        results |= {f"lowshot_{name}": float(np.mean(values)), f"lowshot_{name}_std": spread}
    return {**results, "lowshot_images": float(np.mean(sizes))}
