"""What each protocol may be told, once: the command shows these as flags, ``run`` takes them, the result quotes them.

Pure data: importing this file imports no torch. The text under a field is its help.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["float32", "bfloat16"]


def _check(flag: str, value: object, ok: bool, allowed: str) -> None:
    if not ok:
        raise ValueError(f"--{flag} {value} is not allowed: {allowed}")


def quoted(options: Any) -> dict[str, Any]:
    """The options as JSON can hold them, without the names of files."""
    values = dataclasses.asdict(options)
    return {name: value for name, value in values.items() if not isinstance(value, Path)}


@dataclass(frozen=True)
class ForwardOptions:
    """How a backbone is run."""

    precision: Precision = "float32"
    """Of the forward pass."""
    device: Device = "auto"
    """Where the backbone runs."""


@dataclass(frozen=True)
class CropOptions(ForwardOptions):
    """How images of one size are shown; the weights bring the defaults."""

    resize: int | None = None
    """Shorter side in pixels before the center crop. Default: what the weights were trained at."""
    crop: int | None = None
    """Side of the center crop in pixels. Default: what the weights were trained at."""

    def __post_init__(self) -> None:
        for flag in ("resize", "crop"):
            value = getattr(self, flag)
            _check(flag, value, value is None or value >= 1, "at least 1 pixel")


@dataclass(frozen=True)
class KnnOptions:
    """Weighted nearest-neighbour classification (section 4.1)."""

    k: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbours; the paper finds 20 the best in most runs."""
    temperature: float = 0.07
    """Of the vote exp(similarity / temperature)."""
    features: Path | None = None
    """File (.safetensors) that features are kept in: read when it is there and fits, else written."""

    def __post_init__(self) -> None:
        _check("k", " ".join(map(str, self.k)), bool(self.k) and min(self.k) >= 1, "at least 1 neighbour each")
        _check("temperature", self.temperature, 0 < self.temperature < float("inf"), "a number above 0")


@dataclass(frozen=True)
class LinearOptions:
    """Linear probes (section 4.1)."""

    grid: bool = False
    """Train 28 probes at once: 7 learning rates, 1 or 4 last blocks, with and without average pooling."""
    lr: tuple[float, ...] = ()
    """Learning rates for 256 images. Default: 0.001, the paper's."""
    n_last_blocks: tuple[int, ...] = ()
    """Numbers of last blocks whose [CLS] tokens the probes see. Default: the paper's, 4 for ViT-S and 1 for ViT-B."""
    avgpool: Literal["paper", "off", "on", "both"] = "paper"
    """Show the probes the mean patch token too. The paper does for ViT-B."""
    epochs: int = 100
    """Times the probes see every train image."""
    batch_size: int = 1024
    """Images a step."""
    cached: bool = False
    """Extract the train features once, from center crops: minutes in place of hours, without random crops."""
    out: Path | None = None
    """File (.safetensors) for the weights of the chosen probe."""
    seed: int = 0
    """Of what is held out, the order, the crops and the first weights."""

    def __post_init__(self) -> None:
        _check("epochs", self.epochs, self.epochs >= 1, "at least 1")
        _check("batch-size", self.batch_size, self.batch_size >= 1, "at least 1 image")
        _check("lr", " ".join(map(str, self.lr)), all(0 < lr < float("inf") for lr in self.lr), "numbers above 0")
        _check(
            "n-last-blocks",
            " ".join(map(str, self.n_last_blocks)),
            all(n >= 1 for n in self.n_last_blocks),
            "at least 1 each",
        )
        ending = self.out is None or self.out.suffix == ".safetensors"
        _check("out", self.out, ending, "a probe is written as .safetensors")


@dataclass(frozen=True)
class LowshotOptions:
    """Logistic regression on few labels (appendix A)."""

    fraction: float | None = None
    """Share of every class that is learned from; the paper has 0.01 and 0.1. Default: 0.01."""
    per_class: int | None = None
    """In place of a share: number of images of every class."""
    subsets: int = 5
    """Subsets drawn; the results are their mean and standard deviation."""
    strength: float = 0.1
    """Of the L2 penalty, lambda = strength / number of images. The authors' choice."""
    seed: int = 0
    """Of the first subset; the next ones follow."""

    def __post_init__(self) -> None:
        both = self.fraction is not None and self.per_class is not None
        _check("fraction", f"{self.fraction} --per-class {self.per_class}", not both, "one of the two")
        _check("fraction", self.fraction, self.fraction is None or 0 < self.fraction <= 1, "above 0, at most 1")
        _check("per-class", self.per_class, self.per_class is None or self.per_class >= 1, "at least 1 image")
        _check("subsets", self.subsets, self.subsets >= 1, "at least 1")
        _check("strength", self.strength, 0 < self.strength < float("inf"), "a number above 0")


