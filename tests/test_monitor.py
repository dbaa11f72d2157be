"""Each monitor by hand, and what is called a collapse. Collapses of real runs: test_pretrain.py."""

import math

import pytest
import torch

from dino.method.loss import DINOLoss
from dino.run.monitor import GRACE_STEPS, PATIENCE, CollapseWatch, measure

K = 8


def reading(teacher_logits, *, features=None, loss=1.0, center=None, temp=0.04):
    """The monitors as plain numbers."""
    b, t, k = teacher_logits.shape
    features = torch.eye(b * t).unflatten(0, (b, t)) if features is None else features
    center = torch.zeros(1, k) if center is None else center
    measured = measure(torch.tensor(loss), [features], [teacher_logits], center, temp)
    return {name: value.item() for name, value in measured.items()}


def test_a_uniform_teacher():
    values = reading(torch.full((3, 2, K), 0.7), loss=math.log(K) + 0.25)
    assert values["teacher_entropy"] == pytest.approx(math.log(K), abs=1e-6)
    assert values["teacher_entropy_ratio"] == pytest.approx(1.0, abs=1e-6)
    assert values["kl"] == pytest.approx(0.25, abs=1e-6)


def test_a_teacher_that_is_sure():
    """Four crops, three prototypes."""
    logits = torch.nn.functional.one_hot(torch.tensor([[1, 5], [1, 2]]), K) * 9.0
    values = reading(logits, loss=0.5)
    assert values["teacher_entropy_ratio"] == pytest.approx(0.0, abs=1e-6)
    assert values["kl"] == pytest.approx(0.5, abs=1e-6)
    assert values["prototypes_used"] == 3
    assert values["center_norm"] == 0


def test_the_center_decides_with():
    """A center equal to the logits makes the teacher uniform, and has their length."""
    logits = torch.tensor([3.0, 4.0] + [0.0] * (K - 2))
    values = reading(logits.expand(2, 2, K), center=logits[None])
    assert values["teacher_entropy_ratio"] == pytest.approx(1.0, abs=1e-6)
    assert values["center_norm"] == pytest.approx(5.0)


def test_features_that_collapse_and_that_do_not():
    logits = torch.zeros(8, 2, K)
    even = reading(logits, features=torch.eye(16).unflatten(0, (8, 2)))
    assert even["rankme"] == pytest.approx(16.0, rel=1e-4)
    assert even["feature_std"] == pytest.approx(math.sqrt(15 / 16), rel=1e-4)
    # Two opposite directions of any length: spread 1, rank 1.
    line = torch.tensor([1.0, 2.0, 0.0])
    opposite = reading(logits, features=torch.stack([line, -5 * line]).expand(8, 2, 3))
    assert opposite["feature_std"] == pytest.approx(1.0, rel=1e-4)
    assert opposite["rankme"] == pytest.approx(1.0, rel=1e-3)
    same = reading(logits, features=line.expand(8, 2, 3) * torch.arange(1.0, 9.0)[:, None, None])
    assert same["feature_std"] == pytest.approx(0.0, abs=1e-3)
    assert same["rankme"] == pytest.approx(1.0, rel=1e-3)


