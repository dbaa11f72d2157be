"""Linear classifiers on frozen features: which features they see, many trained at once, their files."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor

from dino.evaluation.metrics import top_k_hits
from dino.machine.files import whole_file
from dino.machine.randomness import generator
from dino.models.weights import load_linear


class Probe(NamedTuple):
    """One linear classifier: its learning rate for 256 images, and which features it sees."""

    lr: float
    n_last_blocks: int
    avgpool: bool

    @property
    def name(self) -> str:
        return f"n{self.n_last_blocks}{'_avgpool' if self.avgpool else ''}_lr{self.lr:g}"


class Labelled(NamedTuple):
    """What probes learn from: ``encoder.condense`` of images, and their classes."""

    tokens: Float[Tensor, "b m d"]
    labels: Int[Tensor, " b"]


def paper_features(embed_dim: int) -> tuple[int, bool]:
    """Which (n_last_blocks, avgpool) the paper gives a ViT of this width: 4 blocks up to S, 1 and pooling from B on.

    >>> paper_features(384), paper_features(768)
    ((4, False), (1, True))
    """
    return (4, False) if embed_dim < 768 else (1, True)


def linear_features(
    tokens: Float[Tensor, "b m d"], n_last_blocks: int = 4, avgpool: bool = False
) -> Float[Tensor, "b f"]:
    """The [CLS] tokens of the last blocks, concatenated, older first; ``avgpool`` adds the last mean patch token.

    ``tokens`` are ``encoder.condense`` of at least ``n_last_blocks`` blocks; a convnet's pooled features (m = 1) are
    given back. The mean patch token alternates with the last [CLS] token channel by channel: the layout of the released
    classifiers, which pool with one block only. Here older blocks may come before it.

    Raises:
        ValueError: there are not that many blocks.

    >>> tokens = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [8.0, 9.0]]])  # Two blocks, and the mean patch token.
    >>> linear_features(tokens, 2).tolist(), linear_features(tokens, 1, avgpool=True).tolist()
    ([[1.0, 2.0, 3.0, 4.0]], [[3.0, 8.0, 4.0, 9.0]])
    """
    _, m, d = tokens.shape
    if m == 1:
        return tokens[:, 0]
    if not 1 <= n_last_blocks < m:
        raise ValueError(f"n_last_blocks {n_last_blocks} is not allowed: there are {m - 1} blocks")
    cls_tokens = tokens[:, -1 - n_last_blocks : -1].flatten(1)
    if not avgpool:
        return cls_tokens
    return torch.cat([cls_tokens[:, :-d], tokens[:, -2:].mT.flatten(1)], 1)


def cosine_lr(lr: float, epoch: int, epochs: int) -> float:
    """The learning rate of an epoch: half a cosine from ``lr`` towards 0, one step an epoch."""
    return lr * (1 + math.cos(math.pi * epoch / epochs)) / 2


def probe_step(
    weight: Float[Tensor, "l c g"],
    velocity: Float[Tensor, "l c g"],
    features: Float[Tensor, "b f"],
    labels: Int[Tensor, " b"],
    lrs: Float[Tensor, " l"],
    momentum: float = 0.9,
) -> Float[Tensor, " l"]:
    """One step of SGD on the cross-entropy of ``l`` probes that see the same features; gives their losses before it.

    Changes ``weight`` and ``velocity``. The last column of ``weight`` is the bias (g = f + 1). The gradient of a linear
    classifier is known, so all probes together cost two matrix products and no graph.
    """
    features = F.pad(features, (0, 1), value=1.0)
    log_probs = (features @ weight.flatten(0, 1).mT).unflatten(1, weight.shape[:2]).log_softmax(-1)  # (b, l, c)
    truth = labels[:, None, None].expand(-1, len(weight), 1)
    losses = -log_probs.gather(-1, truth)[..., 0].mean(0)
    residual = log_probs.exp_().scatter_add_(-1, truth, log_probs.new_full(truth.shape, -1.0))
    gradient = (residual.flatten(1).mT @ features).div_(len(features)).view_as(weight)
    velocity.mul_(momentum).add_(gradient)
    weight.sub_(lrs[:, None, None] * velocity)
    return losses


def train_probes(
    batches: Iterable[Labelled],
    probes: Sequence[Probe],
    *,
    epochs: int,
    steps_per_epoch: int,
    batch_size: int,
    num_classes: int,
    seed: int = 0,
) -> Iterator[list[Float[Tensor, "c _"]]]:
    """Trains all probes on the same batches with SGD (momentum 0.9, no weight decay), a cosine over the epochs.

    Yields after every epoch one matrix a probe, its bias in the last column. They change with the next epoch.
    """
    choices = {probe[1:]: [p for p in probes if p[1:] == probe[1:]] for probe in probes}
    weights: dict[tuple[int, bool], Tensor] = {}
    velocities: dict[tuple[int, bool], Tensor] = {}
    for step, (tokens, labels) in enumerate(batches):
        for choice, members in choices.items():
            features = linear_features(tokens, *choice)
            if choice not in weights:  # As released: normal weights of deviation 0.01, no bias.
                draw = generator(seed, f"linear {choice}")
                initial = 0.01 * torch.randn(num_classes, features.shape[1], generator=draw)
                weights[choice] = F.pad(initial, (0, 1)).repeat(len(members), 1, 1).to(features)
                velocities[choice] = torch.zeros_like(weights[choice])
            lrs = [cosine_lr(probe.lr * batch_size / 256, step // steps_per_epoch, epochs) for probe in members]
            probe_step(weights[choice], velocities[choice], features, labels, features.new_tensor(lrs))
        if (step + 1) % steps_per_epoch == 0:
            yield [weights[probe[1:]][choices[probe[1:]].index(probe)] for probe in probes]


def accuracies(
    probes: Sequence[Probe], weights: Sequence[Float[Tensor, "c _"]], judged: Labelled, tile: int = 1024
) -> Float[Tensor, "p 2"]:
    """Top-1 and top-5 accuracy of each probe in per cent. Memory is bounded by ``tile`` images."""
    hits = torch.zeros(len(probes), 2, dtype=torch.float64)
    for tokens, labels in zip(judged.tokens.split(tile), judged.labels.split(tile), strict=True):
        features = {choice: linear_features(tokens, *choice) for choice in {probe[1:] for probe in probes}}
        for i, (probe, weight) in enumerate(zip(probes, weights, strict=True)):
            scores = F.linear(features[probe[1:]], weight[:, :-1], weight[:, -1])
            hits[i] += torch.stack([top_k_hits(scores, labels, k).sum() for k in (1, 5)]).cpu()
    return (100 * hits / len(judged.labels)).float()


def save_probe(path: Path, probe: Probe, weight: Float[Tensor, "c _"], description: Mapping[str, Any]) -> None:
    """Writes ``linear.weight`` and ``linear.bias`` as safetensors, with the probe and the description as JSON in it."""
    tensors = {"linear.weight": weight[:, :-1].cpu().contiguous(), "linear.bias": weight[:, -1].cpu().contiguous()}
    metadata = {"format": "pt", "dino_probe": json.dumps({**probe._asdict(), **description})}
    with whole_file(path) as partial:
        save_file(tensors, partial, metadata=metadata)


def read_probe(path: str | Path, embed_dim: int) -> tuple[Probe, Float[Tensor, "c _"], dict[str, Any]]:
    """Reads what ``save_probe`` wrote, or a released classifier: the probe, its matrix (bias last), its description.

    A released file does not say which features it sees: its width does (the paper's choice where two have the same).

    Raises:
        ValueError: the file is no linear classifier, or is none of a backbone of this width.
    """
    weight, bias, description = load_linear(path)
    matrix = torch.cat([weight, bias[:, None]], 1).float()
    if description:
        own = {name: description.pop(name) for name in Probe._fields}
        return Probe(**own), matrix, description
    choices = [paper_features(embed_dim), (1, True), *((n, False) for n in range(1, 13))]
    for n_last_blocks, avgpool in choices:
        if embed_dim * (n_last_blocks + avgpool) == weight.shape[1]:
            return Probe(math.nan, n_last_blocks, avgpool), matrix, {}
    raise ValueError(f"{path} classifies {weight.shape[1]} features: no backbone of width {embed_dim} gives those")
