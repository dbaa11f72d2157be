"""Colour operations on a batch of crops, each crop with its own strength.

Values are 8-bit levels kept in float32 (whole numbers from 0 to 255), and every operation rounds as Pillow does, since
the reference augments PIL images: a change of hue amplifies one level of difference, so nearly equal would not stay so.
"""

import torch
from jaxtyping import Float
from torch import Tensor

Levels = Float[Tensor, "n c h w"]
Factor = Float[Tensor, " n"]


def _blend(base: Tensor, levels: Levels, factor: Factor) -> Levels:
    """``base`` at factor 0, ``levels`` at 1, beyond at more; cut to 0..255 and truncated."""
    return (levels - base).mul_(factor[:, None, None, None]).add_(base).clamp_(0, 255).floor_()


def luma(levels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 1 h w"]:
    """Grey level by ITU-R 601, in Pillow's 16-bit whole weights: sums stay below 2^24, so float32 is exact."""
    red, green, blue = levels.unbind(1)
    return (red * 19595).add_(green * 38470).add_(blue * 7471).add_(32768).div_(65536).floor_().unsqueeze(1)


def brightness(levels: Levels, factor: Factor) -> Levels:
    """Blends with black: factor 0 is black, 1 the image itself."""
    return (levels * factor[:, None, None, None]).clamp_(0, 255).floor_()


def contrast(levels: Levels, factor: Factor) -> Levels:
    """Blends with the mean grey level of the crop, rounded; without RGB, with the mean of all channels."""
    grey = luma(levels) if levels.shape[1] == 3 else levels
    return _blend(grey.mean((1, 2, 3), keepdim=True).add_(0.5).floor_(), levels, factor)


def saturation(levels: Float[Tensor, "n 3 h w"], factor: Factor) -> Float[Tensor, "n 3 h w"]:
    """Blends with the grey image."""
    return _blend(luma(levels), levels, factor)


def hue(levels: Float[Tensor, "n 3 h w"], shift: Factor) -> Float[Tensor, "n 3 h w"]:
    """Turns the colour circle by ``shift`` turns (-0.5 to 0.5): RGB to HSV, add to H, back; all three of HSV are 8-bit.

    Gives Pillow's bytes for every colour (checked over all 2^24; the order of the divisions below is what does it).
    """
    red, green, blue = levels.unbind(1)
    value, low = torch.maximum(torch.maximum(red, green), blue), torch.minimum(torch.minimum(red, green), blue)
    span = value - low
    width = span.clamp(min=1)  # Grey has no hue: any number does, since its saturation is 0.

    # Sixths of a turn are ``whole + sign * middle``: from one pure colour to the next, by how far the middle channel is
    # from the top. Products of 0/1 masks, because torch.where is ten times slower on the CPU.
    middle = (value * 2).add_(low).sub_(red).sub_(green).sub_(blue).div_(width)
    red_top = _equal(red, value)
    green_top = _equal(green, value).mul_(1 - red_top)
    blue_top = (1 - red_top).sub_(green_top)
    blue_low, red_low = _equal(blue, low).mul_(2).sub_(1), _equal(red, low).mul_(2).sub_(1)  # -1 or 1
    sign = (green_top - red_top).mul_(blue_low).add_(red_low.mul_(blue_top))
    whole = green_top.add_(blue_top, alpha=2).mul_(2).sub_(sign)
    turn = whole.add_(middle.mul_(sign)).div_(6)
    angle = turn.add_(torch.lt(turn, 0, out=sign)).mul_(255).floor_()
    saturation = span.mul_(255).div_(value.clamp(min=1)).floor_()

    angle.add_((shift * 255).trunc()[:, None, None])
    angle.sub_((angle / 256).floor_(), alpha=256).mul_(6)  # Eight bits wrap around; 255 to a sixth of the circle.
    # How far each channel falls from the top: 0 for the largest of the three, 255 for the smallest, a ramp between.
    falls = ((angle - 765).abs_().neg_().add_(510), (angle - 510).abs_().sub_(255), (angle - 1020).abs_().sub_(255))
    depth = saturation.mul_(value).div_(255 * 255)
    value.add_(0.5)
    out = torch.empty_like(levels)
    for channel, fall in enumerate(falls):
        torch.floor(torch.sub(value, fall.clamp_(0, 255).mul_(depth), out=fall), out=out[:, channel])
    return out


def _equal(a: Tensor, b: Tensor) -> Tensor:
    return torch.eq(a, b, out=torch.empty_like(a))  # 0.0 or 1.0


def grayscale(levels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
    """The grey level in all three channels."""
    return luma(levels).repeat(1, 3, 1, 1)


def solarize(levels: Levels) -> Levels:
    """Inverts every level from 128 up."""
    return torch.where(levels < 128, levels, 255 - levels)
