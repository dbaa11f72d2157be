"""Every hyper-parameter once, with its unit and its source. Pure data: importing this file imports no torch.

Numbers are those of Caron et al. 2021 (arXiv 2104.14294), section 3.2 and appendix C, for ViT-S/16, unless a comment
says otherwise.
A *duration* is a number with its unit: ``"100 epochs"``, ``"5000 steps"`` or ``"2000000 images"`` (short: ``100ep``,
``5000st``).
"""

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_DURATION = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(epochs?|ep|steps?|st|images?|im)\s*$")


def parse_duration(duration: str, name: str = "duration") -> tuple[float, Literal["ep", "st", "im"]]:
    """The number and the unit (epochs, steps or images) of a duration.

    Raises:
        ValueError: the text is not a number with a unit; names the setting and the value.
    """
    match = _DURATION.match(duration)
    if match is None:
        raise ValueError(
            f"--{name} {duration!r} is not a duration: write a number and a unit, "
            "such as '100 epochs', '5000 steps' or '2000000 images'"
        )
    return float(match[1]), match[2][:2]  # pyright: ignore[reportReturnType]


def to_steps(duration: str, steps_per_epoch: int, batch_size: int, name: str = "duration") -> int:
    """A duration in whole steps, rounded to the nearest.

    >>> [to_steps(text, steps_per_epoch=37, batch_size=256) for text in ("10 epochs", "512 images", "30steps")]
    [370, 2, 30]
    """
    number, unit = parse_duration(duration, name)
    return round(number * {"ep": steps_per_epoch, "st": 1, "im": 1 / batch_size}[unit])


