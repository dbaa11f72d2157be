"""Heads on the patch tokens of a frozen backbone, and how they are trained: linear, and DPT."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from dino.encoder.encoder import Encoder
from dino.machine.progress import tracked
from dino.machine.randomness import generator
from dino.method.schedules import cosine
from dino.options import SegmentOptions

DPT_BLOCKS = 4
_PATCHES_PER_IMAGE = 256  # The linear head takes so many for each image of a batch.
Square = Callable[[int], tuple[UInt8[Tensor, "c s s"], Int64[Tensor, "s s"]]]  # Image i, and its classes (-1: void).


class LinearHead(nn.Module):
    """The logits of every patch from its own tokens of the last blocks, side by side."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, classes)

    def forward(self, maps: list[Float[Tensor, "b d h w"]]) -> Float[Tensor, "b c h w"]:
        return self.linear(torch.cat(maps, 1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class DptHead(nn.Module):
    """The decoder of DPT (Ranftl et al. 2021, arXiv 2103.13413) by segmentation_models_pytorch, without its readout of
    the [CLS] token.

    Raises:
        ValueError: segmentation_models_pytorch is not installed.
    """

    def __init__(self, width: int, patch_size: int, classes: int) -> None:
        super().__init__()
        if importlib.util.find_spec("segmentation_models_pytorch") is None:
            raise ValueError("--decoder dpt needs pip install segmentation-models-pytorch; --decoder linear does not")
        from segmentation_models_pytorch.decoders.dpt.decoder import DPTDecoder, DPTSegmentationHead

        stride = 2 ** round(torch.tensor(float(patch_size)).log2().item())  # It knows powers of two.
        # Half as wide a block down, as in DINOv2's; and no wider than the tokens.
        inner, fused = [max(width >> DPT_BLOCKS - 1 - i, 8) for i in range(DPT_BLOCKS)], min(256, width)
        strides = (stride,) * DPT_BLOCKS
        self.decoder = DPTDecoder((width,) * DPT_BLOCKS, strides, False, "ignore", inner, fused)
        self.head = DPTSegmentationHead(fused, classes)

    def forward(self, maps: list[Float[Tensor, "b d h w"]]) -> Float[Tensor, "b c _ _"]:
        return self.head(self.decoder(list(maps), [None] * DPT_BLOCKS))


def make_head(encoder: Encoder, options: SegmentOptions, classes: int) -> nn.Module:
    """A new head for a backbone.

    Raises:
        ValueError: the backbone has no blocks to look into, which dpt and more than one block need.
    """
    if not encoder.backbone.has_blocks and (options.decoder == "dpt" or options.blocks > 1):
        flag = "--decoder dpt" if options.decoder == "dpt" else f"--blocks {options.blocks}"
        raise ValueError(f"{flag} is not allowed: these weights have no blocks to look into")
    if options.decoder == "dpt":
        return DptHead(encoder.embed_dim, encoder.patch_size, classes)
    return LinearHead(encoder.embed_dim * options.blocks, classes)


def unit_of(encoder: Encoder, options: SegmentOptions) -> int:
    """Sides of images are multiples of this: a patch; DPT halves the grid of patches twice."""
    return encoder.patch_size * (4 if options.decoder == "dpt" else 1)


def soft_cross_entropy(logits: Float[Tensor, "p c"], shares: Float[Tensor, "p c"]) -> Float[Tensor, ""]:
    """The mean over pixels, where ``shares`` say which share of a patch's pixels each class has; void has no share.

    >>> logits, half = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.5, 0.0]])  # The other half is void.
    >>> round(soft_cross_entropy(logits, half).item(), 4)  # ln 2
    0.6931
    """
    return -(shares * logits.log_softmax(-1)).sum() / shares.sum().clamp_min(1e-6)


def train_linear(
    head: LinearHead, features: Float[Tensor, "p d"], shares: Float[Tensor, "p c"], options: SegmentOptions
) -> None:
    """AdamW and a cosine on standardised features; the standardisation then goes into the weights."""
    shift, scale = features.mean(0), features.std(0, unbiased=False).clamp_min(1e-6)
    size = min(options.batch_size * _PATCHES_PER_IMAGE, len(features))
    each = len(features) // size
    total = options.epochs * each
    nn.init.trunc_normal_(head.linear.weight, std=0.02, generator=generator(options.seed, "linear head"))
    nn.init.zeros_(head.linear.bias)
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=options.weight_decay)
    for epoch in range(options.epochs):
        order = torch.randperm(len(features), generator=generator(options.seed, "patches", epoch))
        for i, rows in enumerate(order[: each * size].split(size)):
            optimizer.param_groups[0]["lr"] = cosine(epoch * each + i, options.lr, 0.0, total)
            loss = soft_cross_entropy(head.linear((features[rows] - shift) / scale), shares[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        head.linear.weight.div_(scale)
        head.linear.bias.sub_(head.linear.weight @ shift)


def train_dpt(head: nn.Module, encoder: Encoder, square: Square, count: int, options: SegmentOptions) -> None:
    """AdamW and a cosine on squares of whole images, half of them flipped; the loss is that of every pixel."""
    size = min(options.batch_size, count)
    each = count // size
    total = options.epochs * each
    optimizer: Any = torch.optim.AdamW(head.parameters(), weight_decay=options.weight_decay)
    head.train()
    for step in tracked(range(total), "training DPT", total, encoder.progress):
        order = torch.randperm(count, generator=generator(options.seed, "images", step // each))
        rows = order[step % each * size :][:size].tolist()
        images, labels = (torch.stack(part) for part in zip(*map(square, rows), strict=True))
        flips = torch.rand(size, generator=generator(options.seed, "flips", step)) < 0.5
        images[flips], labels[flips] = images[flips].flip(-1), labels[flips].flip(-1)
        maps = encoder.pyramid(images, DPT_BLOCKS)
        logits = F.interpolate(head(maps), labels.shape[-2:], mode="bilinear")
        known = labels >= 0
        loss = F.cross_entropy(
            logits, labels.to(encoder.device), ignore_index=-1, reduction="sum"
        ) / known.sum().clamp_min(1)
        optimizer.param_groups[0]["lr"] = cosine(step, options.lr, 0.0, total)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    head.eval()
