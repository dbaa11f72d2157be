"""Ranked lists: the reference's numbers, precision worked by hand, a naive count, and what whitening must do."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from dino.evaluation.ranking import average_precision, learn_whitening, precision_at, ranked_tiles, whiten

RETRIEVAL, COPYDAYS = reference.scalars("10_retrieval"), reference.scalars("11_copydays")


def as_hits(ranks, n):
    hits = torch.zeros(1, n, dtype=torch.bool)
    hits[0, ranks] = True
    return hits


@pytest.mark.parametrize("case", RETRIEVAL["ap_cases"] + COPYDAYS["ap_cases"], ids=lambda case: str(case["ranks"]))
def test_average_precision_of_the_references_cases(case):
    got = average_precision(as_hits(case["ranks"], 12), torch.tensor([case["nres"]]))
    assert got.item() == pytest.approx(case["ap"], abs=1e-12)


@given(
    kinds=st.lists(st.lists(st.sampled_from("hij"), min_size=1, max_size=25), min_size=1, max_size=4),
    more=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_average_precision_and_precision_at_k_equal_a_naive_count(kinds, more):
    """h: a hit, i: irrelevant, j: junk. Rows are filled up with irrelevant items, which change neither."""
    n = max(map(len, kinds))
    hits, junk = (
        torch.tensor([[kind == letter for kind in row] + [False] * (n - len(row)) for row in kinds]) for letter in "hj"
    )
    positives = hits.sum(1) + more
    aps, precisions = average_precision(hits, positives, junk), precision_at(hits, (1, 3, 10), junk)
    for row, ap, precision, total in zip(kinds, aps.tolist(), precisions.tolist(), positives.tolist(), strict=True):
        kept = [kind for kind in row if kind != "j"]
        places = [place for place, kind in enumerate(kept, 1) if kind == "h"]
        if total == 0:
            assert math.isnan(ap)
        else:
            area = 0.0
            for count, place in enumerate(places, 1):
                above = (count - 1) / (place - 1) if place > 1 else 1.0
                area += (above + count / place) / 2 / total
            assert ap == pytest.approx(area, abs=1e-12)
        if not places:
            assert all(map(math.isnan, precision))
            continue
        for k, value in zip((1, 3, 10), precision, strict=True):
            cut = min(k, places[-1])
            assert value == pytest.approx(sum(place <= cut for place in places) / cut, abs=1e-12)


def test_average_precision_of_a_perfect_and_of_the_worst_ranking():
    assert average_precision(as_hits([0, 1, 2], 6)).item() == 1
    # The last of 4 places: (0 / 3 + 1 / 4) / 2.
    assert average_precision(as_hits([3], 4)).item() == 0.125


@given(seed=st.integers(0, 1000), m=st.integers(1, 9), n=st.integers(1, 12), entries=st.integers(1, 200))
@settings(max_examples=30, deadline=None)
def test_the_order_does_not_depend_on_the_tile(seed, m, n, entries):
    generator = torch.Generator().manual_seed(seed)
    queries, database = torch.randn(m, 5, generator=generator), torch.randn(n, 5, generator=generator)
    tiles = list(ranked_tiles(queries, database, entries))
    assert torch.equal(torch.cat([order for _, order in tiles]), (queries @ database.T).argsort(1, descending=True))
    assert [i for rows, _ in tiles for i in range(rows.start, rows.stop)] == list(range(m))
    assert all(order.numel() <= max(entries, n) for _, order in tiles)


def test_equal_items_keep_their_order():
    ((_, order),) = ranked_tiles(torch.ones(1, 2), torch.ones(40, 2))
    assert order.tolist() == [list(range(40))]


@pytest.mark.parametrize("scenario", COPYDAYS["scenarios"], ids=lambda scenario: scenario["id"])
def test_whitening_equals_the_reference(scenario):
    arrays = {
        key.removeprefix(scenario["id"] + "/"): array
        for key, array in reference.arrays("11_copydays").items()
        if key.startswith(scenario["id"])
    }
    whitening = learn_whitening(arrays["whitening_features"])
    assert (whitening.mean - arrays["mean"]).abs().max() <= 1e-6
    gram, expected = whitening.operator.T @ whitening.operator, arrays["operator_gram"]
    assert (gram - expected).abs().max() <= 2e-5 * expected.abs().max()
    # The operator undoes the stored covariance in the directions that are not floored.
    whitened = whitening.operator.double() @ arrays["cov"].double() @ whitening.operator.double().T
    kept = scenario["dim"] - scenario["n_eigenvalues_floored"]
    assert torch.allclose(whitened[:kept, :kept], torch.eye(kept, dtype=torch.float64), atol=1e-4)
    # Column by column up to its sign; floored directions only up to a rotation, so there the length is compared.
    for ours, theirs in (("database", ["original", "distractors"]), ("queries", ["original", "strong", "jpegqual_3"])):
        raw = torch.cat([arrays[name] for name in theirs])
        got = (raw - whitening.mean) @ whitening.operator.T
        want = arrays[f"whitened_{ours}_sign_ambiguous"]
        scale = want.abs().max()
        sign = (got * want).sum(0).sign()
        assert (got * sign - want)[:, :kept].abs().max() <= 1e-5 * scale
        assert (got[:, kept:].norm(dim=1) - want[:, kept:].norm(dim=1)).abs().max() <= 1e-5 * scale


def test_whitened_features_are_unit_length_and_decorrelated():
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(500, 4, generator=generator) @ torch.diag(torch.tensor([10.0, 3.0, 1.0, 0.1]))
    whitening = learn_whitening(raw)
    assert torch.allclose(whiten(raw, whitening).norm(dim=1), torch.ones(500), atol=1e-6)
    mapped = raw @ whitening.operator.T
    assert torch.allclose(mapped.T @ mapped / 500, torch.eye(4), atol=1e-4)


def test_nothing_to_learn_from_is_named():
    with pytest.raises(ValueError, match="3 features that are all zero"):
        learn_whitening(torch.zeros(3, 4))