def parse_minutes(text: str) -> float | None:
    """The minutes of ``"10 minutes"`` (or ``min``, or hours ``h``), which is no duration of a run; None for all else.

    >>> parse_minutes("10 minutes"), parse_minutes("1.5h"), parse_minutes("10 epochs")
    (10.0, 90.0, None)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(minutes?|min|hours?|h)\s*", text)
    return float(match[1]) * (60 if match[2][0] == "h" else 1) if match else None


def _check(ok: bool, flag: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"--{flag} {value} is not allowed: {allowed}")


@dataclass(frozen=True)
class ReadConfig:
    """How DATA is understood, where it does not say so itself. The result depends on all of it."""

    path_column: str | None = None  # Of a list or a table: which holds the images; a header's word, or a number from 1.
    label_column: str | None = None  # Which holds the class.
    part_column: str | None = None  # Which says train, val or test.
    every: int = 1  # Of a video, every n-th frame.
    bad_shards: Literal["stop", "skip"] = "stop"  # What one that cannot be read does: ends the run, or is left out.
    channels: int | Literal["auto"] = "auto"  # Of an image; auto: as many as a sample has, 3 for grey and RGB.
    # What becomes black and white where images have more than 8 bits. None: estimated from a sample.
    pixel_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        _check(self.every >= 1, "data.every", self.every, "at least 1 frame")
        _check(self.channels == "auto" or self.channels >= 1, "data.channels", self.channels, "auto or at least 1")
        if self.pixel_range is not None:
            low, high = self.pixel_range
            ordered = low < high and all(map(math.isfinite, (low, high)))
            _check(ordered, "data.pixel-range", self.pixel_range, "two numbers, LOW < HIGH")


@dataclass(frozen=True)
class DataConfig(ReadConfig):
    """Which images are read, and how they are kept."""

    # The result depends on:
    canvas: int = 512  # Longest side in pixels an image keeps after decoding; larger ones are shrunk.
    val_fraction: float = 0.1  # Share held out (by seed) for k-NN when there are labels and no val part; 0: none.
    max_broken: float = 0.05  # Share of unreadable files above which the run stops.
    # Only the speed depends on:
    cache: Literal["auto", "none", "ram", "device"] = "auto"  # Decode once and keep the pixels; auto: when they fit.
    workers: int = -1  # Decoding processes when streaming; -1: from the number of CPU cores.

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.canvas >= 8, "data.canvas", self.canvas, "at least 8 pixels")
        _check(0 <= self.val_fraction < 1, "data.val-fraction", self.val_fraction, "0 (none) to below 1")
        _check(0 <= self.max_broken <= 1, "data.max-broken", self.max_broken, "a share from 0 to 1")
        _check(self.workers >= -1, "data.workers", self.workers, "-1 (automatic) or a number of processes")


@dataclass(frozen=True)
class CropConfig:
    """Multi-crop augmentation: section 3.1 and appendix C; colour operations as in BYOL.

    Triples are (first global crop, other global crops, local crops).
    """

    global_size: int = 224  # Pixels a side.
    global_count: int = 2
    global_scale: tuple[float, float] = (0.4, 1.0)  # Share of the image's area; (0.25, 1) in the 800-epoch runs.
    local_size: int = 96
    local_count: int = 8
    local_scale: tuple[float, float] = (0.05, 0.4)  # (0.05, 0.25) in the 800-epoch runs.
    aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # Width over height, drawn log-uniformly.
    flip: float = 0.5  # Probability of a horizontal flip.
    jitter: float = 0.8  # Probability of the four colour operations together, in random order.
    brightness: float = 0.4  # Factor drawn from [1 - x, 1 + x]; the same for contrast and saturation.
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1  # Shift drawn from [-x, x], in turns of the colour circle.
    grayscale: float = 0.2  # Probability.
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)  # Probabilities.
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # Standard deviation in pixels of the finished crop.
    solarize: tuple[float, float, float] = (0.0, 0.2, 0.0)  # Probabilities; threshold 128 of 255.
    mean: tuple[float, ...] = IMAGENET_MEAN  # One value a channel, of pixels from 0 to 1; a single one stands for all.
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "grayscale"):
            _check(0 <= getattr(self, name) <= 1, f"crops.{name}", getattr(self, name), "a probability from 0 to 1")
        for name in ("blur", "solarize"):
            values = getattr(self, name)
            _check(all(0 <= p <= 1 for p in values), f"crops.{name}", values, "three probabilities from 0 to 1")
        for name in ("brightness", "contrast", "saturation"):
            _check(0 <= getattr(self, name) <= 1, f"crops.{name}", getattr(self, name), "a strength from 0 to 1")
        _check(0 <= self.hue <= 0.5, "crops.hue", self.hue, "a strength from 0 to 0.5")
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            flag = f"crops.{name.replace('_', '-')}"
            _check(0 < low <= high <= 1, flag, (low, high), "two shares of the area, 0 < low <= high <= 1")
        low, high = self.aspect_ratio
        _check(0 < low <= high, "crops.aspect-ratio", (low, high), "two ratios, 0 < low <= high")
        low, high = self.blur_sigma
        _check(0 < low <= high, "crops.blur-sigma", (low, high), "two widths in pixels, 0 < low <= high")
        _check(self.global_count >= 1, "crops.global-count", self.global_count, "at least 1 global crop")
        _check(self.local_count >= 0, "crops.local-count", self.local_count, "0 or more local crops")
        _check(
            self.global_count + self.local_count >= 2,
            "crops.local-count",
            self.local_count,
            "one global crop needs at least one local crop to be compared with",
        )
        _check(4 <= self.global_size <= 8192, "crops.global-size", self.global_size, "4 to 8192 pixels")
        _check(4 <= self.local_size <= 8192, "crops.local-size", self.local_size, "4 to 8192 pixels")


@dataclass(frozen=True)
class ModelConfig:
    """Backbone and projection head (section 3.1, appendix C)."""

    # vit_nano | vit_tiny | vit_small | vit_base | vit_large, vit(img_size=..., embed_dim=..., ...), or timm:NAME.
    backbone: str = "vit_small"
    patch_size: int = 16  # Pixels; of the ViTs here (a timm backbone brings its own).
    pos_offset: float = 0.1  # Added to the grid when positions are interpolated, as released; 0: exact size.
    drop_path: float = 0.1  # Stochastic depth of the student; the teacher has none.
    out_dim: int = 65536  # K, the number of prototypes.
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    head_layers: int = 3
    use_bn: bool = False  # BatchNorm in the head.
    norm_last_layer: bool = True  # Keep the prototypes at unit length.

    def __post_init__(self) -> None:
        _check(self.patch_size >= 1, "model.patch-size", self.patch_size, "at least 1 pixel")
        _check(0 <= self.drop_path < 1, "model.drop-path", self.drop_path, "a rate from 0 to below 1")
        _check(self.out_dim >= 2, "model.out-dim", self.out_dim, "at least 2 prototypes")
        for name in ("hidden_dim", "bottleneck_dim", "head_layers"):
            _check(getattr(self, name) >= 1, f"model.{name.replace('_', '-')}", getattr(self, name), "at least 1")
        _check(
            self.pos_offset >= 0, "model.pos-offset", self.pos_offset, "0 or a small positive number (released: 0.1)"
        )


@dataclass(frozen=True)
class MethodConfig:
    """Self-distillation: equations 1 to 4, section 3.1."""

    student_temp: float = 0.1
    teacher_temp: float = 0.04  # After its warm-up. The longer runs of the paper use 0.07.
    warmup_teacher_temp: float = 0.04  # Before it.
    warmup_teacher_temp_for: str = "0 epochs"  # Duration.
    teacher_momentum: float = 0.996  # At the start; a cosine takes it to 1 at the end. Higher for small batches.
    # What keeps the teacher from collapsing: a center that follows the batches (equation 4), or one that is solved for
    # in every batch, so that all prototypes are used alike (Sinkhorn-Knopp, SwAV, arXiv 2006.09882).
    targets: Literal["center", "sinkhorn"] = "center"
    center_momentum: float = 0.9  # m of equation 4; of targets by center.
    # Images of the last batches that targets by sinkhorn are solved for together with the batch: for small batches
    # (SwAV). 0: none.
    queue: int = 0
    # Weight of the coding rate of the student's features of global crops, which spreads them over more dimensions
    # (SimDINO, arXiv 2502.10385). 0: none.
    coding_rate: float = 0.0

    def __post_init__(self) -> None:
        for name in ("student_temp", "teacher_temp", "warmup_teacher_temp"):
            value = getattr(self, name)
            _check(value > 0, f"method.{name.replace('_', '-')}", value, "a temperature above 0")
        _check(0 <= self.teacher_momentum <= 1, "method.teacher-momentum", self.teacher_momentum, "from 0 to 1")
        _check(0 <= self.center_momentum <= 1, "method.center-momentum", self.center_momentum, "from 0 to 1")
        _check(self.queue >= 0, "method.queue", self.queue, "0 (none) or a number of images")
        _check(0 <= self.coding_rate < math.inf, "method.coding-rate", self.coding_rate, "0 (off) or a weight above 0")


@dataclass(frozen=True)
class OptimConfig:
    """How long, how large a batch, and how the student learns (section 3.2)."""

    length: str = "100 epochs"  # Duration of the whole run.
    batch_size: int = 1024  # Images a step, over all processes and accumulated parts.
    # muon: for the matrices of a transformer's blocks, adamw for the rest (torch's Muon, arXiv 2502.16982).
    optimizer: Literal["adamw", "sgd", "lars", "muon"] = "adamw"
    base_lr: float = 0.0005  # For 256 images; the run uses base_lr * batch_size / 256.
    min_lr: float = 1e-5  # At the end of the cosine; not scaled by the batch.
    warmup: str = "10 epochs"  # Duration of the linear warm-up from exactly 0.
    weight_decay: float = 0.04  # A cosine takes it to weight_decay_end.
    weight_decay_end: float = 0.4
    clip: float = 3.0  # Largest gradient norm; 0: no clipping.
    clip_mode: Literal["tensor", "global"] = "tensor"  # Each tensor by its own norm (as released), or all together.
    freeze_last_layer: str = "1 epochs"  # Duration at the start in which the prototypes do not move.

    def __post_init__(self) -> None:
        _check(self.batch_size >= 1, "optim.batch-size", self.batch_size, "at least 1 image")
        _check(self.clip >= 0, "optim.clip", self.clip, "0 (off) or a norm above 0")
        for name in ("base_lr", "min_lr", "weight_decay", "weight_decay_end"):
            value = getattr(self, name)
            _check(0 <= value < math.inf, f"optim.{name.replace('_', '-')}", value, "0 or more, and finite")
        for name in ("length", "warmup", "freeze_last_layer"):
            to_steps(getattr(self, name), 1, 1, name=f"optim.{name.replace('_', '-')}")


@dataclass(frozen=True)
class AdaptConfig:
    """Training that begins from weights that are there; without ``init`` none of it does anything.

    The layer-wise decay is that of BEiT (arXiv 2106.08254, appendix H), low-rank adapters those of LoRA (2106.09685).
    """

    init: str = ""  # Weights that student and teacher begin from: whatever dino.load reads.
    # The backbone stands still for so long, while the new head learns; over as long again it takes up its speed.
    warm_head: str = "0 epochs"
    layer_decay: float = 1.0  # The learning rate of each block is so much of that of the next one; 1: all the same.
    train: str = "all"  # all, "last N" blocks, or lora ("lora 16": of rank 16): what of the backbone is trained.
    pull: float = 0.0  # Weight of 1 - cosine between a global crop's [CLS] token and that of the initial network.
    anchor: str = ""  # DATA on which the backbone must stay as good as it was, measured whenever k-NN is.
    max_loss: float | None = None  # Points that the anchor may lose. Default: 1 with labels, 20 without.

    def __post_init__(self) -> None:
        to_steps(self.warm_head, 1, 1, name="warm-head")
        _check(0 < self.layer_decay <= 1, "layer-decay", self.layer_decay, "above 0, at most 1 (all layers the same)")
        what = re.fullmatch(r"all|last [1-9]\d*|lora( [1-9]\d*)?", self.train)
        _check(what is not None, "train", repr(self.train), "all, 'last N' (blocks), lora, or 'lora RANK'")
        _check(self.pull >= 0, "pull", self.pull, "0 (off) or a weight above 0")
        _check(self.max_loss is None or self.max_loss >= 0, "max-loss", self.max_loss, "a number of points, 0 or more")


@dataclass(frozen=True)
class RunConfig:
    """Seed, device, and what is written how often. Apart from ``seed`` nothing here changes what is trained beyond
    rounding."""

    seed: int = 0
    accumulate: int = 1  # Parts a batch is worked in: less memory, the same result. One with BatchNorm or coding rate.
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where the device has it.
    shard: bool = False  # Of the student each process keeps a share (FSDP2): less memory a process, the same result.
    recompute: bool = False  # The student's blocks work twice in place of keeping what they made: less memory.
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile of the network; auto: on CUDA.
    log_every: int = 10  # Steps between two lines of metrics.jsonl; monitors are computed then.
    save_every: str = "10 minutes"  # Duration between two checkpoints, or minutes ("10 minutes").
    keep: int = 2  # Newest checkpoints kept.
    keep_every: str = "0 epochs"  # Duration between two checkpoints that are kept for ever; 0: none are.
    # Duration between two k-NN evaluations, from step 0 on (when there are labels); 0 epochs: only at the end.
    knn_every: str = "10 epochs"
    threads: int = 0  # CPU threads for the training step; 0: torch's default.

    def __post_init__(self) -> None:
        _check(self.accumulate >= 1, "run.accumulate", self.accumulate, "at least 1")
        _check(self.log_every >= 1, "run.log-every", self.log_every, "at least 1 step")
        _check(self.keep >= 1, "run.keep", self.keep, "at least 1 checkpoint")
        _check(self.threads >= 0, "run.threads", self.threads, "0 (torch's default) or a number of threads")
        if parse_minutes(self.save_every) is None:
            to_steps(self.save_every, 1, 1, name="run.save-every")
        for name in ("keep_every", "knn_every"):
            to_steps(getattr(self, name), 1, 1, name=f"run.{name.replace('_', '-')}")


@dataclass(frozen=True)
class Preprocessing:
    """How a backbone is shown images: travels with its weights, and is everybody's default.

    An image is resized so that its shorter side has ``resize`` pixels, its middle is cut out, and its values from 0 to
    1 are normalised. The defaults are the paper's evaluations (and torchvision's).
    """

    size: int = 224  # Side of the centre crop in pixels.
    resize: int = 256  # Shorter side before it, in pixels.
    mean: tuple[float, ...] = IMAGENET_MEAN  # One value a channel.
    std: tuple[float, ...] = IMAGENET_STD
    channels: int = 3
    pixel_range: tuple[float, float] | None = None  # Raw values mapped to 0 to 255; None: ordinary 8-bit images.

    def __post_init__(self) -> None:
        for name, value in (("mean", self.mean), ("std", self.std)):
            if len(value) != self.channels:
                raise ValueError(f"{name} {value} has {len(value)} values for images of {self.channels} channels")
        if not all(value > 0 for value in self.std):
            raise ValueError(f"std {self.std} is not allowed: one number above 0 a channel")
        if not 1 <= self.size <= self.resize:
            raise ValueError(f"size {self.size} and resize {self.resize} are not allowed: 1 <= size <= resize")

    @classmethod
    def at(
        cls,
        size: int,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        channels: int = 3,
        pixel_range: tuple[float, float] | None = None,
    ) -> "Preprocessing":
        """Images of ``size`` pixels a side, cut out of ``size`` * 256 / 224 as in the paper's evaluations.

        ``mean`` and ``std``: a single value stands for all channels; without them ImageNet's, and where there are not
        three channels 0.5 and 0.25.

        >>> Preprocessing.at(112).resize
        128
        """
        mean = mean or (IMAGENET_MEAN if channels == 3 else (0.5,))
        std = std or (IMAGENET_STD if channels == 3 else (0.25,))
        mean, std = (values * channels if len(values) == 1 else values for values in (mean, std))
        return cls(size, round(size * 256 / 224), mean, std, channels, pixel_range)

    @classmethod
    def of(cls, config: "Config") -> "Preprocessing":
        """How a run's backbone is shown images: at the size of its global crops, with its own mean and std."""
        crops, data = config.crops, config.data
        channels = 3 if data.channels == "auto" else data.channels
        return cls.at(crops.global_size, crops.mean, crops.std, channels, data.pixel_range)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocessing":
        """Reads ``dataclasses.asdict`` of one back from JSON.

        Raises:
            ValueError: a field is unknown (written by another version).
        """
        if unknown := sorted(values.keys() - {entry.name for entry in dataclasses.fields(cls)}):
            raise ValueError(f"preprocessing has unknown fields {unknown}: written by a newer version of dino")
        entries: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**entries)


