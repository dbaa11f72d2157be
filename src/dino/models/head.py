"""The projection head (section 3.1, "Network architecture"; appendix C)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dino.models.layers import init_linear
from dino.models.products import Linear, Product


class Prototypes(nn.Module):
    """A weight-normalised linear layer without bias: its rows are ``weight_g[k] * weight_v[k] / |weight_v[k]|``."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1))
        # Stays at the default initialisation of a linear layer: uniform within 1 / sqrt(dim).
        self.weight_v = nn.Parameter(torch.empty(out_dim, dim).uniform_(-(dim**-0.5), dim**-0.5))


class DINOHead(nn.Module):
    """The projection head: an MLP of ``nlayers``, an L2-normalised bottleneck, and weight-normalised prototypes.

    ``out_dim`` (K) counts the prototypes.
    ``norm_last_layer`` keeps the prototypes at unit length (``weight_g`` frozen at 1), which makes large models stable.

    Raises:
        ValueError: fewer than one layer.

    >>> DINOHead(in_dim=24, out_dim=50)(torch.zeros(2, 10, 24)).shape
    torch.Size([2, 10, 50])
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ):
        super().__init__()
        if nlayers < 1:
            raise ValueError(f"nlayers={nlayers} is not allowed: a head has at least 1 layer")
        self.in_dim, self.out_dim = in_dim, out_dim
        if nlayers == 1:
            self.mlp: nn.Module = Linear(in_dim, bottleneck_dim)
        else:
            layers: list[nn.Module] = []
            for dim in [in_dim] + [hidden_dim] * (nlayers - 2):
                norm = [nn.BatchNorm1d(hidden_dim)] if use_bn else []
                layers += [Linear(dim, hidden_dim), *norm, nn.GELU()]
            self.mlp = nn.Sequential(*layers, Linear(hidden_dim, bottleneck_dim))
        self.apply(init_linear)
        self.last_layer = Prototypes(bottleneck_dim, out_dim)
        self.last_layer.weight_g.requires_grad_(not norm_last_layer)

    def forward(self, features: Float[Tensor, "*b in_dim"]) -> Float[Tensor, "*b out_dim"]:
        """Gives the logits, in float32 (float64 for float64 features) whatever autocast says.

        BatchNorm takes its statistics over all leading dimensions together.
        """
        product = self.product(features)
        with torch.autocast(features.device.type, enabled=False):
            return product.logits()

    def product(self, features: Float[Tensor, "*b in_dim"]) -> Product:
        """The logits not multiplied out: unit-length bottleneck vectors (*b, bottleneck_dim), and the prototypes."""
        x = self.mlp(features.reshape(-1, self.in_dim)).view(*features.shape[:-1], -1)
        # In half precision the squares of a small vector underflow, and a unit vector is rounded to 3 digits.
        with torch.autocast(x.device.type, enabled=False):
            x = F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
            # Views: FSDP2 puts hooks on what a module gives, which would gather on parameters from step to step.
            lengths, directions = self.last_layer.weight_g.view(-1, 1), self.last_layer.weight_v.view(self.out_dim, -1)
            return Product(x, directions.to(x.dtype), lengths.to(x.dtype))