def test_the_kl_divergence_is_that_of_the_definition():
    """Mean over images and pairs of different crops of sum p ln(p / q), with a center that has moved."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, n, K, generator=generator, dtype=torch.float64) for n in (4, 2))
    loss_of = DINOLoss(K).double()
    loss_of.center.copy_(torch.randn(1, K, generator=generator))
    center = loss_of.center.clone()
    loss = loss_of(student, teacher, 0.3)
    values = measure(loss, [torch.randn(5, 2, 3)], [teacher], center, 0.3)
    p = ((teacher - center) / 0.3).softmax(-1)
    q = (student / 0.1).softmax(-1)
    pairs = [(p[:, t] * (p[:, t] / q[:, s]).log()).sum(-1).mean() for t in range(2) for s in range(4) if s != t]
    torch.testing.assert_close(values["kl"], torch.stack(pairs).mean(), atol=1e-9, rtol=0)


def test_a_batch_in_parts_is_measured_as_one():
    """The rank of a part is at most its number of crops: RankMe was 1.52 of a batch, 1.17 of its eighth."""
    generator = torch.Generator().manual_seed(0)
    logits, features = torch.randn(8, 2, K, generator=generator), torch.randn(8, 2, 5, generator=generator)
    whole, center = reading(logits, features=features), torch.zeros(1, K)
    parts = measure(torch.tensor(1.0), list(features.split(2)), list(logits.split(2)), center, 0.04)
    assert {name: value.item() for name, value in parts.items()} == pytest.approx(whole, rel=1e-5)


def test_numbers_that_are_not_finite_break_nothing():
    values = reading(torch.full((2, 2, K), math.nan), features=torch.full((2, 2, 3), math.inf), loss=math.nan)
    assert math.isnan(values["teacher_entropy"])
    assert CollapseWatch(K)(GRACE_STEPS, values) is None


HEALTHY = {"teacher_entropy_ratio": 0.4, "loss": 6.0, "kl": 2.0, "feature_std": 0.8, "prototypes_used": 300.0}
LOG_K = math.log(1024)
COLLAPSES = {
    "uniform": {"teacher_entropy_ratio": 0.9999, "loss": LOG_K, "kl": 0.001},
    "single": {"teacher_entropy_ratio": 0.0001, "loss": 0.001, "kl": 0.001, "prototypes_used": 1.0},
    "features": {"feature_std": 0.001},
}
WORDS = {"uniform": "uniform distribution", "single": "single prototype", "features": "same class token"}
FLAGS = {"uniform": "--method.teacher-temp", "single": "--method.center-momentum", "features": "--optim.base-lr"}


def watch_many(readings, start=GRACE_STEPS):
    watch = CollapseWatch(1024)
    return [watch(start + i, HEALTHY | values) for i, values in enumerate(readings)]


@pytest.mark.parametrize("kind", COLLAPSES)
def test_a_collapse_is_named_once_with_a_way_out(kind):
    said = watch_many([{}] * 3 + [COLLAPSES[kind]] * (3 * PATIENCE))
    assert [i for i, text in enumerate(said) if text] == [3 + PATIENCE - 1]
    text = said[3 + PATIENCE - 1] or ""
    assert text.startswith(f"step {GRACE_STEPS + 3 + PATIENCE - 1}: ")
    assert WORDS[kind] in text
    assert FLAGS[kind] in text


def test_one_that_comes_and_goes_is_named_once():
    assert sum(text is not None for text in watch_many(([COLLAPSES["single"]] * PATIENCE + [{}]) * 4)) == 1


def test_two_at_once_are_both_named():
    both = COLLAPSES["uniform"] | COLLAPSES["features"]
    said = [text for text in watch_many([both] * (PATIENCE + 3)) if text]
    assert len(said) == 2
    assert WORDS["uniform"] in said[0]
    assert WORDS["features"] in said[1]


@pytest.mark.parametrize("kind", COLLAPSES)
def test_the_beginning_of_a_run_says_nothing_yet(kind):
    """Every run begins close to ln K: neither are readings before the grace period counted."""
    said = watch_many([COLLAPSES[kind]] * (10 + PATIENCE - 1), start=GRACE_STEPS - 10)
    assert not any(said)


@pytest.mark.parametrize(
    "values",
    [
        {},
        COLLAPSES["uniform"] | {"loss": LOG_K * 1.05},  # The student still differs.
        COLLAPSES["single"] | {"prototypes_used": 300.0},  # Sure of many prototypes: learnt, not collapsed.
        COLLAPSES["single"] | {"kl": 1.0},
        {"teacher_entropy_ratio": math.nan, "loss": math.nan, "kl": math.nan},
    ],
)
def test_a_healthy_run_hears_nothing(values):
    assert not any(watch_many([values] * (3 * PATIENCE)))


def test_a_sign_must_last():
    assert not any(watch_many(([COLLAPSES["features"]] * (PATIENCE - 1) + [{}]) * 4))
