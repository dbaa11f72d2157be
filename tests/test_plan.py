"""What a run will cost: counted by hand, against a real run, and what is said when the measurement is killed."""

import json
import os
import signal

import pytest

import tiny
from dino.commands import cli
from dino.config import replace
from dino.data.sources import open_source
from dino.machine.private_calls import use_public_calls
from dino.method import network
from dino.run import checkpoint, plan, pretrain


@pytest.fixture(autouse=True)
def tinier(monkeypatch):
    monkeypatch.setattr(network, "build_backbone", tiny.build)


def test_steps_and_epochs():
    found = plan.plan(replace(tiny.CONFIG, optim__length="3 epochs"), images=83)  # 10 batches of 8 an epoch.
    assert (found["steps"], found["images_seen"], found["epochs"]) == (30, 240, 2.89)
    with pytest.raises(ValueError, match=r"--optim.batch-size 8 is more than the 7 images"):
        plan.plan(tiny.CONFIG, images=7)


def test_operations_of_64_more_prototypes():
    few, many = (plan.plan(replace(tiny.CONFIG, model__out_dim=k), 100)["gflop_an_image"] for k in (64, 128))
    # A product costs 2 an entry. The student's 4 crops: forward, and backward for embeddings and prototypes; the
    # teacher's 2 forward alone. Embeddings have 16 numbers.
    assert (many - few) * 1e9 == pytest.approx(2 * 16 * 64 * (3 * 4 + 2))


def test_what_an_optimizer_multiplies_is_not_of_an_image():
    adamw, muon = (plan.plan(replace(tiny.CONFIG, optim__optimizer=name), 100) for name in ("adamw", "muon"))
    assert muon["gflop_an_image"] == adamw["gflop_an_image"]
    assert muon["checkpoint_gib"] < adamw["checkpoint_gib"]  # Muon keeps one moment, not two.


def test_whoever_multiplies_the_operations_are_the_same():
    private = plan.plan(tiny.CONFIG, 100)["gflop_an_image"]
    use_public_calls()
    try:
        assert plan.plan(tiny.CONFIG, 100)["gflop_an_image"] == private > 0
    finally:
        use_public_calls(False)


def test_parameters_and_disk_are_those_of_a_run(tmp_path):
    found = plan.plan(tiny.CONFIG, 40)
    pretrain.pretrain(open_source("shapes:40x32", "train"), tmp_path / "run", tiny.CONFIG)
    (written,) = checkpoint.checkpoints(tmp_path / "run" / "checkpoints")
    assert found["checkpoint_gib"] * 2**30 == pytest.approx(written.stat().st_size, rel=0.15)  # Besides, its names.
    backbone = tmp_path / "run" / "backbone.safetensors"
    assert found["backbone_parameters"] * 4 == pytest.approx(backbone.stat().st_size, rel=0.15)


def test_the_command_measures_and_counts(capsys):
    settings = ["--crops.global-size", "32", "--crops.local-size", "16", "--model.backbone", "vit_nano"]
    settings += [
        "--model.out-dim",
        "64",
        "--optim.batch-size",
        "8",
        "--run.threads",
        "1",
        "--optim.length",
        "80 images",
    ]
    assert cli.main(["plan", "shapes:40x32", *settings, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["steps"] == 10
    assert found["hours"] == pytest.approx(80 / found["images_per_second"] / 3600)
    assert 0.2 < found["peak_memory_gib"] < 8
    assert cli.main(["plan", "--recipe", "demo", "--images", "1000", "--side", "48", "--json"]) == 0
    assert "hours" not in json.loads(capsys.readouterr().out.splitlines()[-1])


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("rate", "less"), [(0.0, "--run.accumulate 2"), (0.1, "--run.recompute")])
def test_a_killed_measurement_says_what_helps(monkeypatch, rate, less):
    monkeypatch.setattr(plan, "_first_steps", die)
    config = replace(tiny.CONFIG, method__coding_rate=rate)
    with pytest.raises(ValueError, match=rf"killed, most likely because memory ran out.*memory {less}$"):
        plan.plan(config, 40, open_source("shapes:40x32", "train"))
