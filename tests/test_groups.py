"""Copies, clusters, outliers, the map and the bytes of patches: pure functions of features."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dino.encoder.components import encode_tokens
from dino.encoder.groups import duplicates, hdbscan, k_means, loneliness, typical_members, usual_distance
from dino.encoder.map import map_2d
from dino.encoder.neighbors import nearest_neighbors, neighbors_of_all


def rows(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def two_heaps(each: int = 30, d: int = 16) -> torch.Tensor:
    return F.normalize(torch.eye(d)[[0] * each + [1] * each] + 0.05 * rows(2 * each, d), dim=1)


def test_copies_by_hand():
    angles = torch.tensor([0.0, 90.0, 2.0, 4.0, 180.0, 91.0]) * math.pi / 180
    features = torch.stack([angles.cos(), angles.sin()], 1)
    # 0 and 3 are 4 degrees apart, and joined by 2, which lies between them.
    assert duplicates(features, math.cos(3 * math.pi / 180)) == [[0, 2, 3], [1, 5]]
    assert duplicates(features, math.cos(1.5 * math.pi / 180)) == [[1, 5]]
    assert duplicates(features, 1 - 1e-6) == []
    with pytest.raises(ValueError, match="more than 3 pairs"):
        duplicates(features, -1.0, most_pairs=3)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.floats(0.0, 0.99), st.integers(0, 99))
def test_copies_are_the_connected_components(n, tile, threshold, seed):
    features = rows(n, 4, seed)
    linked = (features @ features.mT >= threshold).float() + torch.eye(n)
    reach = torch.linalg.matrix_power(linked.double().clamp_max(1), n) > 0
    expected = {tuple(r.nonzero().flatten().tolist()) for r in reach if r.sum() > 1}
    got = duplicates(features, threshold, tile)
    assert {tuple(group) for group in got} == expected
    assert [len(group) for group in got] == sorted(map(len, got), reverse=True)


def test_usual_distance_is_the_median_of_the_kth_neighbour():
    features = rows(25, 5)
    distances = (1 - features @ features.mT).sort(1).values[:, 7]  # Itself is the first.
    got = usual_distance(neighbors_of_all(features, 7)[0])
    assert got == pytest.approx(distances.median().item(), abs=1e-5)
    assert usual_distance(neighbors_of_all(features[:1], 7)[0]) == 0


@pytest.mark.parametrize("n,k", [(1, 3), (2, 3), (40, 5)])
def test_neighbours_of_all_are_the_nearest_others(n, k):
    features = rows(n, 6)
    similarities, indices = neighbors_of_all(features, k)
    expected = (features @ features.mT).fill_diagonal_(-9).sort(1, descending=True)
    m = min(k, n - 1)
    assert indices.tolist() == expected.indices[:, :m].tolist()
    torch.testing.assert_close(similarities, expected.values[:, :m], atol=1e-5, rtol=0)


def test_faiss_finds_nearly_all_of_them():
    pytest.importorskip("faiss", reason="faiss is not installed")
    features = torch.cat([rows(3000, 16), rows(20, 16)[[0] * 20]])  # Twenty equal rows: any may come first.
    exact, _ = nearest_neighbors(features, features, 10, skip_from=0)
    similarities, indices = neighbors_of_all(features, 10, exact_up_to=100)
    assert indices.shape == (3020, 10)
    assert not (indices == torch.arange(3020)[:, None]).any()
    found = (similarities >= exact[:, -1:] - 1e-6).float().mean()
    assert found > 0.9


def test_clusters_of_two_heaps():
    features = torch.cat([two_heaps(), two_heaps()[:10]])  # 40 of the first heap, 30 of the second.
    clusters = k_means(features, [2, 3, 5])
    assert max(clusters.silhouettes, key=clusters.silhouettes.__getitem__) == 2
    assert clusters.cluster.tolist() == [0] * 30 + [1] * 30 + [0] * 10
    mean = F.normalize(features[30:60].mean(0), dim=0)
    torch.testing.assert_close(clusters.typical[30:60], features[30:60] @ mean)
    first, second = typical_members(clusters, 3)
    assert second == (30 + (features[30:60] @ mean).argsort(descending=True)[:3]).tolist()
    assert len(first) == 3
    with pytest.raises(ValueError, match="too few"):
        k_means(features[:3], [2])
    assert k_means(features[:2], [1]).cluster.tolist() == [0, 0]


def test_hdbscan_leaves_strangers_out():
    features = torch.cat([two_heaps(), torch.eye(16)[5:9]])
    clusters = hdbscan(features, 8)
    assert clusters.cluster[:60].unique().tolist() == [0, 1]
    assert clusters.cluster[60:].tolist() == [-1] * 4
    assert hdbscan(features[:3], 8).cluster.tolist() == [-1] * 3


def test_the_stranger_is_the_loneliest():
    features = torch.cat([two_heaps(), torch.eye(16)[7:8]])
    scores = loneliness(features, 5)
    assert scores.argmax() == 60
    expected = (1 - features @ features.mT).fill_diagonal_(9).sort(1).values[:, :5].mean(1)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    assert loneliness(features[:1]).tolist() == [0.0]


def test_a_map_keeps_heaps_apart():
    features = torch.cat([two_heaps(), rows(30, 16) * 0.05 + torch.eye(16)[3]])
    places = map_2d(features)
    torch.testing.assert_close(places.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    assert places.std(0, correction=0).max().item() == pytest.approx(1, abs=1e-5)
    nearest = torch.cdist(places, places).fill_diagonal_(9).argmin(1)
    assert (nearest // 30 == torch.arange(90) // 30).float().mean() > 0.97
    torch.testing.assert_close(map_2d(features), places)  # The seed decides.


def test_a_map_of_many_places_the_rest_between_the_sample():
    features = two_heaps(100)
    places = map_2d(features, fitted=40)
    assert places.isfinite().all()
    nearest = torch.cdist(places, places).fill_diagonal_(9).argmin(1)
    assert (nearest // 100 == torch.arange(200) // 100).float().mean() > 0.97


@pytest.mark.parametrize("n", range(1, 8))
def test_small_maps(n):
    for features in (rows(n, 3), rows(1, 3).repeat(n, 1), rows(n, 1)):
        assert map_2d(features).shape == (n, 2)
        assert map_2d(features).isfinite().all()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60), st.integers(1, 100), st.integers(0, 9))
def test_codes_keep_cosines(n, d, seed):
    tokens = 7 * rows(n, d, seed)
    codes = encode_tokens(tokens, 64)
    assert codes.codes.shape == (n, 64)
    unit = F.normalize(tokens, dim=1)
    if d <= 64:  # Then only rounding is lost: at most half a step in each column of both.
        bound = 2 * (codes.scales / 2).sum() + 1e-5
        assert (codes.similarities(n - 1) - unit @ unit[n - 1]).abs().max() <= min(bound, torch.tensor(0.1))


def test_codes_lose_what_the_directions_do_not_hold():
    """Of 80 even directions 64 stay: a token's product with itself is 1 for those, and 0 for the others."""
    codes = encode_tokens(torch.eye(80), 64)
    own = torch.stack([codes.similarities(i)[i] for i in range(80)])
    assert (own > 0.99).sum() == 64
    assert (own < 0.01).sum() == 16
