"""A run that begins from weights that are there: what it takes over from them, and the anchor that guards them."""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dino.config import Config, Preprocessing, replace
from dino.encoder.encoder import Encoder, open_encoder
from dino.encoder.neighbors import nearest_neighbors
from dino.encoder.stored_features import fingerprint
from dino.evaluation import knn
from dino.evaluation.parts import train_and_test
from dino.machine.files import printable
from dino.models.weights import name_of, open_weights
from dino.options import KnnOptions

SCORE = "knn_20_top1"  # What is best among the teachers that the anchor allows, where DATA has labels.
NEIGHBORS = 10
PATIENCE = 3  # Measurements in a row, each below the one before and below what is allowed, that end a run.
SHARES = (0.75, 0.5, 0.25, 0.125)  # Of the way from the initial network to a teacher that lost too much.
MAX_LOSS = {"labelled": 1.0, "unlabelled": 20.0}  # Points.


class Beginning(NamedTuple):
    """The weights that a run begins from."""

    backbone: nn.Module
    preprocessing: Preprocessing
    digest: str
    summary: str  # One line for the screen.

    @classmethod
    def of(cls, init: str) -> "Beginning":
        """Raises ValueError as ``dino.load`` does."""
        weights = open_weights(init)
        return cls(weights.backbone, weights.preprocessing, fingerprint(weights.backbone), weights.summary)

    @property
    def patch_size(self) -> int:
        return int(self.backbone.patch_size)  # pyright: ignore[reportArgumentType]

    @property
    def facts(self) -> dict[str, Any]:
        """What a recipe may know of them."""
        return {"init": self.preprocessing, "patch_size": self.patch_size}

    def taken_over(self, config: Config) -> Config:
        """The configuration with what the weights decide: the network, and what its images are."""
        shown = self.preprocessing
        return replace(
            config,
            model__backbone=name_of(self.backbone),
            model__patch_size=self.patch_size,
            crops__mean=shown.mean,
            crops__std=shown.std,
            data__channels=shown.channels,
            data__pixel_range=shown.pixel_range,
        )


def shown_name(init: str) -> str:
    """How a card calls the weights that a run began from: a name, or the last part of a path."""
    return printable(Path(init).name) if Path(init).exists() else init


def kept_neighbors(before: Tensor, after: Tensor, k: int = NEIGHBORS) -> float:
    """Which share (per cent) of the k nearest neighbours of an image is the same in two sets of features (n, d).

    Rows have length 1. 100 for features that are equal up to a rotation; k / (n - 1) by chance.
    """
    k = min(k, len(before) - 1)
    one, other = (nearest_neighbors(features, features, k, skip_from=0)[1].cpu() for features in (before, after))
    same = (one[:, :, None] == other[:, None, :]).any(-1)
    return 100 * float(same.float().mean())


class Anchor:
    """Images on which a backbone must stay as good as it was: with labels by k-NN, without by its neighbourhoods.

    Raises:
        ValueError: DATA cannot be opened, or holds fewer than two images.
    """

    def __init__(self, data: str, initial: Encoder) -> None:
        self.train, self.test = train_and_test(data)
        if len(self.train) < 2:
            raise ValueError(f"--anchor {data} has {len(self.train)} images: at least two are needed")
        self.labelled = self.train.labels is not None
        self._before = None if self.labelled else initial.features(self.train).features

    @property
    def measure(self) -> str:
        return "k-NN" if self.labelled else f"share of {NEIGHBORS} neighbours kept"

    def __call__(self, encoder: Encoder) -> float:
        """In per cent; higher is better."""
        if self._before is None:
            return knn.run(encoder, self.train, self.test, KnnOptions(k=(20,)))[SCORE]
        return kept_neighbors(self._before, encoder.features(self.train).features)


@contextmanager
def mixed(backbone: nn.Module, initial: Mapping[str, Tensor], share: float) -> Iterator[None]:
    """The backbone at ``share`` of the straight way from its initial weights to those that it has, for a while.

    Between two networks of one beginning every mix works, and keeps more of what the first could than it loses of what
    the second learnt (weight-space ensembles, arXiv 2109.01903).
    """
    own = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}

    def between(name: str) -> Tensor:
        first, last = initial[name].to(own[name].device), own[name]
        return torch.lerp(first, last, share) if last.is_floating_point() else last

    try:
        backbone.load_state_dict({name: between(name) for name in own})
        yield
    finally:
        backbone.load_state_dict(own)


