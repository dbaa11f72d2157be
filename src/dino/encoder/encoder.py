"""A frozen backbone and how it is shown images: said once, for every evaluation, picture, command and run."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from dino.config import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from dino.data.loader import iterate_once
from dino.data.sources import Source
from dino.encoder.sizes import center_crop
from dino.machine import distributed
from dino.machine.device import autocast, choose_device
from dino.machine.progress import tracked
from dino.models.backbone import Tokens, as_backbone
from dino.models.weights import open_weights

_log = logging.getLogger(__name__)


class Features(NamedTuple):
    """Features of the readable images of a source, in its order, on the CPU."""

    features: Float[Tensor, "n d"]
    labels: Int[Tensor, " n"] | None  # None: the source has none.
    indices: Int[Tensor, " n"]  # Of the images in the source: broken ones are missing.


@dataclass(frozen=True, eq=False)
class Encoder:
    """A frozen backbone together with how it is shown images.

    Every method takes images as they are, 8-bit levels or floats from 0 to 1, and normalises them itself; what it gives
    is in float32 and carries no gradient. The backbone is in evaluation mode meanwhile, and afterwards as it was.

    Args:
        backbone: anything from images to ``Tokens``.
        size: side of the central crop in pixels.
        resize: the shorter side before it, in pixels.
        mean, std: one number a channel, of pixels from 0 to 1.
        precision: of the forward pass; ``bfloat16`` by autocast.
        device: where the backbone is moved to; ``"auto"`` is a GPU where there is one.
        batch_size: images a forward pass; changes the speed only.
        channels, pixel_range: how image files are read (``Source.with_pixels``).
        progress: a bar on the terminal while a source is gone through.

    Raises:
        ValueError: a number is out of range; names the flag.
    """

    backbone: nn.Module
    size: int = 224
    resize: int = 256
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    precision: Literal["float32", "bfloat16"] = "float32"
    device: torch.device | str = "cpu"
    batch_size: int = 128
    channels: int = 3
    pixel_range: tuple[float, float] | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        for flag, value in (("crop", self.size), ("batch-size", self.batch_size)):
            if value < 1:
                raise ValueError(f"--{flag} {value} is not allowed: at least 1")
        if self.resize < self.size:
            raise ValueError(
                f"--resize {self.resize} --crop {self.size} is not allowed: a shorter side of {self.resize} pixels "
                f"holds no crop of {self.size}"
            )
        if not all(value > 0 for value in self.std) or len({len(self.mean), len(self.std)} - {1, self.channels}):
            raise ValueError(
                f"mean {tuple(self.mean)} and std {tuple(self.std)} are not allowed: one value for each of "
                f"{self.channels} channels, and every std above 0"
            )
        device = self.device
        if isinstance(device, str):
            device = torch.device(device) if ":" in device else choose_device(device)
        object.__setattr__(self, "device", device)
        object.__setattr__(self, "backbone", as_backbone(self.backbone.to(device)))

    def _channelwise(self, values: Sequence[float]) -> Float[Tensor, "_ 1 1"]:
        return torch.tensor(tuple(values), dtype=torch.float32, device=self.device).view(-1, 1, 1)

    @property
    def settings(self) -> dict[str, Any]:
        """All that changes the features apart from the weights, as results and files of features quote it."""
        quoted = {"resize": self.resize, "crop": self.size, "mean": list(self.mean), "std": list(self.std)}
        quoted |= {"precision": self.precision}
        if self.channels != 3 or self.pixel_range is not None:
            quoted |= {"channels": self.channels, "pixel_range": self.pixel_range}
        return quoted

    @property
    def patch_size(self) -> int:
        """Pixels a side that one patch token stands for."""
        return int(self.backbone.patch_size)  # pyright: ignore[reportArgumentType]

    @property
    def embed_dim(self) -> int:
        """Width of a token."""
        return int(self.backbone.embed_dim)  # pyright: ignore[reportArgumentType]

    def normalize(self, images: Float[Tensor, "b c h w"] | UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """What the backbone sees: on its device, less the mean and over the deviation."""
        images = images.to(self.device, non_blocking=True)
        values = images.float().div_(255) if images.dtype == torch.uint8 else images
        return (values - self._channelwise(self.mean)) / self._channelwise(self.std)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Evaluation mode, no gradient, the precision of this encoder; for whoever calls ``backbone`` directly."""
        was_training = self.backbone.training
        self.backbone.eval()
        # A network that is compiled for training would be compiled again for the sizes and modes of an evaluation.
        compiled = any(module._compiled_call_impl is not None for module in self.backbone.modules())
        eager = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
        try:
            with eager, torch.no_grad(), autocast(torch.device(self.device), self.precision):
                yield
        finally:
            self.backbone.train(was_training)

    def tokens(self, images: Float[Tensor, "b c _ _"] | UInt8[Tensor, "b c _ _"]) -> Tokens:
        """The tokens after the last block."""
        with self.frozen():
            return Tokens(*(tokens.float() for tokens in self.backbone(self.normalize(images))))

    def cls_tokens(self, images: Float[Tensor, "b c _ _"] | UInt8[Tensor, "b c _ _"]) -> Float[Tensor, "b d"]:
        """The [CLS] tokens after the last block; the pooled features of a convnet."""
        with self.frozen():
            return self.backbone.cls_tokens([self.normalize(images)])[0].float()  # pyright: ignore[reportCallIssue]

    def last_blocks(
        self, images: Float[Tensor, "b c _ _"] | UInt8[Tensor, "b c _ _"], n: int
    ) -> Float[Tensor, "b m d"]:
        """All that a linear probe may look at: ``condense`` of the last ``n`` blocks (m = n + 1).

        A backbone without blocks to look into gives its pooled features alone (m = 1).
        """
        if not self.backbone.has_blocks:
            return self.cls_tokens(images)[:, None]
        return condense(self._layers(images, n))

    def pyramid(
        self, images: Float[Tensor, "b c _ _"] | UInt8[Tensor, "b c _ _"], n: int = 4
    ) -> list[Float[Tensor, "b d h w"]]:
        """The patch tokens of the last ``n`` blocks as maps, older first: what a dense head is put on.

        A backbone without blocks to look into gives the map of its patch tokens alone.
        """
        if not self.backbone.has_blocks:
            return [self.tokens(images).patch_tokens.permute(0, 3, 1, 2)]
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        return [layer[:, 1:].mT.unflatten(2, grid) for layer in self._layers(images, n)]

    def attention(
        self, images: Float[Tensor, "b c _ _"] | UInt8[Tensor, "b c _ _"], query: tuple[int, int] | None = None
    ) -> Float[Tensor, "b heads h w"]:
        """How much the [CLS] token attends to each patch in the last block, for every head (figures 1 and 3).

        ``query``: row and column of a patch that takes the place of the [CLS] token. The share that goes to the [CLS]
        token is left out, so a map sums to a little less than one. Borders that do not fill a patch are ignored.

        Raises:
            ValueError: the backbone has no attention to show, or the query is no patch of the images.
        """
        if not self.backbone.has_attention:
            return self.backbone.get_last_selfattention(self.normalize(images))  # pyright: ignore # Says so.
        h, w = images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size
        token = 0  # [CLS]
        if query is not None:
            row, column = query
            if not (0 <= row < h and 0 <= column < w):
                raise ValueError(f"query patch {query} is not in the grid of {h} x {w} patches")
            token = 1 + row * w + column
        with self.frozen():
            maps = self.backbone.get_last_selfattention(  # pyright: ignore[reportCallIssue]
                self.normalize(images), slice(token, token + 1)
            )
        return maps[:, :, 0, 1:].float().unflatten(-1, (h, w))

    def keys(self, images: Float[Tensor, "b c _ _"] | UInt8[Tensor, "b c _ _"]) -> Float[Tensor, "b h w d"]:
        """The keys of the last block; of a backbone that does not give them its patch tokens."""
        with self.frozen():
            return self.backbone.get_last_keys(self.normalize(images)).float()  # pyright: ignore[reportCallIssue]

    def batches(
        self, source: Source, broken: dict[str, str], label: str = "features"
    ) -> Iterator[tuple[UInt8[Tensor, "b c size size"], Int[Tensor, " b"]]]:
        """The images of a source in order, resized and cropped, with their indices.

        torchvision's ``Resize(resize)`` and ``CenterCrop(size)`` in Pillow's bytes, from the whole image whatever its
        size. Broken ones are left out and noted in ``broken`` (name -> reason).
        """
        source = source.with_pixels(self.channels, self.pixel_range)
        prepare = center_crop(self.resize, self.size)
        batches = iterate_once(source, self.batch_size, prepare=prepare, device=self.device, broken=broken)
        for canvas, indices in tracked(batches, label, -(-len(source) // self.batch_size), self.progress):
            yield canvas.pixels, indices

    def features(
        self,
        source: Source,
        *,
        unit_length: bool = True,
        read: Callable[[Tensor], Tensor] | None = None,
    ) -> Features:
        """The [CLS] token of every image of a source, in its order (section 4.1).

        ``unit_length``: rows are scaled to length 1. ``read`` gives other features (b, d) of a batch of images (b, c,
        size, size) than ``cls_tokens``. Broken images are left out, and counted in the log with the first of them.

        Raises:
            ValueError: no image of the source can be read.
        """
        read = read or self.cls_tokens
        share = distributed.share(len(source))  # Of several processes each works on its own images, and all know all.
        parts, indices, broken = [], [], dict[str, str]()
        for images, batch_indices in self.batches(source.subset(share), broken):
            features = read(images)
            parts.append((F.normalize(features, dim=-1) if unit_length else features).cpu())
            indices.append(batch_indices.cpu() + share.start)
        return collected(source, parts, indices, broken)

    def _layers(self, images: Tensor, n: int) -> list[Tensor]:
        with self.frozen():
            layers = self.backbone.get_intermediate_layers(self.normalize(images), n)  # pyright: ignore
            return [layer.float() for layer in layers]


def collected(
    source: Source, parts: list[Tensor], indices: list[Tensor], broken: dict[str, str], complete: bool = False
) -> Features:
    """The features that all processes have made of their images of a source, in its order.

    Raises:
        ValueError: none of the images can be read, or one cannot where all must (``complete``); names the first.
    """
    broken = {name: reason for part in distributed.gather(broken) for name, reason in part.items()}
    first = next((f"{name}: {reason}" for name, reason in broken.items()), "the source is empty")
    width = max(distributed.gather(parts[0].shape[1] if parts else 0))
    if not width:
        raise ValueError(f"none of the {len(source)} images can be read ({first})")
    if broken and complete:
        raise ValueError(f"{len(broken)} of the {len(source)} images cannot be read, the first {first}")
    if broken:
        _log.warning("%d of %d images cannot be read and are left out, the first %s", len(broken), len(source), first)
    features = distributed.gather_rows(torch.cat([torch.empty(0, width), *parts]))
    found = distributed.gather_rows(torch.cat([torch.empty(0, dtype=torch.long), *indices]))
    order = found.argsort()
    found = found[order]
    return Features(features[order], None if source.labels is None else source.labels[found], found)


def condense(layers: Sequence[Float[Tensor, "b t d"]]) -> Float[Tensor, "b m d"]:
    """The [CLS] tokens of some blocks in order, then the mean patch token of the last of them (m: blocks + 1)."""
    return torch.stack([*(layer[:, 0] for layer in layers), layers[-1][:, 1:].mean(1)], 1)


def open_encoder(
    weights: "str | Path | nn.Module | Encoder",
    preprocessing: Preprocessing | None = None,
    checkpoint_key: str = "teacher",
    **options: Any,
) -> Encoder:
    """The encoder of some weights: whatever ``dino.load`` reads, a backbone, or an encoder to be given other options.

    Size, resize, mean, std, channels and pixel range are those that the weights bring (a run writes them into its
    files, released models have the paper's), unless ``options`` (the fields of ``Encoder``; None leaves a field alone)
    say otherwise. A new ``size`` without ``resize`` keeps the weights' own ratio of the two.

    Raises:
        ValueError: as ``dino.load``, or an option is out of range.

    >>> open_encoder(nn.Identity(), size=112).resize
    128
    """
    options = {name: value for name, value in options.items() if value is not None}
    unknown = sorted(set(options) - {field.name for field in dataclasses.fields(Encoder)})
    if unknown:
        raise TypeError(f"an encoder has no option {', '.join(unknown)}")
    if isinstance(weights, Encoder):
        known = _fields(weights) | (_fields(preprocessing) if preprocessing else {})
    elif isinstance(weights, nn.Module):  # It stays where it is.
        where = next((parameter.device for parameter in weights.parameters()), torch.device("cpu"))
        known = {"backbone": weights, "device": where, **_fields(preprocessing or Preprocessing())}
    else:
        found = open_weights(weights, checkpoint_key=checkpoint_key)
        if found.layout != "dino":  # Names of others: say what became of them.
            _log.warning("%s: %s", weights, found.summary)
        known = {"backbone": found.backbone, "device": "auto", **_fields(preprocessing or found.preprocessing)}
    size, resize = options.get("size"), options.get("resize")
    if size is not None and resize is None:
        options["resize"] = max(size, round(size * known["resize"] / known["size"]))
    elif resize is not None and size is None:
        options["size"] = min(known["size"], max(1, resize))
    return Encoder(**{**known, **options})


def _fields(of: Preprocessing | Encoder) -> dict[str, Any]:
    return {field.name: getattr(of, field.name) for field in dataclasses.fields(of)}
