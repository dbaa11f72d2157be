"""What every backbone can be asked for, with answers for those that have no blocks to look into."""

import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dino.models.convolutions import mend_convolutions


class Tokens(NamedTuple):
    """What every backbone gives: the [CLS] token and the patch tokens, whose grid is in the shape."""

    cls_token: Float[Tensor, "b d"]
    patch_tokens: Float[Tensor, "b h w d"]


class Backbone(nn.Module):
    """A network from images to ``Tokens``, ``embed_dim`` wide, one patch token for ``patch_size`` pixels a side.

    A subclass writes ``forward`` and those two numbers. The methods here are what the rest of the package calls; the
    vision transformers answer them from their blocks, everything else as they stand.
    """

    embed_dim: int
    patch_size: int
    has_blocks: bool = False  # Whether ``get_intermediate_layers`` has something to look into.
    has_attention: bool = False  # Whether ``get_last_selfattention`` has something to show.
    has_keys: bool = False  # Whether ``get_last_keys`` gives keys; without, it gives the patch tokens.

    def cls_tokens(
        self, groups: Sequence[Float[Tensor, "_ c _ _"]], drop_path: Sequence[Tensor] | None = None
    ) -> list[Float[Tensor, "_ d"]]:
        """The [CLS] tokens alone, for groups of images of one size each: what training needs."""
        del drop_path  # Whoever draws its own stochastic depth is given no masks.
        return [self(images).cls_token for images in groups]

    def sample_drop_path(self, b: int, generator: torch.Generator | None = None) -> Tensor | None:
        """The multipliers of stochastic depth for ``b`` samples; None for a network that draws its own."""
        del b, generator
        return None

    def get_intermediate_layers(self, images: Float[Tensor, "b c h w"], n: int = 1) -> list[Float[Tensor, "b t d"]]:
        """The tokens ([CLS], then patches row by row) of the last ``n`` blocks, older first.

        Raises:
            ValueError: this network has no blocks to look into.
        """
        del images, n
        raise ValueError(f"{describe(self)} has no blocks to look into: take a vision transformer")

    def get_last_selfattention(
        self, images: Float[Tensor, "b c h w"], queries: slice = slice(None)
    ) -> Float[Tensor, "b heads q t"]:
        """The self-attention of the last block: [sample, head, query, key], the [CLS] token first.

        Raises:
            ValueError: this network has no attention to show (``has_attention``).
        """
        del images, queries
        raise ValueError(f"{describe(self)} has no attention maps: take one of the vit_* backbones")

    def get_last_keys(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b h w d"]:
        """The keys of the patches in the last block; of a network that has none its patch tokens."""
        return self(images).patch_tokens


_METHODS = ("cls_tokens", "sample_drop_path", "get_intermediate_layers", "get_last_selfattention", "get_last_keys")
_FLAGS = {
    "has_blocks": "get_intermediate_layers",
    "has_attention": "get_last_selfattention",
    "has_keys": "get_last_keys",
}


def as_backbone(module: nn.Module) -> Any:
    """The module itself, given the methods of ``Backbone`` that it lacks; its weights and their names stay.

    So a network that a caller wrote needs nothing but ``forward``, and ``embed_dim`` where a head or probe is trained.
    """
    if not isinstance(module, Backbone):
        mend_convolutions(module)
        for flag, method in _FLAGS.items():
            object.__setattr__(module, flag, getattr(module, flag, hasattr(module, method)))
        for name in _METHODS:
            if not hasattr(module, name):
                object.__setattr__(module, name, types.MethodType(getattr(Backbone, name), module))
    return module


def describe(backbone: nn.Module) -> str:
    """How messages call a backbone: its name where it has one, else its class.

    >>> describe(nn.Identity())
    'Identity'
    """
    return str(getattr(backbone, "name", type(backbone).__name__))
