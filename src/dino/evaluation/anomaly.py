"""Anomalies as patches far from all patches of normal images: a memory bank, nothing is trained.

Source: Roth et al. 2022 (PatchCore, arXiv 2106.08265), with the patch tokens of the last block, the cosine, and a bank
drawn at random, evenly over the images, in place of their greedy selection.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score
from torch import Tensor

from dino.data.sources import Source
from dino.encoder.encoder import Encoder
from dino.encoder.neighbors import nearest_neighbors
from dino.encoder.stored_features import fingerprint
from dino.machine.files import whole_file
from dino.machine.randomness import generator
from dino.options import AnomalyOptions

_KEY = "dino_anomaly"


class Scores(NamedTuple):
    """Of the readable images of a source, in its order."""

    scores: Float[Tensor, " n"]  # 0: like a normal image, to 2.
    maps: Float[Tensor, "n h w"]  # Of every patch; the score is the largest.
    indices: Int[Tensor, " n"]  # In the source.


def patch_features(tokens: Float[Tensor, "b h w d"], around: int) -> Float[Tensor, "b h w d"]:
    """Patch tokens averaged with those around them (at the border with fewer), of length 1."""
    maps = F.avg_pool2d(tokens.permute(0, 3, 1, 2), around, stride=1, padding=around // 2, count_include_pad=False)
    return F.normalize(maps.permute(0, 2, 3, 1), dim=-1)


def distances(features: Float[Tensor, "b h w d"], bank: Float[Tensor, "m d"]) -> Float[Tensor, "b h w"]:
    """1 - cosine between each patch and the nearest of the bank; all of length 1."""
    nearest, _ = nearest_neighbors(features.flatten(0, 2), bank, 1)
    return (1 - nearest[:, 0]).view(features.shape[:3])


def auroc(scores: Float[Tensor, " n"], anomalous: Bool[Tensor, " n"]) -> float:
    """Area under the ROC curve, per cent: how often an anomalous image scores higher than a normal one.

    >>> auroc(torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([False, False, True, True]))
    75.0
    """
    return 100 * float(roc_auc_score(anomalous.numpy(), scores.numpy()))


def of_class(source: Source, names: tuple[str, ...], flag: str = "normal") -> Bool[Tensor, " n"]:
    """Which images are of these classes.

    Raises:
        ValueError: there are no labels, or no such class.
    """
    unknown = [name for name in names if name not in source.classes]
    if source.labels is None or unknown:
        has = ", ".join(source.classes[:10]) or "no labels"
        raise ValueError(f"--{flag} {' '.join(unknown or names)}: {source.origin} has {has}")
    return torch.isin(source.labels, torch.tensor([source.classes.index(name) for name in names]))


def fit(encoder: Encoder, normal: Source, options: AnomalyOptions = AnomalyOptions()) -> Float[Tensor, "m d"]:
    """The memory bank of normal images.

    Raises:
        ValueError: none of the images can be read.
    """
    each = -(-options.bank // len(normal))
    kept: list[Tensor] = []
    broken: dict[str, str] = {}
    for images, indices in encoder.batches(normal, broken, "normal images"):
        features = patch_features(encoder.tokens(images).patch_tokens, options.around).flatten(1, 2)  # (b, p, d)
        for patches, i in zip(features, indices.tolist(), strict=True):
            order = torch.randperm(len(patches), generator=generator(options.seed, "anomaly bank", i))
            kept.append(patches[order[:each].to(patches.device)].cpu())
    if not kept:
        raise ValueError(f"{normal.origin}: none of the {len(normal)} images can be read")
    return torch.cat(kept)


def score(encoder: Encoder, source: Source, bank: Float[Tensor, "m d"], around: int = AnomalyOptions.around) -> Scores:
    """How far every image is from the bank: its patches' distances, and their largest.

    Raises:
        ValueError: none of the images can be read.
    """
    bank, maps, found = bank.to(encoder.device), list[Tensor](), list[Tensor]()
    broken: dict[str, str] = {}
    for images, indices in encoder.batches(source, broken, "scores"):
        maps.append(distances(patch_features(encoder.tokens(images).patch_tokens, around), bank).cpu())
        found.append(indices.cpu())
    if not maps:
        raise ValueError(f"{source.origin}: none of the {len(source)} images can be read")
    every = torch.cat(maps)
    return Scores(every.flatten(1).amax(1), every, torch.cat(found))


def save_bank(path: Path, bank: Float[Tensor, "m d"], encoder: Encoder, options: AnomalyOptions, images: int) -> None:
    """Writes the bank with all that it depends on."""
    made = {"weights": fingerprint(encoder.backbone), "settings": encoder.settings, "images": images}
    made |= {"around": options.around, "seed": options.seed}
    with whole_file(path) as partial:
        save_file({"bank": bank.contiguous()}, partial, metadata={_KEY: json.dumps(made)})


def load_bank(path: Path, encoder: Encoder) -> tuple[Float[Tensor, "m d"], int]:
    """The bank and its ``around``.

    Raises:
        ValueError: it is none, or one of other weights or other sizes of images.
    """
    try:
        with safe_open(path, framework="pt") as file:
            made, bank = json.loads((file.metadata() or {})[_KEY]), file.get_tensor("bank")
    except (SafetensorError, KeyError, FileNotFoundError) as error:
        raise ValueError(f"--bank {path} is no bank of dino anomaly fit ({error})") from error
    if made["weights"] != fingerprint(encoder.backbone):
        raise ValueError(f"--bank {path} was made with other weights than these")
    if differing := [k for k, v in json.loads(json.dumps(encoder.settings)).items() if made["settings"].get(k) != v]:
        values = ", ".join(f"{k} {made['settings'].get(k)} there, {encoder.settings[k]} now" for k in differing)
        raise ValueError(f"--bank {path} was made with other settings ({values})")
    return bank, made["around"]
