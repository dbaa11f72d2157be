"""The Vision Transformer of DINO (section 3.1, "Network architecture"; arXiv 2010.11929; its sizes: 2012.12877)."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dino.models.backbone import Backbone, Tokens
from dino.models.layers import Block, PatchEmbed, init_linear, pack, sample_keep, unpack


class VisionTransformer(Backbone):
    """A Vision Transformer that takes images of any size and gives the [CLS] token and the patch tokens.

    ``img_size`` (pixels a side) only sets how many positions are learned: for other sizes, square or not, the table of
    positions is interpolated. With ``pos_offset`` 0.1 this follows the released code, which resizes by the factor
    (n + 0.1) / side; 0 resizes to exactly n, as the paper's weights were trained. Borders that do not fill a patch are
    ignored. ``drop_path_rate`` is the stochastic depth of the last block; it grows linearly from 0 in the first.

    Raises:
        ValueError: ``embed_dim`` is no multiple of ``num_heads``, ``img_size`` is below ``patch_size``, or a rate or
            offset is outside [0, 1).

    >>> backbone = VisionTransformer(img_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=3)
    >>> tokens = backbone(torch.zeros(5, 3, 32, 48))
    >>> tokens.cls_token.shape, tokens.patch_tokens.shape
    (torch.Size([5, 12]), torch.Size([5, 4, 6, 12]))
    """

    has_blocks = has_attention = has_keys = True

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float | int = 4.0,
        drop_path_rate: float | int = 0.0,
        pos_offset: float | int = 0.1,
    ):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not divisible by num_heads {num_heads}")
        if img_size < patch_size:
            raise ValueError(f"img_size {img_size} is smaller than patch_size {patch_size}")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate {drop_path_rate} is not allowed: from 0 to below 1")
        if not 0 <= pos_offset < 1:
            raise ValueError(f"pos_offset {pos_offset} is not allowed: 0 (exact size) to below 1 (released: 0.1)")
        self.embed_dim, self.num_heads, self.patch_size, self.in_chans = embed_dim, num_heads, patch_size, in_chans
        self.pos_offset = pos_offset
        self.drop_path_rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.side = img_size // patch_size  # Of the table of positions, in patches.

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.side**2, embed_dim))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_linear)

    def forward(
        self, images: Float[Tensor, "b c height width"], drop_path: Float[Tensor, "depth 2 b"] | None = None
    ) -> Tokens:
        """Gives the tokens after the last block and the final norm.

        ``drop_path``: multipliers of every residual branch (see ``sample_drop_path``), used as given in train and eval
        mode. Without it, a model in train mode draws its own.

        Raises:
            ValueError: wrong number of channels, or images smaller than one patch.
        """
        x, shapes, keep = self._pack([images], None if drop_path is None else [drop_path])
        for i, block in enumerate(self.blocks):
            x = block(x, shapes, None if keep is None else keep[i])
        (x,) = unpack(self.norm(x), shapes)
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        return Tokens(x[:, 0], x[:, 1:].unflatten(1, grid))

    def cls_tokens(
        self,
        groups: Sequence[Float[Tensor, "_ c _ _"]],
        drop_path: Sequence[Float[Tensor, "depth 2 _"]] | None = None,
    ) -> list[Float[Tensor, "_ d"]]:
        """The [CLS] tokens alone, for groups of images of one size each: what training needs.

        As ``forward`` on each group, in one pass: everything but the attention works on the tokens of all groups
        together, and the last block on nothing but what reaches the [CLS] token.
        """
        x, shapes, keep = self._pack(groups, drop_path)
        for i, block in enumerate(self.blocks[:-1]):
            x = block(x, shapes, None if keep is None else keep[i])
        last = cast(Block, self.blocks[-1])
        x = last.of_first(x, shapes, None if keep is None else keep[-1])
        return list(self.norm(x).split([b for b, _ in shapes]))

    def _pack(
        self, groups: Sequence[Tensor], drop_path: Sequence[Tensor] | None
    ) -> tuple[Float[Tensor, "n d"], list[tuple[int, int]], Float[Tensor, "depth 2 n"] | None]:
        """Packed tokens (see ``Attention``), their shapes, and for every row the multipliers of all branches."""
        tokens = [self._embed(images) for images in groups]
        shapes = [(x.shape[0], x.shape[1]) for x in tokens]
        if drop_path is None and self.training:
            drawn = self.sample_drop_path(sum(b for b, _ in shapes))
            drop_path = None if drawn is None else drawn.split([b for b, _ in shapes], -1)
        keep = None
        if drop_path is not None:
            rows = [mask.repeat_interleave(t, -1) for mask, (_, t) in zip(drop_path, shapes, strict=True)]
            keep = torch.cat(rows, -1).to(groups[0].device)
        return pack([x.flatten(0, 1) for x in tokens]), shapes, keep

    def sample_drop_path(self, b: int, generator: torch.Generator | None = None) -> Float[Tensor, "depth 2 {b}"] | None:
        """Draws the multipliers of both residual branches of every block for ``b`` samples, from a CPU generator.

        ``None`` when the rate is 0. Drawn apart from ``forward`` so that several processes can share one draw.
        """
        if not any(self.drop_path_rates):
            return None
        return torch.stack([sample_keep(2 * b, rate, generator).view(2, b) for rate in self.drop_path_rates])

    def get_intermediate_layers(
        self, images: Float[Tensor, "b c height width"], n: int = 1
    ) -> list[Float[Tensor, "b t d"]]:
        """The tokens ([CLS], then patches row by row) of the last ``n`` blocks, older first, each after the final norm.

        Raises:
            ValueError: ``n`` is not between 1 and the number of blocks.
        """
        if not 1 <= n <= len(self.blocks):
            raise ValueError(f"n={n} is not allowed: this model has {len(self.blocks)} blocks")
        x, shapes, _ = self._pack([images], None)
        layers = []
        for i, block in enumerate(self.blocks):
            x = block(x, shapes)
            if i >= len(self.blocks) - n:
                layers += unpack(self.norm(x), shapes)
        return layers

    def get_last_selfattention(
        self, images: Float[Tensor, "b c height width"], queries: slice = slice(None)
    ) -> Float[Tensor, "b heads q t"]:
        """The self-attention of the last block: [sample, head, query, key], the [CLS] token first (figures 1 and 3).

        ``queries``: the query tokens wanted, all of them unless given.
        """
        x, last = self._before_last(images)
        return last.attn.attention(x, queries)

    def get_last_keys(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b h w d"]:
        """The keys of the patches in the last block, heads side by side: what object discovery compares."""
        x, last = self._before_last(images)
        keys = last.attn.qkv(x).chunk(3, dim=-1)[1]
        return keys[:, 1:].unflatten(1, (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size))

    def _before_last(self, images: Tensor) -> tuple[Float[Tensor, "b t d"], Block]:
        """What the attention of the last block sees, and that block."""
        x, shapes, _ = self._pack([images], None)
        for block in self.blocks[:-1]:
            x = block(x, shapes)
        last = cast(Block, self.blocks[-1])
        return last.norm1(unpack(x, shapes)[0]), last

    def _embed(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b t d"]:
        c, height, width = images.shape[1:]
        if c != self.in_chans:
            raise ValueError(f"the images have {c} channels, this model takes {self.in_chans}")
        if min(height, width) < self.patch_size:
            raise ValueError(f"an image of {height} x {width} pixels is smaller than one patch of {self.patch_size}")
        patches = self.patch_embed(images).flatten(1, 2)
        x = torch.cat([self.cls_token.expand(images.shape[0], -1, -1), patches], dim=1)
        return x + self._positions(height, width)

    def _positions(self, height: int, width: int) -> Float[Tensor, "1 t d"]:
        """The positions for images of this size in pixels: bicubic (a = -0.75), the [CLS] token's unchanged."""
        h, w, side, offset = height // self.patch_size, width // self.patch_size, self.side, self.pos_offset
        # As released: equal *pixel* sizes, so a 224 x 225 image has its positions (slightly) resized.
        if h * w == side**2 and height == width:
            return self.pos_embed
        table = self.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        if offset:
            table = F.interpolate(table, scale_factor=((h + offset) / side, (w + offset) / side), mode="bicubic")
        else:
            table = F.interpolate(table, size=(h, w), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], table.flatten(2).mT], dim=1)


