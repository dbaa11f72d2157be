"""Image retrieval with frozen features (section 4.2.1, table 3): revisited Oxford and Paris, or any labelled images."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor

from dino.data.plain_pickle import read_plain_pickle
from dino.data.sources import Source, open_source
from dino.encoder.descriptors import extract_descriptors
from dino.encoder.encoder import Encoder, Features
from dino.encoder.sizes import by_pillow
from dino.evaluation.ranking import average_precision, learn_whitening, precision_at, ranked_tiles, whiten
from dino.options import RetrievalOptions

SCALES = (1.0, 2**-0.5, 0.5)
KS = (1, 5, 10)
# What counts as found, and what is taken out of the ranking (Radenovic et al. 2018, arXiv 1803.11285, section 3.2).
PROTOCOLS = {
    "easy": (("easy",), ("hard", "junk")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("easy", "junk")),
}
_log = logging.getLogger(__name__)


def multi_scale(
    encoder: Encoder, images: UInt8[Tensor, "b c _ _"] | Float[Tensor, "b c _ _"], scales: Sequence[float] = SCALES
) -> Float[Tensor, "b d"]:
    """Mean of the [CLS] tokens of the images at several scales (bilinear); not yet of length 1.

    The released code divides by the norm of the *whole batch*, which is one image there; here every row is normalised
    by itself later, so that the batch does not matter. ``multi_scale(...) / multi_scale(...).norm()`` is the former.

    Raises:
        ValueError: an image is too small for the smallest scale.
    """
    tokens = []
    images = images.to(encoder.device)  # Resized where the backbone is.
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    for scale in scales:
        resized = images if scale == 1 else F.interpolate(images, scale_factor=scale, mode="bilinear")
        try:
            tokens.append(encoder.cls_tokens(resized))
        except ValueError as error:
            size = "{} x {}".format(*images.shape[-2:])
            way_out = "try --no-multi-scale" if scale < 1 else "try a larger --side"
            raise ValueError(f"{error} (an image of {size} at scale {scale:.2g}: {way_out})") from None
    return torch.stack(tokens).mean(0)


def shrink(image: UInt8[Tensor, "c _ _"], side: int) -> UInt8[Tensor, "c _ _"]:
    """The image with its longest side at most ``side`` pixels, by Pillow's Lanczos thumbnail; never enlarged."""

    def thumbnail(picture: Image.Image) -> Image.Image:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        return picture

    return by_pillow(image, thumbnail)


def crop_and_shrink(image: UInt8[Tensor, "c _ _"], box: Sequence[float], side: int) -> UInt8[Tensor, "c _ _"]:
    """The part of the image in ``box`` (left, top, right, bottom), as large as it is within the shrunk whole image."""
    _, height, width = image.shape
    left, top = (max(0, round(value)) for value in box[:2])
    right, bottom = (min(round(value), end) for value, end in zip(box[2:], (width, height), strict=True))
    part = image[:, top : max(bottom, top + 1), left : max(right, left + 1)]
    return shrink(part, max(1, int(side * max(part.shape[1:]) / max(height, width))))


class GroundTruth(NamedTuple):
    """What the file of a revisited set says: names without ``.jpg``, a box a query, and marks by kind."""

    images: list[str]
    queries: list[str]
    boxes: list[tuple[float, ...]] | None
    marks: dict[str, Bool[Tensor, "q n"]]


def read_ground_truth(path: Path) -> GroundTruth:
    """Reads ``gnd_roxford5k.pkl``, ``gnd_rparis6k.pkl`` or a file of their form, without executing anything in it.

    Raises:
        ValueError: it is not of this form, or holds more than plain data.
    """
    content = read_plain_pickle(path)
    try:
        images, queries, truth = ([*content[key]] for key in ("imlist", "qimlist", "gnd"))
        if len(truth) != len(queries):
            raise ValueError(f"{len(queries)} queries but {len(truth)} ground truths")
        marks = {}
        for kind in ("easy", "hard", "junk"):
            marks[kind] = torch.zeros(len(queries), len(images), dtype=torch.bool)
            for row, entry in zip(marks[kind], truth, strict=True):
                indices = torch.tensor([int(index) for index in entry[kind]], dtype=torch.long)
                if len(indices) and indices.min() < 0:
                    raise ValueError(f"index {indices.min()}")
                row[indices] = True
        boxes = [tuple(map(float, entry["bbx"])) for entry in truth] if all("bbx" in g for g in truth) else None
        if boxes and any(len(box) != 4 for box in boxes):
            raise ValueError("a box without four numbers")
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no ground truth of revisited Oxford or Paris (imlist, qimlist, gnd with easy, hard and junk): "
            f"{type(error).__name__} {error}"
        ) from None
    return GroundTruth([str(name) for name in images], [str(name) for name in queries], boxes, marks)


def score_protocols(
    queries: Float[Tensor, "q d"],
    database: Float[Tensor, "n d"],
    marks: dict[str, Bool[Tensor, "q n"]],
    ks: Sequence[int] = KS,
) -> dict[str, tuple[Float[Tensor, " q"], Float[Tensor, "q k"]]]:
    """Average precision and precision at k of every query, 0 to 1, for the protocols easy, medium and hard.

    Features have length 1. NaN: the query has nothing to find in this protocol, and does not count.
    """
    scores: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in PROTOCOLS}
    for rows, order in ranked_tiles(queries, database):
        ranked = {kind: mark[rows].to(order.device).gather(1, order) for kind, mark in marks.items()}
        for name, (found, removed) in PROTOCOLS.items():
            hits, ignored = (torch.stack([ranked[kind] for kind in kinds]).any(0) for kinds in (found, removed))
            scores[name].append((average_precision(hits, ignored=ignored), precision_at(hits, ks, ignored)))
    return {
        name: (torch.cat([a for a, _ in parts]), torch.cat([p for _, p in parts])) for name, parts in scores.items()
    }


