import dataclasses

import pytest

from dino.config import Config, MethodConfig, OptimConfig, to_steps
from dino.method.schedules import Schedules, ramp, warmup_cosine
from reference import arrays, scalars

NUMBERS, ARRAYS = scalars("04_schedules"), arrays("04_schedules")


@pytest.mark.parametrize("case", NUMBERS["cosine"], ids=lambda case: case["id"])
def test_cosine_equals_the_reference(case):
    expected = ARRAYS[f"cosine/{case['id']}"].tolist()
    steps, warmup = case["epochs"] * case["niter"], case["warmup_epochs"] * case["niter"]
    ours = [warmup_cosine(s, case["base"], case["final"], steps, warmup, case["start"]) for s in range(steps)]
    assert ours == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("case", NUMBERS["teacher_temp"], ids=lambda case: case["id"])
def test_teacher_temperature_equals_the_reference(case):
    expected = ARRAYS[f"teacher_temp/{case['id']}"].tolist()
    method = MethodConfig(
        warmup_teacher_temp=case["warm"],
        teacher_temp=case["temp"],
        warmup_teacher_temp_for=f"{case['warm_epochs']} epochs",
    )
    config = Config(method=method, optim=OptimConfig(length=f"{case['nepochs']} epochs"))
    schedules = Schedules(config, steps_per_epoch=7)
    ours = [schedules.at(epoch * 7 + 3).teacher_temp for epoch in range(case["nepochs"])]
    assert ours == pytest.approx(expected, abs=1e-12)


def test_learning_rate_starts_at_zero_is_scaled_by_the_batch_and_its_end_is_not():
    optim = OptimConfig(length="10 epochs", batch_size=512, base_lr=0.001, min_lr=1e-6, warmup="2 epochs")
    schedules = Schedules(Config(optim=optim), steps_per_epoch=50)
    assert schedules.at(0).lr == 0.0
    assert schedules.at(99).lr == pytest.approx(0.002)
    assert schedules.at(499).lr == pytest.approx(1e-6, abs=1e-6)
    assert schedules.at(0).teacher_momentum == 0.996
    assert schedules.at(499).teacher_momentum == pytest.approx(1.0, abs=1e-6)


def test_a_long_warmup_is_cut_to_half_a_short_run_and_said():
    schedules = Schedules(Config(optim=OptimConfig(length="30 steps", warmup="10 epochs")), steps_per_epoch=100)
    assert schedules.warmup_steps == 15
    assert any("warm-up of 1000 steps is cut to 15" in note for note in schedules.notes)
    assert schedules.at(29).lr < schedules.at(14).lr


def test_a_temperature_warmup_in_steps_rises_every_step():
    method = MethodConfig(teacher_temp=0.07, warmup_teacher_temp_for="4 steps")
    schedules = Schedules(Config(method=method), steps_per_epoch=100)
    assert [schedules.at(s).teacher_temp for s in range(5)] == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07])
    assert ramp(0, 3.0, 9.0, 1) == 3.0


@pytest.mark.parametrize("text", ["", "10", "ten epochs", "-3 epochs", "3 days"])
def test_a_duration_needs_a_number_and_a_unit(text):
    with pytest.raises(ValueError, match="write a number and a unit"):
        to_steps(text, 10, 10)


def test_config_round_trip_and_clear_errors():
    config = dataclasses.replace(Config(), optim=OptimConfig(batch_size=96))
    assert Config.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match=r"--optim.batch-size 0 is not allowed: at least 1 image"):
        OptimConfig(batch_size=0)
    with pytest.raises(ValueError, match="unknown fields"):
        Config.from_json('{"optim": {"speed": 3}}')
    with pytest.raises(ValueError, match="less than one step"):
        Schedules(Config(optim=OptimConfig(length="3 images")), steps_per_epoch=10)
