"""The harness of docs/learning.md at a tiny size: it trains, goes on after it was stopped, judges, repeats nothing."""

import contextlib
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import learning
import learning_rows
import learning_sets
import learning_variants
from dino.augment.multicrop import MultiCrop
from dino.config import replace
from dino.data.decode import to_canvas
from dino.data.sources import open_source
from dino.method.learner import make_learner
from dino.method.optim import set_schedule
from dino.method.schedules import Schedules
from dino.method.step import train_step

PARTS = ("backbone", "head")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Twenty shapes, a network of a few thousand operations, results of its own."""
    monkeypatch.setattr(learning_rows, "RESULTS", tmp_path / "learning.json")
    monkeypatch.setitem(learning_sets.SETS, "shapes", (32, {"train": ["shapes:40x32"], "val": ["shapes:40x32"]}))
    tiny = {"crops__global_size": 16, "crops__local_size": 8, "crops__local_count": 1, "model__backbone": "vit_nano"}
    tiny |= {"optim__batch_size": 8, "model__out_dim": 64, "model__hidden_dim": 16, "model__bottleneck_dim": 8}
    monkeypatch.setitem(learning_variants.VARIANTS, "nano", lambda: learning_variants.cpu(**tiny))
    return tmp_path


def options(work: Path, **changes):
    given = {"data": "shapes", "folder": work, "work": work, "variants": ["nano"], "seeds": [0], "size": None}
    given |= {"tflop": 0.001, "threads": 1, "minutes": None, "device": "cpu", "changes": "{}", "like": "nano"}
    return Namespace(**{**given, **changes})


def test_a_run_is_measured_once_and_shown(small, capsys, monkeypatch):
    learning.run(options(small))
    (row,) = learning_rows.rows()
    assert row["steps"] == row["steps_timed"] >= 10
    for name in ("knn_20", "linear", "linear_mean", "untrained_knn_20"):
        assert 0 <= row[name] <= 100
    assert 1 <= row["rankme"] <= 128
    monkeypatch.setattr(learning, "trained", lambda *_: pytest.fail("repeated"))
    learning.run(options(small))
    learning_rows.show()
    assert "| shapes | 0.001 | nano | 1 |" in capsys.readouterr().out
    assert (small / "learning.png").stat().st_size > 1000


def test_what_stands_beside_the_variants(small, monkeypatch, capsys):
    """Pixels and lightly's DINO: one row each, of the same set in grey and of a part of it."""
    pytest.importorskip("lightly")
    monkeypatch.setitem(learning_sets.PARTS_OF, "few", ("shapes", 30, True))
    learning.run(options(small, data="few", variants=[learning_variants.PIXELS, learning_variants.LIGHTLY]))
    pixels, lightly = learning_rows.rows()
    assert (pixels["steps"], pixels["tflop"], lightly["steps"]) == (0, 0, lightly["steps_timed"])
    assert lightly["steps"] >= 10
    assert 1 <= lightly["prototypes_used"] <= 64
    kept = torch.load(small / "data" / "few" / "pixels.pt")
    assert [len(kept[part][1]) for part in ("train", "val")] == [30, len(open_source("shapes:40x32", "val"))]
    assert all((images[:, 0] == images[:, 2]).all() for images, _ in kept.values())
    learning_rows.show()
    assert "| few | 0 | pixels | 1 | 0 |  |" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_the_ablation_by_hand(capsys):
    """Each seed against its own: +2 and +4 of k-NN; a seed that the winner lacks does not count."""
    for variant, seed, knn in (("resnet", 0, 50), ("resnet", 1, 40), ("resnet, x", 0, 52), ("resnet, x", 1, 44)):
        learning_rows.add_row(
            {"data": "d", "tflop": 1.0, "variant": variant, "seed": seed, "knn_20": knn, "linear": 10.0}
        )
    learning_rows.add_row({"data": "d", "tflop": 1.0, "variant": "resnet, x", "seed": 2, "knn_20": 99, "linear": 10.0})
    learning_rows.ablation()
    assert "| d | 1 | x | 2 | +3.0 (+2.0 to +4.0) | +0.0 (+0.0 to +0.0) |" in capsys.readouterr().out


