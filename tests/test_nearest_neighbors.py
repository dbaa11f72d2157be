"""Nearest neighbours: a full sort says the same, whatever the tiles and blocks, with ties and without oneself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dino.encoder import neighbors
from dino.encoder.neighbors import nearest_neighbors


def rows(n, seed, dtype=torch.float32):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(
    seed=st.integers(0, 10_000),
    m=st.integers(0, 12),
    n=st.integers(1, 300),
    k=st.integers(1, 40),
    tile=st.sampled_from([1, 7, 100, 2**20, 2**22, 2**25]),  # From 2**22 on every query is a block of its own.
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=60, deadline=None)
def test_equals_a_full_sort(seed, m, n, k, tile, dtype):
    bank, queries, k = rows(n, seed, dtype), rows(m, seed + 1, dtype), min(k, n)
    similarities, indices = nearest_neighbors(queries, bank, k, tile=tile)
    expected, order = (queries @ bank.T).sort(dim=1, descending=True)
    torch.testing.assert_close(similarities, expected[:, :k], atol=1e-5, rtol=0)
    clear = (expected[:, :-1] - expected[:, 1:]).abs().min() > 1e-5 if n > 1 and m else False
    assert not clear or torch.equal(indices, order[:, :k])


@given(
    seed=st.integers(0, 10_000), start=st.integers(0, 60), k=st.integers(1, 30), tile=st.sampled_from([3, 64, 2**22])
)
@settings(max_examples=40, deadline=None)
def test_nobody_is_its_own_neighbor(seed, start, k, tile):
    bank = rows(80, seed)
    queries = bank[start : start + 20]
    similarities, indices = nearest_neighbors(queries, bank, k, skip_from=start, tile=tile)
    products = queries @ bank.T
    products[torch.arange(20), torch.arange(start, start + 20)] = -torch.inf
    torch.testing.assert_close(similarities, products.topk(k).values, atol=1e-5, rtol=0)
    assert not (indices == torch.arange(start, start + 20)[:, None]).any()


@given(seed=st.integers(0, 10_000), k=st.integers(1, 50), tile=st.sampled_from([16, 100, 500]))
@settings(max_examples=30, deadline=None)
def test_ties_give_different_rows_of_the_right_similarity(seed, k, tile):
    bank, queries = rows(200, seed).sign(), rows(5, seed + 1).sign()  # Six signs: only 7 different dot products.
    similarities, indices = nearest_neighbors(queries, bank, k, tile=tile)
    assert torch.equal(similarities, (queries @ bank.T).topk(k).values)
    assert torch.equal((queries @ bank.T).gather(1, indices), similarities)
    assert all(len(set(row)) == k for row in indices.tolist())


def test_long_rows_are_not_sorted_as_a_whole():
    values = torch.arange(10_000.0).flip(0).repeat(3, 1)
    columns = neighbors._holding_the_best(values, 25)
    assert columns.shape[1] < 600
    assert values.gather(1, columns).topk(25).values.tolist() == [list(range(9999, 9974, -1))] * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_finds_the_same():
    bank, queries = rows(5000, 0).cuda(), rows(100, 1).cuda()
    for tile in (512, 16384):
        similarities, indices = nearest_neighbors(queries, bank, 20, skip_from=None, tile=tile)
        torch.testing.assert_close(similarities, (queries @ bank.T).topk(20).values, atol=1e-4, rtol=0)
        assert indices.device == queries.device
