"""Image retrieval with frozen features (section 4.2.1, table 3): revisited Oxford and Paris, or any labelled images."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor, nn

from dino.data.plain_pickle import read_plain_pickle
from dino.data.sources import Source, open_source
from dino.encoder.descriptors import extract_descriptors
from dino.encoder.features import Features
from dino.evaluation.ranking import average_precision, learn_whitening, precision_at, ranked_tiles, whiten

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
    backbone: nn.Module, images: Float[Tensor, "b c _ _"], scales: Sequence[float] = SCALES
) -> Float[Tensor, "b d"]:
    """Mean of the [CLS] tokens of the images at several scales (bilinear); not yet of length 1.

    The released code divides by the norm of the *whole batch*, which is one image there; here every row is normalised
    by itself later, so that the batch does not matter. ``multi_scale(...) / multi_scale(...).norm()`` is the former.

    Raises:
        ValueError: an image is too small for the smallest scale.
    """
    tokens = []
    for scale in scales:
        resized = images if scale == 1 else F.interpolate(images, scale_factor=scale, mode="bilinear")
        try:
            tokens.append(backbone(resized).cls_token.float())
        except ValueError as error:
            size = "{} x {}".format(*images.shape[-2:])
            raise ValueError(f"{error} (an image of {size} at scale {scale:.2g}: try --no-multi-scale)") from None
    return torch.stack(tokens).mean(0)


def shrink(image: Image.Image, side: int) -> Image.Image:
    """The image with its longest side at most ``side`` pixels, by Pillow's Lanczos thumbnail; never enlarged."""
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def crop_and_shrink(image: Image.Image, box: Sequence[float], side: int) -> Image.Image:
    """The part of the image in ``box`` (left, top, right, bottom), as large as it is within the shrunk whole image."""
    left, top = (max(0, round(value)) for value in box[:2])
    right, bottom = (min(round(value), end) for value, end in zip(box[2:], image.size, strict=True))
    part = image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
    return shrink(part, max(1, int(side * max(part.size) / max(image.size))))


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
    backbone: nn.Module, ground_truth: Path, *, crop_queries: bool = False, **settings: Any
) -> dict[str, float]:
    """Retrieval on revisited Oxford or Paris: a ``gnd_NAME.pkl`` with the images in ``jpg/`` beside it (table 3).

    ``crop_queries``: show only the query's box, as the data set's authors do; the released DINO code shows the whole
    image. ``settings``: see ``run``. Returns ``{"NAME_medium_map": per cent, "NAME_medium_mp1": ..., ...}``.

    Raises:
        ValueError: the ground truth or an image is missing or cannot be read.
    """
    truth = read_ground_truth(ground_truth)
    name = ground_truth.stem.removeprefix("gnd_")
    if crop_queries and truth.boxes is None:
        raise ValueError(f"{ground_truth} has no boxes: leave --crop-queries away")
    sources = []
    for names in (truth.images, truth.queries):
        paths = [ground_truth.parent / "jpg" / f"{image}.jpg" for image in names]
        if missing := [path for path in paths if not path.is_file()]:
            raise ValueError(f"{len(missing)} of the {len(paths)} images of {name} are missing, the first {missing[0]}")
        sources.append(open_source(paths))
    boxes = truth.boxes if crop_queries else None
    database, queries = _describe(backbone, sources, boxes=boxes, complete=True, **settings)
    results = {}
    for protocol, (aps, precisions) in score_protocols(queries.features, database.features, truth.marks).items():
        if aps.isnan().all():
            _log.warning("%s: no query has anything to find in the protocol %s", name, protocol)
            continue
        results[f"{name}_{protocol}_map"] = 100 * aps.nanmean().item()
        for k, precision in zip(KS, precisions.nanmean(0).tolist(), strict=True):
            results[f"{name}_{protocol}_mp{k}"] = 100 * precision
    return results


def run(backbone: nn.Module, source: Source, **settings: Any) -> dict[str, float]:
    """Retrieval among labelled images: each is a query for the others of its class.

    ``settings``: ``side`` (longest side in pixels, 512), ``scales`` (see ``multi_scale``), ``whitening`` (a source to
    learn it from, or ``"database"``), ``mean``, ``std``, ``batch_size``, ``device``, ``progress``. Returns
    ``{"retrieval_map": mean over images in per cent, "retrieval_class_map": mean over classes, "retrieval_map/CLASS":
    ...}``. An image that is alone in its class is no query.

    Raises:
        ValueError: the images have no labels, or no class has two.
    """
    if source.labels is None:
        raise ValueError(f"{source.origin}: retrieval needs labels: sort the images into one folder a class")
    (found,) = _describe(backbone, [source], **settings)
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
    backbone: nn.Module,
    sources: Sequence[Source],
    *,
    side: int = 512,
    scales: Sequence[float] = SCALES,
    whitening: Source | Literal["database"] | None = None,
    boxes: Sequence[Sequence[float]] | None = None,
    device: torch.device | str = "cpu",
    **settings: Any,
) -> list[Features]:
    """Features of length 1 on the device; the first source is the database, ``boxes`` belong to the last."""
    if side < 1:
        raise ValueError(f"--side {side} is not allowed: at least 1 pixel")

    def extract(source: Source, boxes: Sequence[Sequence[float]] | None = None, **more: Any) -> Features:
        def prepare(image: Image.Image, i: int) -> Image.Image:
            return shrink(image, side) if boxes is None else crop_and_shrink(image, boxes[i], side)

        def describe(backbone: nn.Module, images: Tensor) -> Tensor:
            return F.normalize(multi_scale(backbone, images, scales), dim=1)

        found = extract_descriptors(backbone, source, describe, prepare, device=device, **{**settings, **more})
        return found._replace(features=found.features.to(device))

    found = [extract(source, boxes if source is sources[-1] else None) for source in sources]
    if whitening is None:
        return found
    others = found[0] if whitening == "database" else extract(whitening, complete=False)
    learnt = learn_whitening(others.features)
    return [part._replace(features=whiten(part.features, learnt)) for part in found]
