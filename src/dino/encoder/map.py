"""A map of a set of images: two coordinates for each, so that what looks alike lies together."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dino.encoder.components import principal_components
from dino.encoder.neighbors import nearest_neighbors
from dino.machine.randomness import generator

_DIRECTIONS = 50  # Principal components that t-SNE sees, as its authors recommend.
_FITTED = 20_000  # Images that t-SNE places itself; its time grows faster than their number.
_BETWEEN = 3  # Every other image is placed between its so many nearest placed ones.


def map_2d(features: Float[Tensor, "n d"], seed: int = 0, fitted: int = _FITTED) -> Float[Tensor, "n 2"]:
    """Places every row on a plane: 50 principal components, then t-SNE (van der Maaten and Hinton 2008).

    Distances are cosine distances. Each coordinate has mean 0, the larger spread is 1. Of more than ``fitted`` rows a
    sample is placed so, and every other row between the three of them that are nearest to it, weighted by similarity.
    Fewer than five rows lie on their first two principal components. t-SNE rather than UMAP, because scikit-learn is
    here already; ``benchmarks/map.py`` compares the two.

    >>> features = F.normalize(torch.cat([torch.eye(4)[:1].repeat(20, 1), torch.eye(4)[1:2].repeat(20, 1)]), dim=1)
    >>> placed = map_2d(features)
    >>> bool((placed[:20].mean(0) - placed[20:].mean(0)).norm() > 1)
    True
    """
    features = F.normalize(features.float(), dim=1)
    if len(features) <= fitted:
        return _scaled(_placed(features, seed))
    sample = torch.randperm(len(features), generator=generator(seed, "map"))[:fitted].sort().values
    placed = _placed(features[sample], seed)
    similarities, near = nearest_neighbors(features, features[sample], _BETWEEN)
    weights = (1 / (1 - similarities + 1e-3))[..., None]  # A row of the sample is its own nearest.
    everywhere = (placed[near] * weights).sum(1) / weights.sum(1)
    everywhere[sample] = placed
    return _scaled(everywhere)


def _placed(features: Tensor, seed: int) -> Tensor:
    from sklearn.manifold import TSNE

    # Cosine distance is Euclidean distance on the sphere (squared, halved): components keep it.
    components = principal_components(features, max(2, min(_DIRECTIONS, features.shape[1]))).float()
    start = components[:, :2]
    if len(features) < 5:
        return start
    start = start / start[:, 0].std().clamp_min(1e-12) * 1e-4  # As scikit-learn scales its own start.
    # Perplexity: about how many neighbours an image minds; at most a third of a small set.
    perplexity = min(30.0, (len(components) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init=start.numpy(), random_state=seed)  # pyright: ignore[reportArgumentType]
    return torch.from_numpy(tsne.fit_transform(components.numpy()))


def _scaled(places: Tensor) -> Tensor:
    places = places - places.mean(0)
    return places / places.std(0, correction=0).max().clamp_min(1e-12)