def test_a_long_run_has_a_curve(small):
    learning.long(options(small))
    found = json.loads((small / "long.json").read_text())
    assert found["curve"][0]["step"] == 0
    assert found["curve"][-1]["step"] == found["steps_timed"]
    assert all(0 <= point["knn_20"] <= 100 for point in found["curve"])


def test_the_anchor_stops_in_time_and_goes_on(small, monkeypatch, capsys):
    """The path of --device cuda, on a CPU."""
    monkeypatch.setitem(learning_sets.SETS, "imagenette-full", learning_sets.SETS["shapes"])
    tiny = learning_variants.VARIANTS["nano"]()
    config = replace(tiny, optim__length="12 steps", optim__warmup="1 steps", run__save_every="1 minutes")
    monkeypatch.setattr(learning, "anchor", lambda: config)
    learning.cuda(options(small, minutes=0.0))
    said = capsys.readouterr().out
    assert "the same command goes on" in said
    done = json.loads((small / "anchor" / "seconds.json").read_text())["steps"]
    assert 0 < done < 12
    learning.cuda(options(small))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["steps_timed"] == 12
    assert 0 <= found["knn_20"] <= 100


def test_operations_by_hand():
    """One linear layer more costs what it should: K prototypes twice as many, one product more a crop and pass."""
    few, many = (
        learning_variants.cpu(model__backbone="vit_nano", optim__batch_size=8, model__out_dim=k) for k in (1024, 2048)
    )
    more = learning_variants.tflop_per_step(many) - learning_variants.tflop_per_step(few)
    rows = 8 * (3 * 6 + 2)  # Of the student forward and twice backward, of the teacher forward.
    assert more == pytest.approx(rows * 2 * 128 * 1024 / 1e12, rel=0.02)


def test_probes_find_what_is_linear():
    torch.manual_seed(0)
    labels = torch.arange(400) % 4
    tokens = torch.randn(400, 2, 8) + 3 * torch.nn.functional.one_hot(labels, 8)[:, None]
    data = learning_sets.Labelled(tokens, labels)
    assert learning_sets._linear(data, data, avgpool=False, batch=64) > 90


def test_with_a_center_ours_and_lightlys_are_the_same_method():
    """From the same weights, on the same crops: docs/learning.md stands on it. float32, clipped over all gradients."""
    pytest.importorskip("lightly")
    from lightly.loss import DINOLoss
    from lightly.models.utils import get_weight_decay_parameters, update_momentum

    few = {"crops__local_count": 2, "optim__batch_size": 16, "run__precision": "float32"}
    config = replace(learning_variants.VARIANTS["resnet, center 0.04, clip over all"](), **few)
    config = learning_variants.planned(config, 0.02, 1000, 0)
    ours, theirs = (make_learner(config, torch.device("cpu")) for _ in range(2))
    student, head, teacher, teacher_head = (getattr(n, p) for n in (theirs.network, theirs.teacher) for p in PARTS)
    criterion = DINOLoss(config.model.out_dim, teacher_temp=0.04, warmup_teacher_temp_epochs=0)
    decayed, free = get_weight_decay_parameters([student, head])
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": free, "weight_decay": 0.0}], lr=0.0)
    schedules, augment = Schedules(config, 62), MultiCrop(config.crops)
    images = torch.randint(256, (16, 3, 80, 80), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for step in range(5):
        crops = augment(to_canvas(list(images), 80, 80), torch.Generator().manual_seed(step))
        now = schedules.at(step)
        loss = train_step(ours, [(crops, None)], 1, now, config.optim, contextlib.nullcontext(), step < 1).loss
        set_schedule(optimizer, now.lr, now.weight_decay)
        groups = [size.transpose(0, 1).flatten(0, 1) for size in crops]
        with torch.no_grad():
            targets = teacher_head(teacher(groups[0]).cls_token).chunk(2)
        logits = head(torch.cat([student(group).cls_token for group in groups])).chunk(4)
        expected = criterion(list(targets), list(logits), epoch=0)
        optimizer.zero_grad()
        expected.backward()
        torch.nn.utils.clip_grad_norm_(theirs.network.parameters(), config.optim.clip)
        if step < 1:
            head.last_layer.weight_v.grad = None
        optimizer.step()
        update_momentum(student, teacher, m=now.teacher_momentum)
        update_momentum(head, teacher_head, m=now.teacher_momentum)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert now.lr > 0
