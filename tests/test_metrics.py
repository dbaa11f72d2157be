"""Metrics: values worked by hand and properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dino.evaluation.metrics import entropy, jaccard, rankme, top_k_hits


def test_entropy_runs_from_zero_to_ln_k():
    rows = torch.stack([torch.full((7,), 1 / 7), torch.eye(7)[3]])
    assert entropy(rows).tolist() == pytest.approx([math.log(7), 0.0], abs=1e-6)


@given(d=st.integers(1, 12), scale=st.floats(0.01, 100))
@settings(max_examples=15, deadline=None)
def test_rankme_counts_equal_directions_whatever_the_scale(d, scale):
    features = torch.cat([torch.eye(d), -torch.eye(d)]) * scale
    assert rankme(features).item() == pytest.approx(d, rel=1e-5)


def test_rankme_worked_by_hand():
    # Singular values 3 and 1: p = 3/4 and 1/4.
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert rankme(torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])).item() == pytest.approx(expected, rel=1e-6)


def test_rankme_of_collapsed_features_is_one():
    assert rankme(torch.ones(50, 8)).item() == pytest.approx(1, abs=1e-3)
    assert rankme(torch.zeros(50, 8)).item() == 1


def test_jaccard_worked_by_hand():
    predicted = torch.tensor([[[1, 1], [0, 0]], [[1, 1], [1, 1]], [[0, 0], [0, 0]]], dtype=torch.bool)
    assert jaccard(predicted, torch.tensor([[True, False], [True, False]])).tolist() == pytest.approx([1 / 3, 1 / 2, 0])
    assert jaccard(predicted[2], predicted[2]).item() == 1


@given(seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_jaccard_is_symmetric_and_at_most_one(seed):
    a, b = torch.rand(2, 5, 6, 7, generator=torch.Generator().manual_seed(seed)) < 0.4
    assert torch.equal(jaccard(a, b), jaccard(b, a))
    assert (jaccard(a, b) <= 1).all()
    assert (jaccard(a, a) == 1).all()


def test_top_k_hits_worked_by_hand():
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    labels = torch.tensor([2, 2, 2])
    assert top_k_hits(scores, labels, 1).tolist() == [False, False, True]
    assert top_k_hits(scores, labels, 2).tolist() == [True, False, True]
    assert top_k_hits(scores, labels, 5).all()
