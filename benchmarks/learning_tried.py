"""Parts that ``learning.py`` tries on top of its variants, and that the package does not have: what each of them gave
stands in docs/learning.md.

Each is a context manager of (config, tflop, images, seed) that gives the planned configuration and what
``dino.pretrain`` is called with besides.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dino.augment.multicrop import Crops, MultiCrop
from dino.config import Config, replace
from dino.models.vision_transformer import VisionTransformer
from learning_variants import planned, tflop_per_step

Planned = tuple[Config, dict[str, Any]]


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    real = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, real)


@contextlib.contextmanager
def as_it_is(*of: Any) -> Iterator[Planned]:
    yield planned(*of), {}


@contextlib.contextmanager
def low_resolution_first(
    share: float, global_size: int, local_size: int, config: Config, tflop: float, *of: Any
) -> Iterator[Planned]:
    """A share of the operations at smaller crops, the rest as the variant has it (FastDINOv2, arXiv 2507.03779)."""
    small = replace(config, crops__global_size=global_size, crops__local_size=local_size)
    first = round(share * tflop / tflop_per_step(small))
    steps = first + round((1 - share) * tflop / tflop_per_step(config))
    plan = replace(planned(config, tflop, *of), optim__length=f"{steps} steps", optim__warmup=f"{steps // 10} steps")
    done, augments = 0, [MultiCrop(one.crops) for one in (small, config)]

    def augment(*arguments: Any, **named: Any) -> Crops:
        nonlocal done
        done += 1
        return augments[done > first](*arguments, **named)

    yield plan, {"augment": augment}


@contextlib.contextmanager
def token_dropout(rate: float, config: Config, *of: Any) -> Iterator[Planned]:
    """The student sees a part of the patches of its global crops (arXiv 2410.22364)."""
    real = VisionTransformer._embed

    def embed(self: VisionTransformer, images: Tensor) -> Tensor:
        tokens = real(self, images)
        if not (torch.is_grad_enabled() and images.shape[-1] == config.crops.global_size):
            return tokens
        b, count = tokens.shape[0], tokens.shape[1] - 1
        kept = torch.rand(b, count).argsort(1)[:, : round((1 - rate) * count)]
        patches = tokens[:, 1:].gather(1, kept[..., None].expand(-1, -1, tokens.shape[2]))
        return torch.cat([tokens[:, :1], patches], 1)

    with replaced(VisionTransformer, "_embed", embed):
        yield planned(config, *of), {}


# Name -> the variant that it is put on, and the part.
TRIED: dict[str, tuple[str, Callable[..., Any]]] = {
    "resnet, low resolution first": ("resnet", functools.partial(low_resolution_first, 0.5, 32, 16)),
    "nano, token dropout": ("nano", functools.partial(token_dropout, 0.5)),
}
