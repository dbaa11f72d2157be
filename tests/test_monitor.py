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
    assert values["prototypes_share"] == 1.5  # Of two images.
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


HEALTHY = {"teacher_entropy_ratio": 0.4, "loss": 6.0, "kl": 2.0, "feature_std": 0.8}
HEALTHY |= {"prototypes_used": 300.0, "prototypes_share": 0.9, "rankme": 12.0}
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


# The run on imagenette that the README of version 0.1 showed (k-NN 37.0 % where pixels give 36.7): its first readings.
NAMES = ("loss", "kl", "teacher_entropy_ratio", "feature_std", "prototypes_used", "prototypes_share", "rankme")
README_RUN = [
    # step, then NAMES
    (10, 7.142, 5.187, 0.2564, 0.7804, 50, 1.562, 18.04),
    (20, 6.729, 5.127, 0.21, 0.8008, 41, 1.281, 17.59),
    (30, 5.959, 4.751, 0.1584, 0.8036, 31, 0.9688, 15.02),
    (40, 4.948, 3.972, 0.128, 0.8154, 29, 0.9062, 13.08),
    (50, 4.345, 3.74, 0.07923, 0.7964, 20, 0.625, 12.4),
    (60, 3.577, 3.004, 0.07513, 0.8674, 15, 0.4688, 10.16),
    (70, 2.963, 2.547, 0.0546, 0.8461, 12, 0.375, 10.28),
    (80, 2.394, 2.078, 0.04145, 0.7776, 8, 0.25, 8.801),
    (90, 1.749, 1.523, 0.02962, 0.7646, 7, 0.2188, 8.672),
    (100, 1.63, 1.416, 0.02806, 0.8147, 6, 0.1875, 7.917),
    (110, 1.475, 1.26, 0.02829, 0.6715, 6, 0.1875, 6.77),
    (120, 1.496, 1.254, 0.03173, 0.6252, 6, 0.1875, 6.521),
    (130, 1.388, 1.086, 0.03967, 0.6131, 5, 0.1562, 6.487),
    (140, 1.594, 1.136, 0.06012, 0.6234, 5, 0.1562, 5.823),
    (150, 1.407, 1.074, 0.04365, 0.6254, 5, 0.1562, 6.112),
    (160, 1.985, 1.124, 0.1129, 0.628, 5, 0.1562, 5.584),
]


def test_the_run_that_learnt_nothing_is_warned_in_time():
    watch = CollapseWatch(2048)
    said = [watch(step, dict(zip(NAMES, values, strict=True))) for step, *values in README_RUN]
    warnings = [text for text in said if text]
    assert len(warnings) == 2
    for text in warnings:
        assert int(text.split()[1].rstrip(":")) <= 200
        assert "--method.targets sinkhorn" in text
    assert {"lose rank" in text for text in warnings} == {True, False}
    assert {"starve" in text for text in warnings} == {True, False}


def test_a_rank_that_was_never_high_is_no_loss():
    """A small set of images has few kinds of features."""
    assert not any(watch_many([{"rankme": 3.0 + 0.1 * i} for i in range(3 * PATIENCE)]))
    said = watch_many([{"rankme": 20.0}] * 3 + [{"rankme": 9.0}] * (2 * PATIENCE))
    assert [i for i, text in enumerate(said) if text] == [3 + PATIENCE - 1]
