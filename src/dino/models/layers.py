"""The parts of a vision transformer: patches, attention, MLP, residual block, stochastic depth.

Parameter names are those of the released weights, so official files load as they are.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Tokens(NamedTuple):
    """What every backbone gives: the [CLS] token and the patch tokens, whose grid is in the shape."""

    cls_token: Float[Tensor, "b d"]
    patch_tokens: Float[Tensor, "b h w d"]


def sample_keep(b: int, drop_prob: float | int, generator: torch.Generator | None = None) -> Float[Tensor, "b"]:
    """Draws the multipliers of one residual branch: 0 with probability ``drop_prob``, else ``1 / (1 - drop_prob)``.

    So the branch keeps its expected value. On the CPU, in float32. Source: stochastic depth (arXiv 1603.09382).
    """
    keep = 1 - drop_prob
    return (keep + torch.rand(b, generator=generator)).floor() / keep


def drop_path(branch: Float[Tensor, "b *rest"], multipliers: Float[Tensor, "b"] | None) -> Float[Tensor, "b *rest"]:
    """Scales each sample of a residual branch by its multiplier; ``None`` leaves the branch alone."""
    if multipliers is None:
        return branch
    return branch * multipliers.to(branch.dtype).view(-1, *[1] * (branch.ndim - 1))


class PatchEmbed(nn.Module):
    """Cuts images into non-overlapping patches and projects each one linearly."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b h w d"]:
        return self.proj(images).permute(0, 2, 3, 1)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def _queries_keys_values(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "3 b heads t e"]:
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        q, k, v = self._queries_keys_values(x).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def attention(self, x: Float[Tensor, "b t d"], queries: slice = slice(None)) -> Float[Tensor, "b heads q t"]:
        """The attention itself: row i says how much each token gives to token i; rows sum to one.

        ``queries``: the rows wanted. All of a large image fill gigabytes.
        """
        q, k, _ = self._queries_keys_values(x).unbind(0)
        return (q[:, :, queries] @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1)


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

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

    def forward(self, x: Float[Tensor, "b t d"], keep: Float[Tensor, "2 b"] | None = None) -> Float[Tensor, "b t d"]:
        """``keep``: multipliers of the two branches per sample, see ``sample_keep``."""
        keep_attn, keep_mlp = (None, None) if keep is None else keep.unbind(0)
        x = x + drop_path(self.attn(self.norm1(x)), keep_attn)
        return x + drop_path(self.mlp(self.norm2(x)), keep_mlp)


def init_linear(module: nn.Module) -> None:
    """Linear layers start with weights from a normal distribution (0.02, cut at +-2) and zero biases, as released.

    For ``nn.Module.apply``; leaves other layers at torch's defaults.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