@dataclass(frozen=True)
class RetrievalOptions:
    """Image retrieval (section 4.2.1, table 3). The released code shows images at 224 pixels in one scale; the
    published numbers of Oxford and Paris come from larger images in three."""

    side: int = 224
    """Longest side in pixels; larger images are shrunk to it, smaller ones stay. Published numbers: 512 and more."""
    multi_scale: bool = False
    """Average the features at the scales 1, 1/sqrt(2) and 1/2."""
    crop_queries: bool = False
    """Show only the box of each query (Oxford, Paris), as the authors of the data do; released DINO code does not."""

    def __post_init__(self) -> None:
        _check("side", self.side, self.side >= 1, "at least 1 pixel")


@dataclass(frozen=True)
class CopyDetectionOptions:
    """Copy detection (section 4.2.1, table 4)."""

    side: int = 320
    """Every image is squeezed to a square of so many pixels a side."""

    def __post_init__(self) -> None:
        _check("side", self.side, self.side >= 1, "at least 1 pixel")


@dataclass(frozen=True)
class VideoSegmentationOptions:
    """Masks propagated through videos (section 4.2.2, table 5)."""

    size: int = 480
    """Shorter side in pixels at which the backbone sees the frames; the longer one is cut to a multiple of 64."""
    n_last_frames: int = 7
    """Frames before the current one that it takes labels from, besides the first."""
    size_mask_neighborhood: int = 12
    """Labels come from patches at most this many rows and columns away; 0: from all."""
    topk: int = 5
    """Labels come from this many most similar patches."""
    temperature: float = 0.1
    """Of their weights exp(cosine / temperature)."""
    out: Path | None = None
    """Folder for the masks, OUT/VIDEO/FRAME.png, with DAVIS's palette."""

    def __post_init__(self) -> None:
        _check("size", self.size, self.size >= 64, "at least 64 pixels")
        _check("n-last-frames", self.n_last_frames, self.n_last_frames >= 1, "at least 1")
        _check("size-mask-neighborhood", self.size_mask_neighborhood, self.size_mask_neighborhood >= 0, "0 or more")
        _check("topk", self.topk, self.topk >= 1, "at least 1")
        _check("temperature", self.temperature, 0 < self.temperature < float("inf"), "a number above 0")


@dataclass(frozen=True)
class AttentionSegmentationOptions:
    """Attention as masks of objects (section 4.2.2, figure 4)."""

    share: float = 0.6
    """Of the attention's mass that a mask keeps."""
    resize: int = 0
    """Side in pixels of the squares that images are resized to; 0: full size, cut to multiples of the patch."""
    seed: int = 0
    """Of the masks with shuffled patches, which say what their size is worth alone."""

    def __post_init__(self) -> None:
        _check("share", self.share, 0 < self.share < 1, "between 0 and 1, both excluded")
        _check("resize", self.resize, self.resize >= 0, "0 (full size) or a number of pixels")


@dataclass(frozen=True)
class DiscoveryOptions:
    """Object discovery by LOST and TokenCut."""

    k: int = 100
    """LOST: patches of lowest degree that may join the seed."""
    threshold: float = 0.2
    """TokenCut: cosine from which on two patches are joined."""

    def __post_init__(self) -> None:
        _check("k", self.k, self.k >= 1, "at least 1 patch")
        _check("threshold", self.threshold, -1 <= self.threshold <= 1, "a cosine from -1 to 1")


@dataclass(frozen=True)
class AnomalyOptions:
    """Anomalies as patches far from all patches of normal images (PatchCore, arXiv 2106.08265)."""

    bank: int = 10_000
    """Patches of normal images that are kept: as many of every image, drawn by seed."""
    around: int = 3
    """Every patch is averaged with those around it, this many a side; 1: it stands alone."""
    seed: int = 0
    """Of the patches that are drawn."""

    def __post_init__(self) -> None:
        _check("bank", self.bank, self.bank >= 1, "at least 1 patch")
        _check("around", self.around, self.around >= 1 and self.around % 2 == 1, "an odd number of patches")


def _check_training(options: "FinetuneOptions | SegmentOptions") -> None:
    """What both kinds of training take."""
    _check("epochs", options.epochs, options.epochs >= 1, "at least 1")
    _check("batch-size", options.batch_size, options.batch_size >= 1, "at least 1 image")
    _check("lr", options.lr, 0 < options.lr < float("inf"), "a number above 0")
    _check("weight-decay", options.weight_decay, 0 <= options.weight_decay < float("inf"), "0 or a number above 0")
    _check("val-fraction", options.val_fraction, 0 < options.val_fraction < 1, "between 0 and 1, both excluded")


