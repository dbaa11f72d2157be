"""What the features of a set say about it: copies, clusters, and images that are like no other."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dino.encoder.components import principal_components
from dino.encoder.neighbors import neighbors_of_all

COPY = 0.05  # Share of the usual distance: chosen on the set of benchmarks/duplicates.py.
USUAL_K = 10
_MOST_PAIRS = 20_000_000
_SAMPLE = 2_000


def usual_distance(similarities: Float[Tensor, "n k"]) -> float:
    """The median distance (1 - cosine) of an image to its k-th nearest other, from what ``neighbors_of_all`` gives.

    It is what "near" means among these images with these weights: cosines of other weights lie elsewhere.

    >>> usual_distance(torch.tensor([[1.0, 0.9], [0.8, 0.5], [0.9, 0.75]]))
    0.25
    """
    return (1 - similarities[:, -1]).median().item() if similarities.numel() else 0.0


def duplicates(
    features: Float[Tensor, "n d"], threshold: float, tile: int = 4096, most_pairs: int = _MOST_PAIRS
) -> list[list[int]]:
    """Groups of two rows and more whose cosine reaches the threshold, directly or through others of the group.

    Exact, in memory for ``tile`` squared similarities. The largest group first, then in the order of the rows, as
    inside of groups.

    Raises:
        ValueError: there are more than ``most_pairs`` such pairs: the threshold does not tell copies from the rest.

    >>> duplicates(F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.01]]), dim=1), threshold=0.99)
    [[0, 2]]
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    n = len(features)
    features = F.normalize(features, dim=1)
    edges: list[Tensor] = []
    for i in range(0, n, tile):
        for j in range(i, n, tile):
            similar = features[i : i + tile] @ features[j : j + tile].mT >= threshold
            pairs = (similar.triu(1) if i == j else similar).nonzero() + torch.tensor([i, j])
            edges.append(pairs)
            if sum(map(len, edges)) > most_pairs:
                raise ValueError(
                    f"more than {most_pairs:,} pairs of images reach a cosine of {threshold:.4f}: give a higher one"
                )
    rows, columns = torch.cat([*edges, torch.empty(0, 2, dtype=torch.long)]).T.numpy()
    graph = coo_matrix((np.ones(len(rows), dtype=bool), (rows, columns)), shape=(n, n))
    group_of = connected_components(graph, directed=False)[1]
    members: dict[int, list[int]] = {}
    for row in np.unique(np.concatenate([rows, columns])).tolist():
        members.setdefault(group_of[row], []).append(row)
    return sorted(members.values(), key=lambda group: (-len(group), group[0]))


class Clusters(NamedTuple):
    """Each row's cluster, and how typical of it the row is: the cosine with the cluster's mean."""

    cluster: Int[Tensor, " n"]  # From 0, the largest first; -1: in none.
    typical: Float[Tensor, " n"]
    silhouettes: dict[int, float]  # Of every number of clusters that was tried.


def k_means(features: Float[Tensor, "n d"], counts: Sequence[int], seed: int = 0) -> Clusters:
    """k-means on the 50 first principal components; of several numbers of clusters that of the best silhouette.

    The silhouette (Rousseeuw 1987), from -1 to 1, says how much nearer rows are to their own cluster than to the next.
    Numbers that leave fewer than two rows a cluster are not tried.

    Raises:
        ValueError: no number is left.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    rows = principal_components(F.normalize(features, dim=1), min(50, features.shape[1])).float().numpy()
    counts = [count for count in counts if 1 <= count <= len(rows) // 2]
    if not counts:
        raise ValueError(f"{len(rows)} images are too few for so many clusters: two images each at least")
    found: dict[int, tuple[float, np.ndarray]] = {}
    for count in counts:
        starts: Any = 4 if count < 100 else 1  # scikit-learn's own annotation knows "auto" alone.
        cluster = KMeans(count, n_init=starts, random_state=seed).fit_predict(rows)
        score = 0.0
        if count > 1:
            sample = min(_SAMPLE, len(rows))
            score = float(silhouette_score(rows, cluster, sample_size=sample, random_state=seed))
        found[count] = score, cluster
    best = max(found, key=lambda count: found[count][0])
    silhouettes = {count: round(score, 4) for count, (score, _) in found.items()}
    return _ordered(features, torch.from_numpy(found[best][1]).long(), silhouettes)


def hdbscan(features: Float[Tensor, "n d"], min_size: int) -> Clusters:
    """HDBSCAN (Campello et al. 2013) on the 50 first principal components: any number of dense clusters of at least
    ``min_size`` rows, and rows that are in none."""
    from sklearn.cluster import HDBSCAN

    rows = principal_components(F.normalize(features, dim=1), min(50, features.shape[1])).float().numpy()
    if len(rows) < min_size:
        return _ordered(features, torch.full((len(rows),), -1), {})
    cluster = HDBSCAN(min_cluster_size=min_size, copy=True).fit_predict(rows)  # pyright: ignore[reportArgumentType]
    return _ordered(features, torch.from_numpy(cluster), {})


def _ordered(features: Tensor, cluster: Tensor, silhouettes: dict[int, float]) -> Clusters:
    features = F.normalize(features, dim=1)
    ordered, typical = torch.full_like(cluster, -1), torch.zeros(len(cluster))
    numbers, sizes = cluster[cluster >= 0].unique(return_counts=True)
    for new, old in enumerate(numbers[sizes.argsort(descending=True, stable=True)].tolist()):
        members = cluster == old
        ordered[members] = new
        typical[members] = features[members] @ F.normalize(features[members].mean(0), dim=0)
    return Clusters(ordered, typical, silhouettes)


def typical_members(clusters: Clusters, count: int) -> Iterator[list[int]]:
    """The ``count`` most typical rows of every cluster, the largest cluster first."""
    for number in range(int(clusters.cluster.max()) + 1):
        members = (clusters.cluster == number).nonzero().flatten()
        yield members[clusters.typical[members].argsort(descending=True)[:count]].tolist()


def loneliness(features: Float[Tensor, "n d"], k: int = 10) -> Float[Tensor, " n"]:
    """Mean distance (1 - cosine) of every row to its ``k`` nearest others (Angiulli and Pizzuti 2002): the larger, the
    more the row is an outlier.

    >>> loneliness(torch.eye(3)[[0, 0, 1]], k=1).tolist()
    [0.0, 0.0, 1.0]
    """
    similarities, _ = neighbors_of_all(F.normalize(features, dim=1), k)
    return (1 - similarities).clamp_min(0).mean(1) if similarities.shape[1] else torch.zeros(len(features))