def vit_nano(patch_size: int = 16, **kwargs: Any) -> VisionTransformer:
    """0.8 M parameters: for tests and the demo on a CPU (not in the literature)."""
    return VisionTransformer(patch_size=patch_size, embed_dim=128, depth=4, num_heads=4, **kwargs)


def vit_tiny(patch_size: int = 16, **kwargs: Any) -> VisionTransformer:
    """ViT-Ti: 5.5 M parameters (DeiT)."""
    return VisionTransformer(patch_size=patch_size, embed_dim=192, depth=12, num_heads=3, **kwargs)


def vit_small(patch_size: int = 16, **kwargs: Any) -> VisionTransformer:
    """ViT-S: 21.7 M parameters (table 1)."""
    return VisionTransformer(patch_size=patch_size, embed_dim=384, depth=12, num_heads=6, **kwargs)


def vit_base(patch_size: int = 16, **kwargs: Any) -> VisionTransformer:
    """ViT-B: 85.8 M parameters (table 1)."""
    return VisionTransformer(patch_size=patch_size, embed_dim=768, depth=12, num_heads=12, **kwargs)


def vit_large(patch_size: int = 16, **kwargs: Any) -> VisionTransformer:
    """ViT-L: 303 M parameters (arXiv 2010.11929; not in the paper)."""
    return VisionTransformer(patch_size=patch_size, embed_dim=1024, depth=24, num_heads=16, **kwargs)
