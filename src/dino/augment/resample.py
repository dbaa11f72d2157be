"""Crop, resize and flip as two sparse matrix products, for many boxes of a batch of images at once.

Antialiased resizing is linear and separable: one crop is ``Wy @ image @ Wx.T``, where every row of ``Wy`` and ``Wx``
holds the few weights (taps) of Pillow's filter around one output pixel. A box shows in the position of the taps, a flip
in the order of the rows of ``Wx``. The products gather just those taps (``embedding_bag``): dense matrices would be
nearly all zeros.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn.functional import embedding_bag

from dino.machine import device as hardware

Kernel = Literal["bicubic", "bilinear"]
_REACH = {"bicubic": 2, "bilinear": 1}  # Pixels on either side of the centre, when not shrinking.
_ONE = 2**22  # Pillow's fixed point: weights are rounded to this fraction.


def _kernel(x: Tensor, kernel: Kernel) -> Tensor:
    x = x.abs()
    inner = (1 - x).clamp_(min=0)
    if kernel == "bilinear":
        return inner
    outer = (2 - x).clamp_(
        min=0
    )  # Keys 1981 with a = -0.5, its two cubics joined as powers of the distances to 1 and 2.
    return (outer * outer).mul_(outer - 1).mul_(0.5).add_((inner * inner).mul_(1 - 2 * inner))


def resize_taps(
    start: Int[Tensor, " n"],
    length: Int[Tensor, " n"],
    resized: Int[Tensor, " n"],
    first: Int[Tensor, " n"],
    count: int,
    taps: int,
    kernel: Kernel = "bicubic",
) -> tuple[Int[Tensor, "n count taps"], Float[Tensor, "n count taps"]]:
    """The rows of n resizing matrices as positions and weights, which add up to 1.

    Matrix i resizes ``length[i]`` pixels from ``start[i]`` on to ``resized[i]`` pixels, of which the ``count`` from
    ``first[i]`` on are computed. Taps outside the box are cut off; positions never leave it. ``taps`` is at least
    ``2 * reach * max(1, length / resized)``, the reach being 2 for bicubic, 1 for bilinear.
    """
    exact = torch.float32 if start.device.type == "mps" else torch.float64  # As Pillow; MPS has no double.
    scale = (length.to(exact) / resized)[:, None]
    stretch = scale.clamp(min=1)
    reach = _REACH[kernel] * stretch
    centre = (first[:, None] + torch.arange(0.5, count, device=start.device, dtype=exact)) * scale
    low = (centre - reach + 0.5).floor_().clamp_(min=0)
    position = low[..., None] + torch.arange(taps, device=start.device, dtype=exact)
    weight = _kernel((position + (0.5 - centre[..., None])) / stretch[..., None], kernel)
    weight.masked_fill_(position >= length[:, None, None], 0)
    weight.mul_(_ONE / weight.sum(-1, keepdim=True)).round_().div_(_ONE)
    inside = torch.minimum(position, length[:, None, None] - 1).to(torch.int64) + start[:, None, None]
    return inside, weight.to(torch.float32)


def _product(index: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """Every output row is a weighted sum of some rows, rounded to whole levels as in an 8-bit image."""
    taps = index.shape[-1]
    summed = embedding_bag(index.reshape(-1, taps), rows, per_sample_weights=weight.reshape(-1, taps), mode="sum")
    return summed.add_(0.5).clamp_(0, 255).floor_()


def _two_products(pixels: UInt8[Tensor, "b c h w"], plan: Int[Tensor, "n 2 6"], size: int, kernel: Kernel) -> Tensor:
    """(n, size, c, size) in whole levels: rows of ``pixels`` first (``plan[:, 1]``), then columns (``plan[:, 0]``).

    ``plan`` is on the host; its last dimension is start, length, resized, first, mirrored, image.
    """
    # Only the part of the canvases that some box needs.
    (top, left), (bottom, right) = plan[..., 0].amin(0).tolist(), (plan[..., 0] + plan[..., 1]).amax(0).tolist()
    pixels = pixels[:, :, top:bottom, left:right]
    (b, c, h, w), n = pixels.shape, len(plan)
    stretch = max(1.0, float((plan[..., 1] / plan[..., 2]).max()))
    taps = min(math.ceil(2 * _REACH[kernel] * stretch), int(plan[..., 1].max()))

    start, length, resized, first, mirrored, image = hardware.upload(plan, pixels.device).flatten(0, 1).unbind(-1)
    index, weight = resize_taps(start, length, resized, first, size, taps, kernel)
    mirrored = mirrored.bool()[:, None, None]
    index = torch.where(mirrored, index.flip(1), index).view(n, 2, size, taps)
    weight = torch.where(mirrored, weight.flip(1), weight).view(n, 2, size, taps)
    index_y = index[:, 0] + (torch.arange(n, device=pixels.device) * h)[:, None, None] - top
    index_x = index[:, 1] + (image.view(n, 2)[:, 1] * w)[:, None, None] - left

    table = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).view(b * w, c * h)
    table = _product(index_x, weight[:, 1], table).view(n, size, c, h)
    table = table.permute(0, 3, 2, 1).reshape(n * h, c * size)
    return _product(index_y, weight[:, 0], table).view(n, size, c, size)


def _resample(
    pixels: UInt8[Tensor, "b c h w"],
    boxes: Int[Tensor, "b v 4"],
    flip: Bool[Tensor, "b v"],
    resized: Int[Tensor, "b v 2"],
    first: Int[Tensor, "b v 2"],
    size: int,
    kernel: Kernel,
) -> Float[Tensor, "b v c size size"]:
    """All but ``pixels`` are on the host."""
    b, v = flip.shape
    mirrored = torch.stack((torch.zeros_like(flip), flip), -1)
    image = torch.arange(b)[:, None, None].expand(b, v, 2)
    plan = torch.stack((boxes[..., :2], boxes[..., 2:], resized, first, mirrored.long(), image), -1).view(b * v, 2, 6)

    # Each product ends on whole levels, so their order shows (by a level or two). From version 13 on Pillow begins with
    # the columns of boxes that lose much more height than width; here the image is then laid on its side.
    lost_height, lost_width = (plan[:, :, 1] - plan[:, :, 2]).unbind(1)
    tall = lost_height > (2 * lost_width).clamp(min=0)
    out = torch.empty(b * v, pixels.shape[1], size, size, device=pixels.device)
    for rows, on_its_side in ((~tall).nonzero().squeeze(1), False), (tall.nonzero().squeeze(1), True):
        if len(rows) == 0:
            continue
        if on_its_side:
            crops = _two_products(pixels.transpose(2, 3), plan[rows].flip(1), size, kernel).permute(0, 2, 3, 1)
        else:
            crops = _two_products(pixels, plan[rows], size, kernel).permute(0, 2, 1, 3)
        out.index_copy_(0, hardware.upload(rows, pixels.device), crops)
    return out.view(b, v, *out.shape[1:])


def resize_crops(
    pixels: UInt8[Tensor, "b c h w"],
    boxes: Int[Tensor, "b v 4"],
    flip: Bool[Tensor, "b v"],
    size: int,
    kernel: Kernel = "bicubic",
) -> Float[Tensor, "b v c size size"]:
    """Cuts ``v`` boxes (top, left, height, width in pixels) out of each image, resizes them to a square, flips some.

    Pillow's ``crop`` and ``resize``, in 8-bit levels (whole numbers from 0 to 255). No pixel outside a box is read.
    ``boxes`` and ``flip`` are on the CPU, the result is where ``pixels`` are.
    """
    square = torch.tensor(size).expand(*flip.shape, 2)
    return _resample(pixels, boxes, flip, square, torch.zeros_like(square), size, kernel)


def resize_and_center_crop(
    pixels: UInt8[Tensor, "b c h w"],
    sizes: Int[Tensor, "b 2"],
    resize: int,
    crop: int,
    kernel: Kernel = "bicubic",
) -> Float[Tensor, "b c crop crop"]:
    """The evaluation transform: the shorter side to ``resize`` pixels, aspect kept, then the central square.

    torchvision's ``Resize(resize)`` and ``CenterCrop(crop)`` on a PIL image, then 1/255: values from 0 to 1. Takes a
    canvas (``*canvas``): image i is ``pixels[i, :, :height, :width]`` with ``height, width = sizes[i]``.

    Raises:
        ValueError: ``crop`` is larger than ``resize``.
    """
    if crop > resize:
        raise ValueError(f"cannot cut {crop} pixels out of a shorter side of {resize}: crop must be at most resize")
    sizes = sizes.cpu().unsqueeze(1)  # (b, 1, 2)
    resized = (resize * sizes.double() / sizes.amin(-1, keepdim=True)).floor().long()
    first = ((resized - crop) / 2).round().long()  # Half to even, as Python rounds.
    boxes = torch.cat((torch.zeros_like(sizes), sizes), -1)
    levels = _resample(pixels, boxes, torch.zeros(sizes.shape[:2], dtype=torch.bool), resized, first, crop, kernel)
    return levels.squeeze(1).div_(255)