@dataclass(frozen=True)
class FinetuneOptions:
    """Classification by the whole network, end to end. Layer-wise decay is that of BEiT (arXiv 2106.08254), mixup and
    cutmix (1710.09412, 1905.04899), TrivialAugment (2103.10158) and random erasing (1708.04896) are torchvision's."""

    epochs: int = 50
    """Times that every train image is seen."""
    batch_size: int = 64
    """Images a step."""
    lr: float = 0.002
    """Learning rate of the classifier for 256 images, warmed up and then a cosine to 0."""
    layer_decay: float = 0.75
    """The learning rate of each block is so much of that of the next one; 1: all the same."""
    weight_decay: float = 0.05
    """Of AdamW; biases and norms have none."""
    warmup: int = 5
    """Epochs that the learning rate rises for; at most a fifth of all."""
    drop_path: float = 0.1
    """Stochastic depth of the last block, rising linearly to it; of our vision transformers only."""
    augment: Literal["trivial", "rand", "off"] = "trivial"
    """What is done to colours and shapes besides a random crop and a flip: TrivialAugment, RandAugment, nothing."""
    erase: float = 0.25
    """How often a part of an image is erased."""
    mixup: float = 0.8
    """Images of a batch are mixed in pairs by a share from Beta(mixup, mixup); 0: never."""
    cutmix: float = 1.0
    """Or a part of one is pasted into another, its area from Beta(cutmix, cutmix); with mixup each half of the time."""
    label_smoothing: float = 0.1
    """Share of the target that is spread evenly over all classes."""
    ema: float = 0.9998
    """Decay of the average of all weights, which is what is judged and kept; lower in the first steps. 0: none."""
    patience: int = 10
    """Epochs without a better val accuracy after which training stops; 0: never."""
    val_fraction: float = 0.1
    """Share of every class that is held out to choose the epoch by, where DATA has no val part."""
    save_every: float = 5.0
    """Minutes between two checkpoints."""
    seed: int = 0
    """Of what is held out, the order, the augmentation and the first classifier."""

    def __post_init__(self) -> None:
        _check_training(self)
        _check("layer-decay", self.layer_decay, 0 < self.layer_decay <= 1, "above 0, at most 1")
        _check("warmup", self.warmup, self.warmup >= 0, "0 or more epochs")
        for flag in ("drop_path", "label_smoothing", "ema"):
            value = getattr(self, flag)
            _check(flag.replace("_", "-"), value, 0 <= value < 1, "from 0 to below 1")
        for flag in ("mixup", "cutmix"):
            _check(flag, getattr(self, flag), 0 <= getattr(self, flag) < float("inf"), "0 (off) or a number above 0")
        _check("erase", self.erase, 0 <= self.erase <= 1, "a share from 0 to 1")
        _check("patience", self.patience, self.patience >= 0, "0 (never) or a number of epochs")
        _check("save-every", self.save_every, 0 <= self.save_every < float("inf"), "a number of minutes")


@dataclass(frozen=True)
class SegmentOptions:
    """A head on the patch tokens of a frozen backbone that says the class of every pixel."""

    decoder: Literal["linear", "dpt"] = "linear"
    """linear: of every patch by itself, between patches interpolated. dpt: convolutions over four blocks
    (arXiv 2103.13413), by segmentation_models_pytorch, for vision transformers."""
    size: int | None = None
    """Shorter side in pixels at which images are seen, made to whole patches. Default: the weights' crop."""
    blocks: int = 1
    """Last blocks whose tokens the linear head sees, side by side."""
    epochs: int = 20
    """Times that every patch, or with dpt every image, is seen."""
    lr: float = 0.001
    """Learning rate of AdamW, then a cosine to 0."""
    weight_decay: float = 0.01
    """Of AdamW."""
    patches: int = 200_000
    """Patches that the linear head learns from: as many of every image, drawn by seed."""
    batch_size: int = 8
    """Images a step of dpt; the linear head takes 256 patches for each."""
    void: tuple[int, ...] = ()
    """Values of the masks that are no class; of PASCAL VOC 255 is none anyway."""
    val_fraction: float = 0.2
    """Share of the images (of whole folders and videos, if several) that judges where DATA has no parts."""
    seed: int = 0
    """Of what is held out, the patches, the order and the first weights."""

    def __post_init__(self) -> None:
        _check("size", self.size, self.size is None or self.size >= 1, "at least 1 pixel")
        _check_training(self)
        _check("blocks", self.blocks, self.blocks >= 1, "at least 1")
        _check("patches", self.patches, self.patches >= 1, "at least 1")
