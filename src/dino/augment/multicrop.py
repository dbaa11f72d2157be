"""Multi-crop: from each image of a batch, some large and many small random views, augmented on the training device."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from dino.augment import blur, color, resample
from dino.config import CropConfig
from dino.data.decode import Canvas
from dino.machine import device as hardware

_JITTER = (color.brightness, color.contrast, color.saturation, color.hue)
_TRIES = 10
_NARROW = 1.41  # Up to this width (just below the root of 2) a blur's boxes reach one pixel to either side.
# Values worked on at once on a CPU, so that they stay in its caches; changes the speed only.
_RESIZE_CHUNK, _COLOR_CHUNK = 2**21, 2**20


def _chunks(count: int, each: int, limit: int, device: torch.device) -> Iterator[slice]:
    """Slices of ``count`` items of ``each`` values. An accelerator has memory for more, and needs more to be busy."""
    step = max(1, (limit if device.type == "cpu" else 2**27) // each) if count else 1
    return (slice(i, i + step) for i in range(0, count, step))


class Crops(NamedTuple):
    """The views of a batch of images, normalised: the teacher sees the global ones, the student all."""

    global_crops: Float[Tensor, "b t c g g"]
    local_crops: Float[Tensor, "b v c l l"]


class CropDraws(NamedTuple):
    """Everything random about the ``n`` views of each image, global crops first; on the CPU."""

    boxes: Int[Tensor, "b n 4"]  # Top, left, height, width in pixels of the image.
    flip: Bool[Tensor, "b n"]
    jitter: Int[Tensor, "b n k"]  # Colour operations in order, numbered as the columns of ``strength``; -1: none.
    strength: Float[Tensor, "b n 4"]  # Factors of brightness, contrast and saturation; shift of hue in turns.
    grayscale: Bool[Tensor, "b n"]
    sigma: Float[Tensor, "b n"]  # Width of the blur in pixels of the crop; 0: none.
    solarize: Bool[Tensor, "b n"]


class MultiCrop:
    """The multi-crop strategy: two global views and several local ones of lower resolution (section 3.1).

    Each view is, in this order: random-resized-crop (bicubic) and flip, colour jitter, grayscale, Gaussian blur,
    solarize, normalise. Up to the last step these are the bytes that torchvision and Pillow give (of the resized pixels
    a few in ten thousand are one level off). Sizes, probabilities and strengths: ``CropConfig``.

    >>> canvas = Canvas(torch.zeros(2, 3, 40, 50, dtype=torch.uint8), torch.tensor([[40, 50], [30, 50]]))
    >>> crops = MultiCrop(CropConfig(global_size=32, local_size=16, local_count=6))(canvas)
    >>> crops.global_crops.shape, crops.local_crops.shape
    (torch.Size([2, 2, 3, 32, 32]), torch.Size([2, 6, 3, 16, 16]))
    """

    def __init__(self, config: CropConfig = CropConfig()):
        self.config = config
        strengths = (config.brightness, config.contrast, config.saturation, config.hue)
        self._active = [i for i, strength in enumerate(strengths) if strength > 0]

    def __call__(
        self, canvas: Canvas, generator: Generator | None = None, *, rank: int = 0, world_size: int = 1
    ) -> Crops:
        """Draws and applies: ``apply(canvas, sample(canvas.sizes, generator, ...))``.

        The same state of ``generator`` gives the same crops. Keep ``canvas.sizes`` on the CPU: it is read there.

        Raises:
            ValueError: the channels of the images do not fit the configuration.
        """
        return self.apply(canvas, self.sample(canvas.sizes, generator, rank=rank, world_size=world_size))

    def sample(
        self, sizes: Int[Tensor, "b 2"], generator: Generator | None = None, *, rank: int = 0, world_size: int = 1
    ) -> CropDraws:
        """Draws the parameters of every view of images of these heights and widths.

        Numbers are drawn for the whole global batch of ``b * world_size`` images, and this process takes its rows, so
        any number of processes sees the same crops. ``generator`` is on the CPU; None: another one every time.
        """
        if generator is None:
            generator = Generator()
            generator.seed()
        c, b, n = self.config, len(sizes), self.config.global_count + self.config.local_count
        rows = slice(rank * b, (rank + 1) * b)
        uniform = torch.rand(b * world_size, n, 2 * _TRIES + 16, generator=generator)[rows]
        tries, order, strength, single = uniform.split((2 * _TRIES, 4, 4, 8), -1)
        y, x, flip, jitter, grayscale, blurred, sigma, solarize = single.unbind(-1)
        active = torch.tensor(self._active, dtype=torch.int64)
        order = active[order[..., active].argsort(-1)]
        spread = torch.tensor((c.brightness, c.contrast, c.saturation, c.hue))
        low, high = c.blur_sigma
        return CropDraws(
            boxes=self._boxes(sizes.cpu(), tries.double().unflatten(-1, (2, _TRIES)), y.double(), x.double()),
            flip=flip < c.flip,
            jitter=torch.where((jitter < c.jitter)[..., None], order, -1),
            strength=torch.tensor((1.0, 1.0, 1.0, 0.0)) + (2 * strength - 1) * spread,
            grayscale=grayscale < c.grayscale,
            sigma=torch.where(blurred < self._each(c.blur), low + sigma * (high - low), 0.0),
            solarize=solarize < self._each(c.solarize),
        )

    def _each(self, triple: tuple[float, float, float]) -> Float[Tensor, " n"]:
        """First global crop, other global crops, local crops -> one value a crop."""
        first, other, local = triple
        return torch.tensor([first] + [other] * (self.config.global_count - 1) + [local] * self.config.local_count)

    def _boxes(self, sizes: Tensor, tries: Tensor, y: Tensor, x: Tensor) -> Int[Tensor, "b n 4"]:
        """RandomResizedCrop of torchvision: the first of ten tries that fits, else the largest central box allowed."""
        c = self.config
        height, width = sizes.double()[:, None].unbind(-1)  # (b, 1)
        (global_low, global_high), (local_low, local_high) = c.global_scale, c.local_scale
        low = self._each((global_low, global_low, local_low)).double()[:, None]
        high = self._each((global_high, global_high, local_high)).double()[:, None]
        narrow, wide = c.aspect_ratio

        area = (height * width)[..., None] * (low + tries[:, :, 0] * (high - low))  # (b, n, tries)
        aspect = torch.exp(math.log(narrow) + tries[:, :, 1] * math.log(wide / narrow))
        tried = torch.stack((area / aspect, area * aspect)).sqrt_().round_()  # Heights, widths.
        limit = torch.stack((height, width))[..., None]
        fits = ((tried >= 1) & (tried <= limit)).all(0)
        tried_h, tried_w = tried.gather(-1, fits.int().argmax(-1, keepdim=True).expand(2, -1, -1, 1)).squeeze(-1)

        found = fits.any(-1)
        box_h = torch.where(found, tried_h, torch.minimum(height, (width / narrow).round())).clamp_(min=1)
        box_w = torch.where(found, tried_w, torch.minimum(width, (height * wide).round())).clamp_(min=1)
        top = torch.where(found, y * (height - box_h + 1), (height - box_h) / 2).floor_()
        left = torch.where(found, x * (width - box_w + 1), (width - box_w) / 2).floor_()
        return torch.stack((top, left, box_h, box_w), -1).long()

    @torch.no_grad()
    def apply(self, canvas: Canvas, draws: CropDraws) -> Crops:
        """Makes the views that ``draws`` describes, on the device of ``canvas.pixels``.

        Raises:
            ValueError: the channels of the images do not fit the configuration.
        """
        self._check_channels(canvas.pixels.shape[1])
        t = self.config.global_count
        return Crops(
            self._views(canvas.pixels, CropDraws(*(x[:, :t] for x in draws)), self.config.global_size),
            self._views(canvas.pixels, CropDraws(*(x[:, t:] for x in draws)), self.config.local_size),
        )

    def _views(self, pixels: Tensor, draws: CropDraws, size: int) -> Float[Tensor, "b n c size size"]:
        (b, c, h, _), n, device = pixels.shape, draws.flip.shape[1], pixels.device
        out = torch.empty(b, n, c, size, size, device=device)
        std = hardware.upload(torch.tensor(self.config.std), device).view(-1, 1, 1)
        shift, scale = -hardware.upload(torch.tensor(self.config.mean), device).view(-1, 1, 1) / std, 1 / (255 * std)
        for images in _chunks(b if n else 0, n * c * size * max(h, size), _RESIZE_CHUNK, device):
            part = CropDraws(*(x[images] for x in draws))
            levels = resample.resize_crops(pixels[images], part.boxes, part.flip, size).flatten(0, 1)
            part = CropDraws(*(x.flatten(0, 1) for x in part))
            finished = out[images].flatten(0, 1)
            for crops in _chunks(len(levels), c * size * size, _COLOR_CHUNK, device):
                changed = self._change(levels[crops], CropDraws(*(x[crops] for x in part)))
                torch.add(changed.mul_(scale), shift, out=finished[crops])
        return out

    def _change(self, levels: Float[Tensor, "n c s s"], draws: CropDraws) -> Float[Tensor, "n c s s"]:
        """Colours and blur: one operation at a time, on the crops whose turn it is. May overwrite ``levels``."""
        turns = draws.jitter.shape[1]
        colors = (draws.jitter.T[:, None] == torch.arange(len(_JITTER))[:, None]).flatten(0, 1)
        narrow = draws.sigma <= _NARROW
        rest = torch.stack((draws.grayscale, narrow & (draws.sigma > 0), ~narrow, draws.solarize))
        operations: list[Callable[[Tensor, Tensor], Tensor]] = [
            *_JITTER * turns,
            lambda crops, _: color.grayscale(crops),
            partial(blur.gaussian_blur, max_sigma=_NARROW),
            partial(blur.gaussian_blur, max_sigma=self.config.blur_sigma[1]),
            lambda crops, _: color.solarize(crops),
        ]
        fires = torch.cat((colors, rest))  # (operations, n)
        strength = torch.cat((draws.strength.T.repeat(turns, 1), draws.sigma.expand(len(rest), -1)))
        # Which crops is known on the host, so nothing waits for the device; two uploads for all operations.
        counts = fires.sum(1).tolist()
        rows = hardware.upload(fires.nonzero()[:, 1], levels.device).split(counts)
        strengths = hardware.upload(strength[fires], levels.device).split(counts)
        for operation, chosen, values in zip(operations, rows, strengths, strict=True):
            if len(chosen) == len(levels):
                levels = operation(levels, values)
            elif len(chosen):
                levels.index_copy_(0, chosen, operation(levels.index_select(0, chosen), values))
        return levels

    def _check_channels(self, channels: int) -> None:
        c = self.config
        if channels != 3 and (c.grayscale > 0 or (c.jitter > 0 and (c.saturation > 0 or c.hue > 0))):
            raise ValueError(
                f"images have {channels} channels, but saturation, hue and grayscale need RGB: "
                "set --crops.saturation 0 --crops.hue 0 --crops.grayscale 0"
            )
        for name, values in (("mean", c.mean), ("std", c.std)):
            if len(values) not in (1, channels):
                raise ValueError(
                    f"images have {channels} channels, but --crops.{name} has {len(values)} values: {values}"
                )
