"""What is trained depends neither on processes nor on accumulated parts: a small table of benchmarks/processes.py."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import tiny
from dino.config import replace
from dino.data.sources import open_source
from dino.run.checkpoint import checkpoints, read, step_of
from dino.run.pretrain import pretrain

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import processes


@pytest.mark.parametrize("network", ["vit", "resnet"])
def test_two_processes_with_two_parts_train_what_one_trains(tmp_path, network):
    """In float64: losses to 1e-9, and every monitor to 1e-5 (some are computed in float32)."""
    expected = processes.run(network, "float64", 1, 1, 3, tmp_path / "one")
    for shard in (False, True):
        lines = processes.run(network, "float64", 2, 2, 3, tmp_path / f"two {shard}", run__shard=shard)
        assert len(lines) == 3
        is_near(lines, expected)
        assert layout(tmp_path / f"two {shard}") == layout(tmp_path / "one")


def is_near(lines, expected):
    found = processes.farthest(lines, expected)
    assert found.pop("loss") < 1e-9
    assert max(found.values()) < 1e-5, found


def layout(out):
    """What the newest checkpoint holds, and in which shapes."""
    with safe_open(checkpoints(out / "checkpoints")[-1], framework="pt") as file:
        return {name: (file.get_slice(name).get_shape(), file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize(
    "settings",
    [
        {"optim__optimizer": "adamw", "optim__clip": 0.3, "optim__freeze_last_layer": "1 steps"},
        {"optim__optimizer": "sgd", "optim__clip": 0.3, "optim__clip_mode": "global", "run__recompute": True},
        {"optim__optimizer": "lars", "method__coding_rate": 0.01, "method__targets": "sinkhorn", "method__queue": 12},
    ],
)
def test_a_student_that_is_shared_out_goes_on_in_any_number_of_processes(tmp_path, settings):
    """Two processes with a share each, then one with all of it, then four with a share: as one that ran through."""
    settings = {**settings, "run__save_every": "2 steps", "run__keep": 9}
    expected = processes.run("vit", "float64", 1, 1, 6, tmp_path / "through", **settings)
    before = None
    for done, count in ((0, 2), (2, 1), (4, 4)):
        out = tmp_path / str(done)
        if before is not None:
            shutil.copytree(before / "checkpoints", out / "checkpoints")
            shutil.copy(before / "metrics.jsonl", out)
            for path in checkpoints(out / "checkpoints"):
                if step_of(path) > done:
                    path.unlink()
        lines = processes.run("vit", "float64", count, 1, 6, out, run__shard=count > 1, **settings)
        before = out
    is_near(lines, expected)
    ours, theirs = (read(checkpoints(out / "checkpoints")[-1]) for out in (before, tmp_path / "through"))
    for what in ("student", "teacher", "optimizer", "dino_loss"):
        torch.testing.assert_close(ours[what], theirs[what], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("setting", "what"),
    [({"model__use_bn": True}, "a network with BatchNorm"), ({"method__coding_rate": 0.1}, "--method.coding-rate")],
)
def test_statistics_are_those_of_the_whole_batch_whatever_accumulate_says(tmp_path, capsys, setting, what):
    """And the run says that it saves no memory then."""
    images = open_source("shapes:16x32", "train")
    config = replace(tiny.CONFIG, **setting, optim__length="2 steps")
    pretrain(images, tmp_path / "one", config, quiet=True)
    capsys.readouterr()
    pretrain(images, tmp_path / "two", replace(config, run__accumulate=2))
    said = " ".join(capsys.readouterr().err.split())
    assert f"{what} works a batch in one piece" in said
    assert "--run.accumulate 2 saves no memory; --run.recompute and more processes do" in said
    tiny.assert_same(tiny.metrics(tmp_path / "one"), tiny.metrics(tmp_path / "two"))


def test_recomputed_batchnorm_trains_the_same(tmp_path):
    images = open_source("shapes:16x32", "train")
    settings = {"model__backbone": "timm:test_resnet", "model__drop_path": 0.0, "optim__length": "2 steps"}
    losses = []
    for recompute in (False, True):
        config = replace(tiny.CONFIG, run__recompute=recompute, **settings)
        pretrain(images, tmp_path / str(recompute), config, quiet=True)
        losses.append(torch.tensor([line["loss"] for line in tiny.metrics(tmp_path / str(recompute))]))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
