"""Segmentation by a head on the patch tokens of a frozen backbone: what it learns, what it says, how good it is."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dino.data.davis import resize_labels
from dino.data.masks import Annotated
from dino.encoder.encoder import Encoder
from dino.encoder.sizes import resized
from dino.encoder.stored_features import fingerprint
from dino.evaluation.segmentation_heads import DPT_BLOCKS, LinearHead, make_head, train_dpt, train_linear, unit_of
from dino.machine.files import whole_file
from dino.machine.progress import tracked
from dino.machine.randomness import generator, seeded
from dino.models.weights import cpu_state
from dino.options import SegmentOptions

_KEY = "dino_segmentation"


class Segmenter(NamedTuple):
    """A head with what it depends on besides the weights."""

    head: nn.Module
    values: list[int]  # Of the masks, one a class.
    options: SegmentOptions  # With the size that images were seen at.


def seen_size(height: int, width: int, size: int, unit: int) -> tuple[int, int]:
    """Height and width with the shorter side near ``size``, both in whole units (patches), at least one.

    >>> seen_size(480, 854, 224, 16), seen_size(10, 10, 8, 16)
    ((224, 400), (16, 16))
    """
    scale = size / min(height, width) / unit
    return max(1, round(height * scale)) * unit, max(1, round(width * scale)) * unit


def numbered(labels: Int64[Tensor, "h w"], values: Sequence[int]) -> Int64[Tensor, "h w"]:
    """Values of a mask as numbers of classes (``values`` ascend); all others are -1.

    >>> numbered(torch.tensor([[0, 255, 7]]), [0, 255]).tolist()
    [[0, 1, -1]]
    """
    known = torch.tensor(values)
    place = torch.searchsorted(known, labels).clamp_max(len(known) - 1)
    return torch.where(known[place] == labels, place, -1)


def shares(labels: Int64[Tensor, "h w"], classes: int, grid: tuple[int, int]) -> Float[Tensor, "gh gw {classes}"]:
    """Which share of every patch's pixels each class has; void pixels (-1) have none, so that they may sum to less.

    With logits that are the same all over a patch, the cross-entropy with these is the mean over the pixels.
    """
    masks = F.one_hot(labels + 1, classes + 1)[..., 1:].permute(2, 0, 1).float()
    return F.adaptive_avg_pool2d(masks[None], grid)[0].permute(1, 2, 0)


def confusion(
    predicted: Int64[Tensor, "h w"], true: Int64[Tensor, "h w"], classes: int
) -> Int64[Tensor, "{classes} {classes}"]:
    """How many pixels of each true class (row) are said to be of each (column); void ones are left out."""
    known = true >= 0
    cells = true[known] * classes + predicted[known]
    return torch.bincount(cells, minlength=classes**2).view(classes, classes)


def intersection_over_union(counts: Int[Tensor, "c c"]) -> Float[Tensor, " c"]:
    """Of every class, in per cent, over all pixels of a set together; not a number where a class is nowhere.

    >>> intersection_over_union(torch.tensor([[3, 1], [0, 4]])).tolist()
    [75.0, 80.0]
    """
    hits = counts.diagonal().double()
    return (100 * hits / (counts.sum(0) + counts.sum(1) - hits)).float()


def values_of(items: Iterable[Annotated], void: Sequence[int] = ()) -> list[int]:
    """All values of some masks, but void.

    Raises:
        ValueError: they are fewer than two.
    """
    found: set[int] = set()
    for item in items:
        found |= set(item.annotation().unique().tolist())
    values = sorted(found - {-1, *void})
    if len(values) < 2:
        raise ValueError(f"the masks hold one value ({values}): segmentation needs two or more (0 is background)")
    return values


def fit(
    encoder: Encoder, train: Sequence[Annotated], values: Sequence[int], options: SegmentOptions = SegmentOptions()
) -> Segmenter:
    """Trains a head on images with masks; the backbone stays as it is.

    Raises:
        ValueError: an image or a mask cannot be read, or the backbone cannot carry this head.
    """
    options = dataclasses.replace(options, size=options.size or encoder.size)
    with seeded(options.seed, "segmentation"):
        head = make_head(encoder, options, len(values))
    made = Segmenter(head, list(values), options)
    if isinstance(head, LinearHead):
        features, targets = _patches(encoder, train, made)
        train_linear(head, features, targets, options)
        head.to(encoder.device)
    else:
        assert options.size is not None
        side, _ = seen_size(1, 1, options.size, unit_of(encoder, options))

        def square(i: int) -> tuple[Tensor, Tensor]:
            pixels, labels = train[i].labelled()
            classes = numbered(labels, made.values)
            small = resize_labels((classes + 1).to(torch.uint8), side, side).long() - 1
            return resized(pixels, side, side), small

        train_dpt(head.to(encoder.device), encoder, square, len(train), options)
    return made


@torch.no_grad()
def segment(
    encoder: Encoder, made: Segmenter, image: UInt8[Tensor, "ch height width"]
) -> Int64[Tensor, "height width"]:
    """The class of every pixel, as a number from 0; the logits of patches are interpolated between their centres."""
    logits = made.head(_maps(encoder, made, image)).float()
    return F.interpolate(logits, tuple(image.shape[1:]), mode="bilinear")[0].argmax(0).cpu()


def score(encoder: Encoder, made: Segmenter, items: Sequence[Annotated]) -> dict[str, float]:
    """mIoU over the classes that there are, the IoU of each class by its value, and the share of pixels that are right.

    All in per cent, over the pixels of all images together, at their full size.
    """
    counts = torch.zeros(len(made.values), len(made.values), dtype=torch.int64)
    for item in tracked(items, "judging masks", len(items), encoder.progress):
        pixels, labels = item.labelled()
        counts += confusion(segment(encoder, made, pixels), numbered(labels, made.values), len(made.values))
    each = intersection_over_union(counts)
    known = ~each.isnan()
    results = {"miou": float(each[known].mean()), "pixels_right": 100 * float(counts.trace() / counts.sum())}
    return results | {f"iou_{value}": float(iou) for value, iou in zip(made.values, each, strict=True) if iou == iou}


def _maps(encoder: Encoder, made: Segmenter, image: Tensor) -> list[Tensor]:
    assert made.options.size is not None
    height, width = seen_size(image.shape[1], image.shape[2], made.options.size, unit_of(encoder, made.options))
    blocks = DPT_BLOCKS if made.options.decoder == "dpt" else made.options.blocks
    return encoder.pyramid(resized(image, height, width)[None], blocks)


def _patches(encoder: Encoder, train: Sequence[Annotated], made: Segmenter) -> tuple[Tensor, Tensor]:
    """Tokens of patches and the shares of the classes in them, as many of every image."""
    each, features, targets = -(-made.options.patches // len(train)), list[Tensor](), list[Tensor]()
    for i, item in enumerate(tracked(train, "patches", len(train), encoder.progress)):
        pixels, labels = item.labelled()
        maps = torch.cat(_maps(encoder, made, pixels), 1)[0].cpu()  # (d, h, w)
        share = shares(numbered(labels, made.values), len(made.values), (maps.shape[1], maps.shape[2]))
        rows = torch.randperm(maps[0].numel(), generator=generator(made.options.seed, "patches of an image", i))[:each]
        features.append(maps.flatten(1).mT[rows])
        targets.append(share.flatten(0, 1)[rows])
    return torch.cat(features), torch.cat(targets)


def save_head(path: Path, made: Segmenter, encoder: Encoder) -> None:
    """Writes the head as safetensors, with all that it depends on."""
    facts = {"options": dataclasses.asdict(made.options), "values": made.values}
    facts |= {"weights": fingerprint(encoder.backbone), "mean": list(encoder.mean), "std": list(encoder.std)}
    with whole_file(path) as partial:
        save_file(cpu_state(made.head), partial, metadata={"format": "pt", _KEY: json.dumps(facts)})


def load_head(path: Path, encoder: Encoder) -> Segmenter:
    """What ``save_head`` wrote.

    Raises:
        ValueError: it is none, or one of other weights.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})[_KEY])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, OSError) as error:
        raise ValueError(f"--head {path} is no head of dino segment train ({error})") from error
    if facts["weights"] != fingerprint(encoder.backbone):
        raise ValueError(f"--head {path} was trained on other weights than these")
    options = SegmentOptions(**facts["options"] | {"void": tuple(facts["options"]["void"])})
    head = make_head(encoder, options, len(facts["values"]))
    head.load_state_dict(state)
    return Segmenter(head.to(encoder.device).eval(), facts["values"], options)