def class_average_precision(features: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Average precision, 0 to 1, of each image as a query for the other images of its class; NaN: it is the only one.

    Features have length 1.
    """
    labels, aps = labels.to(features.device), []
    for rows, order in ranked_tiles(features, features):
        own = order == torch.arange(rows.start, rows.stop, device=order.device)[:, None]
        aps.append(average_precision((labels[order] == labels[rows, None]) & ~own, ignored=own))
    return torch.cat(aps)


def run_revisited(
    encoder: Encoder,
    ground_truth: Path,
    options: RetrievalOptions = RetrievalOptions(),
    whitening: Source | Literal["database"] | None = None,
) -> dict[str, float]:
    """Retrieval on revisited Oxford or Paris: a ``gnd_NAME.pkl`` with the images in ``jpg/`` beside it (table 3).

    Returns ``{"NAME_medium_map": per cent, "NAME_medium_mp1": ..., ...}``. ``whitening``: as in ``run``.

    Raises:
        ValueError: the ground truth or an image is missing or cannot be read.
    """
    truth = read_ground_truth(ground_truth)
    name = ground_truth.stem.removeprefix("gnd_")
    if options.crop_queries and truth.boxes is None:
        raise ValueError(f"{ground_truth} has no boxes: leave --crop-queries away")
    sources = []
    for names in (truth.images, truth.queries):
        paths = [ground_truth.parent / "jpg" / f"{image}.jpg" for image in names]
        if missing := [path for path in paths if not path.is_file()]:
            raise ValueError(f"{len(missing)} of the {len(paths)} images of {name} are missing, the first {missing[0]}")
        sources.append(open_source(paths))
    boxes = truth.boxes if options.crop_queries else None
    database, queries = _describe(encoder, sources, options, whitening, boxes, complete=True)
    results = {}
    for protocol, (aps, precisions) in score_protocols(queries.features, database.features, truth.marks).items():
        if aps.isnan().all():
            _log.warning("%s: no query has anything to find in the protocol %s", name, protocol)
            continue
        results[f"{name}_{protocol}_map"] = 100 * aps.nanmean().item()
        for k, precision in zip(KS, precisions.nanmean(0).tolist(), strict=True):
            results[f"{name}_{protocol}_mp{k}"] = 100 * precision
    return results


def run(
    encoder: Encoder,
    source: Source,
    options: RetrievalOptions = RetrievalOptions(),
    whitening: Source | Literal["database"] | None = None,
) -> dict[str, float]:
    """Retrieval among labelled images: each is a query for the others of its class.

    ``whitening``: images to learn a PCA whitening from; ``"database"``: those that are searched. Returns
    ``{"retrieval_map": mean over images in per cent, "retrieval_class_map": mean over classes, "retrieval_map/CLASS":
    ...}``. An image that is alone in its class is no query.

    Raises:
        ValueError: the images have no labels, or no class has two.
    """
    if source.labels is None:
        raise ValueError(f"{source.origin}: retrieval needs labels: sort the images into one folder a class")
    if options.crop_queries:
        raise ValueError(f"--crop-queries: {source.origin} has no gnd_*.pkl that says what to crop")
    (found,) = _describe(encoder, [source], options, whitening)
    assert found.labels is not None
    aps = class_average_precision(found.features, found.labels)
    if aps.isnan().all():
        raise ValueError(f"{source.origin}: no class has two images, so there is nothing to find")
    by_class = {name: aps[found.labels.cpu() == i].nanmean().item() for i, name in enumerate(source.classes)}
    by_class = {name: 100 * value for name, value in by_class.items() if value == value}
    return {
        "retrieval_map": 100 * aps.nanmean().item(),
        "retrieval_class_map": sum(by_class.values()) / len(by_class),
        **{f"retrieval_map/{name}": value for name, value in by_class.items()},
    }


def _describe(
    encoder: Encoder,
    sources: Sequence[Source],
    options: RetrievalOptions,
    whitening: Source | Literal["database"] | None,
    boxes: Sequence[Sequence[float]] | None = None,
    complete: bool = False,
) -> list[Features]:
    """Features of length 1 on the device; the first source is the database, ``boxes`` belong to the last."""
    scales = SCALES if options.multi_scale else SCALES[:1]

    def extract(source: Source, boxes: Sequence[Sequence[float]] | None = None, complete: bool = complete) -> Features:
        def prepare(image: Tensor, i: int) -> Tensor:
            return shrink(image, options.side) if boxes is None else crop_and_shrink(image, boxes[i], options.side)

        def describe(images: Tensor) -> Tensor:
            return F.normalize(multi_scale(encoder, images, scales), dim=1)

        found = extract_descriptors(encoder, source, describe, prepare, complete=complete)
        return found._replace(features=found.features.to(encoder.device))

    found = [extract(source, boxes if source is sources[-1] else None) for source in sources]
    if whitening is None:
        return found
    others = found[0] if whitening == "database" else extract(whitening, complete=False)
    learnt = learn_whitening(others.features)
    return [part._replace(features=whiten(part.features, learnt)) for part in found]
