"""The parts of a vision transformer: patches, attention, MLP, residual block, stochastic depth.

Parameter names are those of the released weights, so official files load as they are.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dino.models.products import Linear, linear

# Packed tokens: for each group of images its number of images and of tokens an image.
Shapes = Sequence[tuple[int, int]]


def pack(groups: Sequence[Tensor]) -> Tensor:
    """All rows one below the other."""
    return groups[0] if len(groups) == 1 else torch.cat(list(groups))


def unpack(x: Float[Tensor, "n d"], shapes: Shapes) -> list[Float[Tensor, "_ _ d"]]:
    """The groups of packed tokens, (b, t, d) each."""
    return [group.unflatten(0, shape) for group, shape in zip(x.split([b * t for b, t in shapes]), shapes, strict=True)]


def first_tokens(x: Float[Tensor, "n d"], shapes: Shapes) -> Float[Tensor, "m d"]:
    """The first token of every image."""
    return pack([group[:, 0] for group in unpack(x, shapes)])


def sample_keep(b: int, drop_prob: float | int, generator: torch.Generator | None = None) -> Float[Tensor, "b"]:
    """Draws the multipliers of one residual branch: 0 with probability ``drop_prob``, else ``1 / (1 - drop_prob)``.

    So the branch keeps its expected value. On the CPU, in float32. Source: stochastic depth (arXiv 1603.09382).
    """
    keep = 1 - drop_prob
    return (keep + torch.rand(b, generator=generator)).floor() / keep


def residual(
    x: Float[Tensor, "n d"], branch: Float[Tensor, "n d"], multipliers: Float[Tensor, "n"] | None
) -> Float[Tensor, "n d"]:
    """``x + branch``, every row of the branch scaled by its multiplier; ``None`` leaves the branch alone."""
    return x + branch if multipliers is None else torch.addcmul(x, branch, multipliers.to(branch.dtype)[:, None])


def attend(
    q: Float[Tensor, "b heads q e"], k: Float[Tensor, "b heads t e"], v: Float[Tensor, "b heads t e"]
) -> Float[Tensor, "b heads q e"]:
    """Scaled dot-product attention. On a CPU in float32, also under autocast: torch's bfloat16 kernel takes so long
    backwards that it eats up all that the products gain (docs/learning.md)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    return F.scaled_dot_product_attention(q, k, v)


class PatchEmbed(nn.Module):
    """Cuts images into non-overlapping patches and projects each one linearly."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b h w d"]:
        return self.proj(images).permute(0, 2, 3, 1)


class Attention(nn.Module):
    """Multi-head self-attention among the tokens of each image.

    Takes *packed* tokens: the rows of all images one below the other, in groups of equal length. ``shapes`` says for
    each group how many images of how many tokens it has. So crops of several resolutions share one matrix product.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Float[Tensor, "n d"], shapes: Shapes) -> Float[Tensor, "n d"]:
        mixed = []
        for group, (b, t) in zip(unpack(self.qkv(x), shapes), shapes, strict=True):
            q, k, v = self._heads(group, 3)
            mixed.append(attend(q, k, v).transpose(1, 2).reshape(b * t, -1))
        return self.proj(pack(mixed))

    def of_first(self, x: Float[Tensor, "n d"], shapes: Shapes) -> Float[Tensor, "m d"]:
        """``forward`` for the first token of each of the m images alone, at a sixth of the cost."""
        d = x.shape[1]
        if isinstance(self.qkv, Linear):
            weight, bias = self.qkv.weight, self.qkv.bias
            first, rest = linear(first_tokens(x, shapes), weight[:d], bias[:d]), linear(x, weight[d:], bias[d:])
        else:  # Something is put around it (an adapter): all that it does counts.
            product = self.qkv(x)
            first, rest = first_tokens(product[:, :d], shapes), product[:, d:]
        queries, others = unpack(first, [(b, 1) for b, _ in shapes]), unpack(rest, shapes)
        mixed = []
        for query, group in zip(queries, others, strict=True):
            (q,), (k, v) = self._heads(query, 1), self._heads(group, 2)
            mixed.append(attend(q, k, v).flatten(1))
        return self.proj(pack(mixed))

    def attention(self, x: Float[Tensor, "b t d"], queries: slice = slice(None)) -> Float[Tensor, "b heads q t"]:
        """The attention itself: row i says how much each token gives to token i; rows sum to one.

        ``queries``: the rows wanted. All of a large image fill gigabytes.
        """
        q, k, _ = self._heads(self.qkv(x), 3)
        return (q[:, :, queries] @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1)

    def _heads(self, x: Float[Tensor, "b t width"], parts: int) -> tuple[Float[Tensor, "b heads t e"], ...]:
        """Queries, keys, values (or some of them), which stand side by side, head by head."""
        return x.unflatten(-1, (parts, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block: attention, then the MLP, each a residual branch.

    Only ``attn`` mixes tokens; everything else acts on each one alone.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float | int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self,
        x: Float[Tensor, "n d"],
        shapes: Shapes,
        keep: Float[Tensor, "2 n"] | None = None,
    ) -> Float[Tensor, "n d"]:
        """Takes packed tokens (see ``Attention``). ``keep``: multipliers of the two branches for every row."""
        keep_attn, keep_mlp = (None, None) if keep is None else keep.unbind(0)
        x = residual(x, self.attn(self.norm1(x), shapes), keep_attn)
        return residual(x, self.mlp(self.norm2(x)), keep_mlp)

    def of_first(
        self, x: Float[Tensor, "n d"], shapes: Shapes, keep: Float[Tensor, "2 n"] | None = None
    ) -> Float[Tensor, "m d"]:
        """``forward`` for the first token of each of the m images alone, where nobody needs the others."""
        keep_attn, keep_mlp = (None, None) if keep is None else first_tokens(keep.mT, shapes).unbind(1)
        attended = self.attn.of_first(self.norm1(x), shapes)
        x = residual(first_tokens(x, shapes), attended, keep_attn)
        return residual(x, self.mlp(self.norm2(x)), keep_mlp)


def init_linear(module: nn.Module) -> None:
    """Linear layers start with weights from a normal distribution (0.02, cut at +-2) and zero biases, as released.

    For ``nn.Module.apply``; leaves other layers at torch's defaults.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
