"""Convolutions in bfloat16 on a CPU, around a fault of the library that computes them.

Where an image is so small that some entry of the kernel never meets a pixel, only padding, oneDNN leaves that entry's
gradient unwritten: whatever the memory held before, often no number at all (torch 2.15, 3 x 3 at stride 2 on 1 x 1).
In float32 it is zero, as it must be. ``tests/test_convolutions.py`` shows whether it is still so.
"""

import functools

import torch
from torch import Tensor, nn


class Convolution(nn.Conv2d):
    """``nn.Conv2d``, which on a CPU computes in float32 where bfloat16 has the fault."""

    def forward(self, input: Tensor) -> Tensor:
        if not _in_bfloat16(input) or self.padding_mode != "zeros" or isinstance(self.padding, str):
            return super().forward(input)
        sides = zip(input.shape[-2:], self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        if all(every_entry_meets_a_pixel(*side) for side in sides):
            return super().forward(input)
        with torch.autocast("cpu", enabled=False):
            return self._conv_forward(
                input.float(), self.weight.float(), None if self.bias is None else self.bias.float()
            )


def _in_bfloat16(images: Tensor) -> bool:
    """Whether a convolution of these is computed in bfloat16 on a CPU."""
    if images.device.type != "cpu":
        return False
    cast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return images.dtype == torch.bfloat16 or (cast and images.dtype == torch.float32)


@functools.lru_cache(maxsize=4096)
def every_entry_meets_a_pixel(side: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> bool:
    """Whether each of the ``kernel`` entries lies at least once on one of ``side`` pixels, not on padding alone.

    >>> [every_entry_meets_a_pixel(side, kernel=3, stride=2, padding=1) for side in (1, 2, 3)]
    [False, False, True]
    """
    outputs = (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    starts = range(-padding, stride * outputs - padding, stride)
    return all(any(0 <= start + dilation * entry < side for start in starts) for entry in range(kernel))


def mend_convolutions(module: nn.Module) -> None:
    """Makes every plain ``nn.Conv2d`` of a network a ``Convolution``; its weights and their names stay."""
    for part in module.modules():
        if type(part) is nn.Conv2d:
            part.__class__ = Convolution
