"""Fine-tuning: a run that was stopped equals one that was not, layers learn at their own speed, and it classifies."""

import csv
import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import dino
from dino.commands import cli
from dino.config import Config
from dino.evaluation.classification import Predictions, accuracy, predict
from dino.method.layers import layered_groups
from dino.models.vision_transformer import VisionTransformer
from dino.models.weights import load_classifier, save_backbone
from dino.run import finetune as finetuning
from dino.run.checkpoint import checkpoints, read
from dino.run.finetune import Classifier, finetune
from dino.run.interruption import Stopped
from tiny import assert_same

SMALL = {"epochs": 2, "batch_size": 8, "save_every": 1000.0, "quiet": True, "precision": "float32"}
DATA = "shapes:40x32"


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "w.safetensors"
    save_backbone(VisionTransformer(32, 8, 3, 24, 2, 2), path, Config().model, 32)
    return path


def stop_after(monkeypatch, steps: int) -> None:
    """Ctrl-C in the middle of the step that is so manieth of this call."""
    real, count = finetuning.clip_gradients, iter(range(1, 1000))

    def clip(*arguments):
        if next(count) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(finetuning, "clip_gradients", clip)


@pytest.mark.parametrize("k", [3, 5, 8])
def test_a_run_that_was_stopped_equals_one_that_was_not(tmp_path, weights, monkeypatch, k):
    whole = finetune(weights, DATA, tmp_path / "whole", **SMALL)
    with monkeypatch.context() as patch:
        stop_after(patch, k)
        with pytest.raises(Stopped, match=f"stopped after step {k} of 10"):
            finetune(weights, DATA, tmp_path / "parts", **SMALL)
    assert finetune(weights, DATA, tmp_path / "parts", **SMALL) == whole
    states = [read(checkpoints(tmp_path / name / "checkpoints")[-1]) for name in ("whole", "parts")]
    assert states[0]["step"] == 10
    assert_same(*states)
    assert_same(*(load_file(tmp_path / name / "backbone.safetensors") for name in ("whole", "parts")))


def test_layers_learn_at_their_own_speed_by_hand():
    model = Classifier(VisionTransformer(16, 8, 3, 24, 2, 2), 3)
    scale = {id(p): group["scale"] for group in layered_groups(model, 0.5) for p in group["params"]}
    at = lambda name: scale[id(model.get_parameter(name))]  # noqa: E731
    # 0: patches and positions, 1 and 2: the blocks, 3: the classifier.
    assert at("backbone.pos_embed") == at("backbone.patch_embed.proj.weight") == 0.125
    assert at("backbone.blocks.0.attn.qkv.weight") == 0.25
    assert at("backbone.blocks.1.mlp.fc1.bias") == at("backbone.norm.weight") == 0.5
    assert at("classifier.weight") == at("classifier.bias") == 1
    assert len(scale) == len(list(model.parameters()))


def test_it_learns_and_the_file_is_a_backbone_and_a_classifier(tmp_path, weights, capsys):
    out, table = tmp_path / "run", tmp_path / "p.csv"
    flags = [
        "--epochs",
        "12",
        "--lr",
        "0.02",
        "--mixup",
        "0",
        "--cutmix",
        "0",
        "--erase",
        "0",
        "--augment",
        "off",
        "--device",
        "cpu",
        "--json",
    ]
    call = ["finetune", str(weights), "shapes:300x32", "--out", str(out), "--batch-size", "32", *flags]
    assert cli.main(call) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["top1"] == results["val_top1"] > 30  # Of ten classes.
    before, after = dino.load(weights), dino.load(out)
    assert before.state_dict().keys() == after.state_dict().keys()
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert all(moved)

    assert cli.main(["predict", str(out), "shapes:300x32", "--out", str(table), "--json"]) == 0
    predicted = json.loads(capsys.readouterr().out)
    assert predicted["top1"] == pytest.approx(results["top1"])
    rows = list(csv.DictReader(table.open()))
    assert rows == list(csv.DictReader((out / "predictions.csv").open()))
    hits = sum(row["predicted"] == row["true"] for row in rows)
    assert 100 * hits / len(rows) == pytest.approx(results["top1"])

    _, classifier, classes, shown = load_classifier(out)
    assert (shown.size, len(classes)) == (32, 10)
    source = dino.open_source("shapes:300x32").part("val")
    found = predict(dino.encoder(out), classifier, classes, source)
    assert accuracy(found)["top1"] == pytest.approx(results["top1"])
    assert cli.main([*call[:-1], "--json"]) == 0  # A complete run says again what it found.
    assert json.loads(capsys.readouterr().out) == results


def test_it_stops_when_val_gets_no_better(tmp_path, weights, monkeypatch):
    values = iter([50.0, 60.0, 55.0, 60.0, 40.0, 30.0, 20.0, 10.0])
    monkeypatch.setattr(finetuning, "_judged", lambda *_: {"top1": next(values)})
    results = finetune(weights, DATA, tmp_path / "run", **(SMALL | {"epochs": 8, "patience": 2}))
    assert (results["epochs"], results["best_epoch"], results["val_top1"]) == (6, 4, 60.0)


def test_accuracy_passes_over_classes_that_are_not_known():
    probabilities = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])
    found = Predictions(probabilities, torch.tensor([0, 0, 2]), torch.arange(3), ["a", "b"])
    assert accuracy(found) == {"top1": 50.0, "top5": 100.0}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--layer-decay", "2"], "--layer-decay 2.0 is not allowed: above 0, at most 1"),
        (["--epochs", "0"], "--epochs 0 is not allowed"),
        (["--val-fraction", "1"], "--val-fraction 1.0 is not allowed"),
        (["--crop", "0"], "--crop 0 is not allowed"),
        (["--lr", "1e38", "--epochs", "3"], "not finite"),
    ],
)
def test_bad_input_gives_one_line(tmp_path, weights, capsys, flags, said):
    call = ["finetune", str(weights), DATA, "--out", str(tmp_path / "run"), "--quiet", "--epochs", "1", *flags]
    assert cli.main(call) == 1
    assert said in capsys.readouterr().err


def test_other_settings_and_images_without_labels_are_refused(tmp_path, weights, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Stopped):
            finetune(weights, DATA, tmp_path / "run", **SMALL)
    with pytest.raises(ValueError, match=r"other settings \(epochs 2 there, 3 now\)"):
        finetune(weights, DATA, tmp_path / "run", **(SMALL | {"epochs": 3}))
    unlabelled = dino.open_source(DATA)
    with pytest.raises(ValueError, match="needs labels"):
        finetune(weights, replace(unlabelled, labels=None, classes=[], parts={}), tmp_path / "new", **SMALL)
    assert cli.main(["predict", str(weights), DATA]) == 1
    assert "holds no classifier" in capsys.readouterr().err
