"""Every evaluation of the paper in one call: ``dino.evaluate.knn(WEIGHTS, DATA)`` is ``dino eval knn WEIGHTS DATA``.

``weights``: what ``dino.load`` reads, a backbone, or an encoder (``dino.encoder``), which says how images are shown.
``data``: what ``dino.open_source`` opens, or a source. ``options``: the fields of the protocol's class in
``dino.options``, which are the flags of the command. Results are numbers by name, accuracies in per cent.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from dino.data.davis import Year, open_davis
from dino.data.masks import open_boxes, open_masks
from dino.data.sources import Source
from dino.encoder.encoder import Encoder, open_encoder
from dino.evaluation import attention_segmentation as _attention_segmentation
from dino.evaluation import copy_detection as _copy_detection
from dino.evaluation import discovery as _discovery
from dino.evaluation import knn as _knn
from dino.evaluation import linear as _linear
from dino.evaluation import lowshot as _lowshot
from dino.evaluation import retrieval as _retrieval
from dino.evaluation import video_segmentation as _video_segmentation
from dino.evaluation.parts import Data, opened, train_and_test, train_val_test
from dino.options import (
    AttentionSegmentationOptions,
    CopyDetectionOptions,
    DiscoveryOptions,
    KnnOptions,
    LinearOptions,
    LowshotOptions,
    RetrievalOptions,
    VideoSegmentationOptions,
)

Weights = str | Path | nn.Module | Encoder


def knn(weights: Weights, data: Data, test: Data | None = None, **options: Any) -> dict[str, float]:
    """Weighted k-NN (section 4.1): the val part by the train part, ``test`` by DATA, or leave one out."""
    return _knn.run(open_encoder(weights), *train_and_test(data, test), KnnOptions(**options))


def linear(weights: Weights, data: Data, test: Data | None = None, **options: Any) -> dict[str, float]:
    """Linear probes (section 4.1); of several the best on a tenth of the train images, held out where there is no val
    part besides the test images."""
    given = LinearOptions(**options)
    train, val, test, _ = train_val_test(data, test, given.seed)
    encoder = open_encoder(weights)
    if val is None and len(_linear.probes_of(encoder, given)) > 1:
        train, val = train.split(0.1, given.seed)
    return _linear.run(encoder, train, test, val, given)


def lowshot(weights: Weights, data: Data, test: Data | None = None, **options: Any) -> dict[str, float]:
    """Logistic regression on few labels (appendix A)."""
    given = LowshotOptions(**options)
    train, _, test, _ = train_val_test(data, test, given.seed)
    return _lowshot.run(open_encoder(weights), train, test, given)


def retrieval(
    weights: Weights, data: Data, whitening: Source | Literal["database"] | None = None, **options: Any
) -> dict[str, float]:
    """Retrieval (table 3): revisited Oxford or Paris where DATA is a folder with gnd_*.pkl, else among labelled
    images."""
    given, encoder = RetrievalOptions(**options), open_encoder(weights)
    truths = sorted(Path(data).glob("gnd_*.pkl")) if isinstance(data, str | Path) else []
    if not truths:
        return _retrieval.run(encoder, opened(data), given, whitening)
    results: dict[str, float] = {}
    for truth in truths:
        results |= _retrieval.run_revisited(encoder, truth, given, whitening)
    return results


def copy_detection(
    weights: Weights, folder: str | Path, distractors: Data | None = None, whitening: Data | None = None, **options: Any
) -> dict[str, float]:
    """Copy detection on Copydays (table 4)."""
    more = {"distractors": distractors, "whitening": whitening}
    sources = {name: None if data is None else opened(data) for name, data in more.items()}
    return _copy_detection.run(open_encoder(weights), Path(folder), CopyDetectionOptions(**options), **sources)


def video_segmentation(
    weights: Weights, data: str | Path, year: Year = "auto", videos: Sequence[str] = (), **options: Any
) -> dict[str, float]:
    """Video object segmentation on DAVIS (table 5)."""
    found = open_davis(str(data), year, videos)
    return _video_segmentation.run(open_encoder(weights), found, VideoSegmentationOptions(**options))


def attention_segmentation(
    weights: Weights, data: str | Path, split: str = "val", masks: Literal["object", "class"] = "object", **options: Any
) -> dict[str, float]:
    """How well the best attention head outlines each object (figure 4)."""
    labelled = (item.labelled() for item in open_masks(str(data), split, masks))
    samples = ((pixels / 255, labels) for pixels, labels in labelled)
    return _attention_segmentation.run(open_encoder(weights), samples, AttentionSegmentationOptions(**options))


def discovery(weights: Weights, data: str | Path, split: str = "trainval", **options: Any) -> dict[str, float]:
    """Object discovery by LOST and TokenCut (CorLoc)."""
    samples = ((item.pixels() / 255, item.annotation()) for item in open_boxes(str(data), split))
    return _discovery.run(open_encoder(weights), samples, DiscoveryOptions(**options))


__all__ = [
    "attention_segmentation",
    "copy_detection",
    "discovery",
    "knn",
    "linear",
    "lowshot",
    "retrieval",
    "video_segmentation",
]
