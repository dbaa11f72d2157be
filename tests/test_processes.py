"""What is trained depends neither on processes nor on accumulated parts: a small table of benchmarks/processes.py."""

import sys
from pathlib import Path

import pytest
import torch

import tiny
from dino.config import replace
from dino.data.sources import open_source
from dino.run.pretrain import pretrain

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import processes


@pytest.mark.parametrize("network", ["vit", "resnet"])
def test_two_processes_with_two_parts_train_what_one_trains(tmp_path, network):
    """In float64: losses to 1e-9, and every monitor to 1e-5 (some are computed in float32)."""
    expected = processes.run(network, "float64", 1, 1, 3, tmp_path / "one")
    lines = processes.run(network, "float64", 2, 2, 3, tmp_path / "two")
    found = processes.farthest(lines, expected)
    assert len(lines) == 3
    assert found.pop("loss") < 1e-9
    assert max(found.values()) < 1e-5, found


def test_batchnorm_sees_the_whole_batch_whatever_accumulate_says(tmp_path, capsys):
    """And the run says that it saves no memory then."""
    images = open_source("shapes:16x32", "train")
    config = replace(tiny.CONFIG, model__use_bn=True, optim__length="2 steps")
    pretrain(images, tmp_path / "one", config, quiet=True)
    capsys.readouterr()
    pretrain(images, tmp_path / "two", replace(config, run__accumulate=2))
    said = " ".join(capsys.readouterr().err.split())
    assert "a network with BatchNorm works a batch in one piece" in said
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