class Guard:
    """Which backbone is kept, and whether the run should end, from all measurements so far.

    A measurement is a line of ``metrics.jsonl``: ``step``, ``anchor`` in per cent and, where DATA has labels, k-NN.
    Where a teacher lost too much, the same for its mix with the initial network, as ``mix_...``; ``mix_share`` says how
    much of the teacher is in it.
    """

    def __init__(
        self,
        anchor: Anchor,
        max_loss: float | None,
        initial: Mapping[str, Tensor],
        history: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.anchor = anchor
        self.max_loss = MAX_LOSS["labelled" if anchor.labelled else "unlabelled"] if max_loss is None else max_loss
        self.initial = initial
        self.history = list(history)

    def measure(self, encoder: Encoder, score: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The anchor of the encoder and, if that lost too much, the largest of ``SHARES`` that did not, with its
        score."""
        found = {"anchor": self.anchor(encoder)}
        allowed = (self.history[0] if self.history else found)["anchor"] - self.max_loss - 1e-9
        for share in SHARES if found["anchor"] < allowed else ():
            with mixed(encoder.backbone, self.initial, share):
                if (anchor := self.anchor(encoder)) >= allowed:
                    of_mix = {"share": share, "anchor": anchor, **score()}
                    return found | {f"mix_{name}": value for name, value in of_mix.items()}
        return found

    @contextmanager
    def holding(self, backbone: nn.Module) -> Iterator[None]:
        """The teacher of the kept step as what is kept of it, for a while."""
        with mixed(backbone, self.initial, self.kept["share"]) if self.kept["share"] < 1 else nullcontext():
            yield

    def note(self, entry: dict[str, Any]) -> None:
        self.history.append(entry)

    @property
    def kept(self) -> dict[str, Any]:
        return best(self.history, self.max_loss)

    @property
    def ends(self) -> bool:
        return keeps_falling(self.history, self.max_loss)

    @property
    def results(self) -> dict[str, Any]:
        """The kept teacher's: what the run gives back."""
        kept = {name: value for name, value in self.kept.items() if name not in ("step", "share")}
        now = {"anchor_before": self.history[0]["anchor"], "anchor_at_the_end": self.history[-1]["anchor"]}
        return {"kept_step": self.kept["step"], "kept_share": self.kept["share"], **now, **kept}

    @property
    def verdict(self) -> str:
        """One line."""
        first, last, kept = self.history[0], self.history[-1], self.kept
        holds = f"the teacher of step {kept['step']}" if kept["step"] else "the initial network"
        if kept["share"] < 1:
            holds = f"the initial network, moved {100 * kept['share']:g} % of the way to {holds}"
        return (
            f"anchor ({self.anchor.measure}): {first['anchor']:.1f} % before, {last['anchor']:.1f} % after step "
            f"{last['step']}, {self.max_loss:g} points may be lost: backbone.safetensors holds {holds} "
            f"({kept['anchor']:.1f} %)"
        )


def best(history: Sequence[dict[str, Any]], max_loss: float) -> dict[str, Any]:
    """The measurement with the best k-NN among those whose anchor lost at most ``max_loss`` points; the latest of
    equals, and of those without k-NN. The first, of the initial network, is always one of them. ``share``: of the
    teacher in it.

    >>> history = [{"step": s, "anchor": a, "knn_20_top1": k} for s, a, k in [(0, 80, 50), (9, 79.5, 60), (18, 70, 90)]]
    >>> best(history, max_loss=1.0)["step"]
    9
    """
    mixes = [
        {"step": entry["step"]} | {name[4:]: value for name, value in entry.items() if name.startswith("mix_")}
        for entry in history
        if "mix_share" in entry
    ]
    teachers = [
        {"share": 1.0} | {name: value for name, value in entry.items() if not name.startswith("mix_")}
        for entry in history
    ]
    allowed = [one for one in teachers + mixes if one["anchor"] >= history[0]["anchor"] - max_loss - 1e-9]
    return max(allowed, key=lambda entry: (entry.get(SCORE) or 0.0, entry["step"]))


def keeps_falling(history: Sequence[dict[str, Any]], max_loss: float) -> bool:
    """Whether the last ``PATIENCE`` measurements were each lower than the one before, and all of them not allowed."""
    values = [entry["anchor"] for entry in history[-PATIENCE - 1 :]]
    falls = all(later < earlier for earlier, later in itertools.pairwise(values))
    lost = all(value < history[0]["anchor"] - max_loss for value in values[1:])
    return len(values) == PATIENCE + 1 and falls and lost


def measured(path: Path, until: int) -> list[dict[str, Any]]:
    """The measurements in ``metrics.jsonl`` up to a step."""
    lines = path.read_text().splitlines() if path.exists() else []
    entries = []
    for line in lines:
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # The line that was being written when the run died.
    return [entry for entry in entries if entry.get("anchor") is not None and entry["step"] <= until]


def guard_of(config: Config, beginning: Beginning, out: Path, start: int, device: torch.device) -> Guard:
    """The guard of a run that goes on after ``start`` steps."""
    initial = open_encoder(beginning.backbone, Preprocessing.of(config), device=device, progress=False)
    anchor = Anchor(config.adapt.anchor, initial)
    history = measured(out / "metrics.jsonl", start) if start else []
    initial_weights = {name: tensor.clone() for name, tensor in beginning.backbone.state_dict().items()}
    return Guard(anchor, config.adapt.max_loss, initial_weights, history)