@dataclass(frozen=True)
class Config:
    """A whole pretraining run. What a recipe returns, what ``config.json`` and every checkpoint hold."""

    data: DataConfig = field(default_factory=DataConfig)
    crops: CropConfig = field(default_factory=CropConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        to_steps(self.method.warmup_teacher_temp_for, 1, 1, name="method.warmup-teacher-temp-for")

    def flat(self) -> dict[str, Any]:
        """``{"data.canvas": 512, ...}``, in the order of definition."""
        return dict(self._items())

    def _items(self) -> Iterator[tuple[str, Any]]:
        for section in dataclasses.fields(self):
            values = getattr(self, section.name)
            for entry in dataclasses.fields(values):
                yield f"{section.name}.{entry.name}", getattr(values, entry.name)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Config":
        """Reads what ``to_json`` wrote.

        Raises:
            ValueError: a section or a field is unknown (the file was written by another version).
        """
        raw = json.loads(text)
        sections: dict[str, Any] = {}
        for section in dataclasses.fields(cls):
            kind: Any = section.default_factory
            known = {f.name for f in dataclasses.fields(kind)}
            values = raw.pop(section.name, {})
            if unknown := sorted(set(values) - known):
                raise ValueError(
                    f"config section {section.name!r} has unknown fields {unknown}; known: {sorted(known)}"
                )
            sections[section.name] = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        if raw:
            raise ValueError(f"config has unknown sections {sorted(raw)}")
        return cls(**sections)


def replace(config: Config, **changes: Any) -> Config:
    """A copy with some fields changed, written as ``section__field=value``.

    >>> replace(Config(), optim__batch_size=64, run__seed=3).optim.batch_size
    64
    """
    by_section: dict[str, dict[str, Any]] = {}
    known = {name.replace(".", "__"): name for name in config.flat()}
    for name, value in changes.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
            raise ValueError(f"{name} is no setting: write section__field, such as {', '.join(close)}")
        section, _, entry = name.partition("__")
        by_section.setdefault(section, {})[entry] = value
    updated = {name: dataclasses.replace(getattr(config, name), **values) for name, values in by_section.items()}
    return dataclasses.replace(config, **updated)
