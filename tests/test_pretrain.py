"""The run around the training step: it resumes bit for bit, stops in time, and leaves what it promises."""

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dino
import tiny
from dino.augment.multicrop import MultiCrop
from dino.commands import cli
from dino.config import Config, replace
from dino.data.sources import open_source
from dino.method import learner, network
from dino.models.card import read_card
from dino.run import begin, checkpoint, monitor, pretrain
from dino.run.interruption import Stopped

TRAIN, VAL = open_source("shapes:40x32", "train"), open_source("shapes:40x32", "val")


@pytest.fixture(autouse=True)
def small_backbone(monkeypatch):
    monkeypatch.setattr(network, "build_backbone", tiny.build)


def run(out: Path, config: Config = tiny.CONFIG, val=None, train=TRAIN) -> dict:
    return pretrain.pretrain(train, out, config, val=val, quiet=True)


def before_step(monkeypatch, number: int, act) -> None:
    """Calls ``act(learner)`` once, when step ``number`` (from 1) begins."""
    step, calls = pretrain.train_step, [0]

    def train_step(learner, *arguments):
        calls[0] += 1
        if calls[0] == number:
            act(learner)
        return step(learner, *arguments)

    monkeypatch.setattr(pretrain, "train_step", train_step)


def interrupt(
    monkeypatch, out: Path, number: int, config: Config = tiny.CONFIG, by: int = signal.SIGTERM, val=None
) -> None:
    """A run that gets a signal in step ``number``."""
    with monkeypatch.context() as patch:
        before_step(patch, number, lambda _: signal.raise_signal(by))
        with pytest.raises(Stopped, match=f"stopped after step {number} of"):
            run(out, config, val=val)


def die(monkeypatch, out: Path, number: int, config: Config = tiny.CONFIG, val=None) -> None:
    """A run that ends at once when step ``number`` begins, as at a power cut."""

    def power_cut(_) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        before_step(patch, number, power_cut)
        with pytest.raises(SystemExit):
            run(out, config, val=val)


def state(out: Path) -> dict:
    loaded = checkpoint.load_latest(out / "checkpoints")
    assert loaded is not None
    return loaded


def assert_same_runs(a: Path, b: Path) -> None:
    tiny.assert_same(state(a), state(b))
    assert tiny.metrics(a) == tiny.metrics(b)
    assert (a / "config.json").read_text() == (b / "config.json").read_text()
    tiny.assert_same(*(load_file(out / "backbone.safetensors") for out in (a, b)))


WAYS = {
    "adamw": {},
    "accumulated": {"run__accumulate": 2},
    "streamed": {"data__cache": "none"},
    "sgd": {"optim__optimizer": "sgd"},
    "lars": {"optim__optimizer": "lars", "optim__freeze_last_layer": "4 steps"},
    "muon": {"optim__optimizer": "muon"},
    "a queue": {"method__targets": "sinkhorn", "method__queue": 12},
    "coding rate": {"method__coding_rate": 0.01},
    "recomputed": {"run__recompute": True},
    "batch norm in the head": {"model__use_bn": True},
    "timm vit": {"model__backbone": "timm:test_vit"},
    "timm convnet": {"model__backbone": "timm:test_resnet"},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_is_the_same_run(way, tmp_path, monkeypatch):
    config = replace(tiny.CONFIG, **WAYS[way])
    run(tmp_path / "whole", config, val=VAL)
    interrupt(monkeypatch, tmp_path / "resumed", 3, config, val=VAL)
    assert state(tmp_path / "resumed")["step"] == 3
    assert len(tiny.metrics(tmp_path / "resumed")) == 3
    assert not (tmp_path / "resumed" / "backbone.safetensors").exists()
    run(tmp_path / "resumed", config, val=VAL)
    assert_same_runs(tmp_path / "whole", tmp_path / "resumed")
    start = begin.make_learner(config, torch.device("cpu")).network.state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in state(tmp_path / "whole")["student"].items())


@pytest.mark.parametrize("backbone", ["vit_tiny", "timm:test_vit"])
def test_blocks_that_work_twice_train_the_same(backbone, tmp_path, monkeypatch):
    config = replace(tiny.CONFIG, model__backbone=backbone, model__drop_path=0.1 if backbone == "vit_tiny" else 0.0)
    calls = []
    checkpoint_of = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(network, "checkpoint", lambda *a, **k: (calls.append(1), checkpoint_of(*a, **k))[1])
    once, twice = (run(tmp_path / str(r), replace(config, run__recompute=r))["loss"] for r in (False, True))
    assert once == pytest.approx(twice, rel=1e-6)
    assert bool(calls) == (backbone == "vit_tiny")


def test_drop_path_and_the_seed_change_the_run(tmp_path):
    """What the comparison of runs above would not notice if it compared nothing."""
    losses = set()
    for i, changes in enumerate(({}, {"model__drop_path": 0.0}, {"run__seed": 1})):
        losses.add(run(tmp_path / str(i), replace(tiny.CONFIG, **changes))["loss"])
    assert len(losses) == 3


def test_a_run_that_dies_repeats_the_steps_after_its_checkpoint(tmp_path, monkeypatch):
    config = replace(tiny.CONFIG, run__save_every="2 steps")
    run(tmp_path / "whole", config)
    die(monkeypatch, tmp_path / "resumed", 4, config)
    lines = (tmp_path / "resumed" / "metrics.jsonl").read_text()
    assert lines.count("\n") == 3
    (tmp_path / "resumed" / "metrics.jsonl").write_text(lines + '{"step": 4, "lo')  # Killed while it wrote.
    assert state(tmp_path / "resumed")["step"] == 2
    run(tmp_path / "resumed", config)
    assert_same_runs(tmp_path / "whole", tmp_path / "resumed")


def test_a_half_written_newest_checkpoint_is_passed_over(tmp_path, monkeypatch, capsys):
    config = replace(tiny.CONFIG, run__save_every="2 steps")
    run(tmp_path / "whole", config)
    interrupt(monkeypatch, tmp_path / "resumed", 5, config)
    newest = tmp_path / "resumed" / "checkpoints" / "step_00000005.safetensors"
    os.truncate(newest, newest.stat().st_size // 2)
    run(tmp_path / "resumed", config)
    output = capsys.readouterr()
    assert "step_00000005.safetensors is passed over" in output.err
    assert output.out == ""
    assert_same_runs(tmp_path / "whole", tmp_path / "resumed")


def test_ctrl_c_stops_with_a_checkpoint_and_handlers_come_back(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    interrupt(monkeypatch, tmp_path, 2, by=signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert state(tmp_path)["step"] == 2


def test_an_evaluation_in_the_middle_changes_nothing(tmp_path):
    """Also for a backbone with BatchNorm, whose teacher is in train mode around it."""
    config = replace(tiny.CONFIG, model__backbone="timm:test_resnet")
    run(tmp_path / "often", replace(config, run__knn_every="2 steps"), val=VAL)
    run(tmp_path / "once", config, val=VAL)
    (often, once) = (state(tmp_path / name) for name in ("often", "once"))
    del often["config"], once["config"]
    tiny.assert_same(often, once)
    assert [line["step"] for line in tiny.metrics(tmp_path / "often") if "knn_20_top1" in line] == [0, 2, 4, 6]


def test_val_images_of_classes_without_train_images_do_not_stop_a_run(tmp_path, capsys):
    some = TRAIN.subset((TRAIN.labels < 5).nonzero().flatten())
    pretrain.pretrain(some, tmp_path / "some", tiny.CONFIG, val=VAL)
    assert f"k-NN leaves out {int((VAL.labels >= 5).sum())} val images" in capsys.readouterr().err
    results = run(tmp_path / "known", train=some, val=VAL.subset((VAL.labels < 5).nonzero().flatten()))
    again = json.loads((tmp_path / "some" / "results.json").read_text())
    assert again["knn_20_top1"] == results["knn_20_top1"]
    others = VAL.subset((VAL.labels >= 5).nonzero().flatten())
    assert "knn_20_top1" not in run(tmp_path / "none", train=some, val=others)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with checkpoints at steps 2, 4 and 6, of which two are kept; (folder, results)."""
    out = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "build_backbone", tiny.build)
        return out, run(out, replace(tiny.CONFIG, run__save_every="2 steps"), val=VAL)


def test_the_run_folder_holds_what_it_promises(finished):
    out, results = finished
    assert Config.from_json((out / "config.json").read_text()) == replace(tiny.CONFIG, run__save_every="2 steps")
    assert [path.name for path in checkpoint.checkpoints(out / "checkpoints")] == [
        "step_00000004.safetensors",
        "step_00000006.safetensors",
    ]
    assert {path.suffix for path in (out / "checkpoints").iterdir()} == {".safetensors"}
    assert json.loads((out / "results.json").read_text()) == results
    assert "<html" in (out / "report.html").read_text()
    facts = read_card(out / "model_card.md")
    assert (facts.images, facts.classes, facts.side, facts.embed_dim) == (len(TRAIN), len(TRAIN.classes), 32, 24)
    assert facts.results["knn_20_top1"] == results["knn_20_top1"]
    lines = tiny.metrics(out)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert lines[5].keys() >= {"loss", "lr", "teacher_temp", "teacher_entropy", "kl", "rankme", "skipped"}
    assert results.keys() >= {"steps", "loss", "seconds", "skipped", "broken", "knn_20_top1"}
    assert results["loss"] == pytest.approx(lines[5]["loss"], abs=1e-9)


def test_the_saved_backbone_is_the_teacher(finished):
    out, _ = finished
    loaded = dino.load(out)
    weights = {k.removeprefix("backbone."): v for k, v in state(out)["teacher"].items() if k.startswith("backbone.")}
    teacher = tiny.build(tiny.CONFIG.model, tiny.CONFIG.crops.global_size).eval()
    teacher.load_state_dict(weights)
    images = torch.rand(2, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(images).cls_token, teacher(images).cls_token)
    student = tiny.build(tiny.CONFIG.model, tiny.CONFIG.crops.global_size).eval()
    student.load_state_dict(
        {k.removeprefix("backbone."): v for k, v in state(out)["student"].items() if "head" not in k}
    )
    assert not torch.equal(loaded(images).cls_token, student(images).cls_token)


def test_a_finished_run_says_so_and_returns_its_results(finished, capsys):
    out, results = finished
    before = {path: path.stat().st_mtime_ns for path in (out / "checkpoints").iterdir()}
    again = pretrain.pretrain(TRAIN, out, replace(tiny.CONFIG, run__save_every="2 steps"), val=VAL)
    assert again == results
    assert "already complete: 6 steps" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (out / "checkpoints").iterdir()} == before


def test_a_run_that_dies_after_its_last_step_is_finished_by_the_same_call(tmp_path, monkeypatch):
    def power_cut(*_) -> None:
        raise SystemExit

    run(tmp_path / "whole", val=VAL)
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "evaluate", power_cut)
        with pytest.raises(SystemExit):
            run(tmp_path / "resumed", val=VAL)
    assert state(tmp_path / "resumed")["step"] == 6
    results = run(tmp_path / "resumed", val=VAL)
    assert (tmp_path / "resumed" / "report.html").exists()
    assert_same_runs(tmp_path / "whole", tmp_path / "resumed")
    whole = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert {k: v for k, v in results.items() if k != "seconds"} == {k: v for k, v in whole.items() if k != "seconds"}
    assert run(tmp_path / "resumed", val=VAL) == results


def test_other_settings_are_refused_other_speed_is_not(tmp_path, monkeypatch):
    interrupt(monkeypatch, tmp_path, 3)
    with pytest.raises(ValueError, match=r"--optim\.base-lr 0\.02 -> 0\.03, --run\.seed 0 -> 1.*another --out"):
        run(tmp_path, replace(tiny.CONFIG, optim__base_lr=0.03, run__seed=1))
    assert state(tmp_path)["step"] == 3
    assert Config.from_json((tmp_path / "config.json").read_text()) == tiny.CONFIG
    run(tmp_path, replace(tiny.CONFIG, data__cache="none", run__save_every="2 steps", run__keep=1))
    assert state(tmp_path)["step"] == 6


def test_other_images_are_refused(tmp_path, monkeypatch):
    """An epoch would be another, and with it every schedule."""
    interrupt(monkeypatch, tmp_path, 3)
    with pytest.raises(ValueError, match="40 images, DATA has 50"):
        run(tmp_path, train=open_source("shapes:50x32", "train"))


def test_weights_without_checkpoints_are_not_overwritten(tmp_path):
    (tmp_path / "backbone.safetensors").write_bytes(b"mine")
    with pytest.raises(ValueError, match="finished model but no checkpoints"):
        run(tmp_path)
    assert (tmp_path / "backbone.safetensors").read_bytes() == b"mine"


def test_a_finished_run_whose_checkpoints_never_fitted_is_complete(tmp_path, caplog):
    first = run(tmp_path)
    for kept in (tmp_path / "checkpoints").iterdir():
        kept.unlink()
    written = (tmp_path / "backbone.safetensors").read_bytes()
    assert run(tmp_path) == first
    assert "already complete: 6 steps; without checkpoints" in caplog.text
    with pytest.raises(ValueError, match="finished model but no checkpoints"):
        run(tmp_path, replace(tiny.CONFIG, optim__base_lr=0.1))
    assert (tmp_path / "backbone.safetensors").read_bytes() == written


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"optim__batch_size": 41}, "--optim.batch-size 41 .*40 images"),
        ({"run__accumulate": 3}, "--optim.batch-size 8 cannot be shared .*--run.accumulate 3"),
        ({"model__backbone": "vit_giant"}, "--model.backbone 'vit_giant' is unknown"),
        ({"model__backbone": "timm:resnet51"}, "no model 'resnet51'; close names: resnet"),
        ({"optim__length": "0.01 epochs"}, "--optim.length '0.01 epochs' is less than one step"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(changes, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        run(tmp_path / "out", replace(tiny.CONFIG, **changes))
    assert not (tmp_path / "out").exists()


# Steps that are not finite.

WEIGHT = "backbone.blocks.1.mlp.fc1.weight"


def poison(trained) -> None:
    """What a step too large leaves behind."""
    trained.network.get_parameter(WEIGHT).data[0, 0] = math.inf


def test_a_broken_run_stops_and_says_where(tmp_path, monkeypatch):
    config = replace(tiny.CONFIG, optim__length="30 steps", run__save_every="1 steps")
    before_step(monkeypatch, 4, poison)
    with pytest.raises(FloatingPointError) as caught:
        run(tmp_path, config)
    message = str(caught.value)
    assert "step 4" in message
    assert f"first bad tensor: the parameter student.{WEIGHT}" in message
    good = tmp_path / "checkpoints" / "step_00000003.safetensors"
    assert f"Last good checkpoint: {good}" in message
    assert checkpoint.checkpoints(tmp_path / "checkpoints")[-1] == good
    assert all(value.isfinite().all() for value in state(tmp_path)["student"].values())


def test_five_steps_in_a_row_without_a_finite_loss_stop_a_run(tmp_path, monkeypatch):
    """The student stays finite, so that it is not its parameters that tell."""
    config = replace(tiny.CONFIG, optim__length="30 steps", run__save_every="2 steps")
    forward, calls = learner.DINOLoss.forward, [0]

    def overflows(self, *arguments):
        calls[0] += 1
        loss = forward(self, *arguments)
        return loss * math.inf if calls[0] >= 3 else loss

    monkeypatch.setattr(learner.DINOLoss, "forward", overflows)
    with pytest.raises(FloatingPointError) as caught:
        run(tmp_path, config)
    steps = len(tiny.metrics(tmp_path))
    assert 7 <= steps + 1 <= 10, "five bad steps, and at most five until the next look"
    assert f"step {steps + 1}" in str(caught.value)
    assert [line["loss"] for line in tiny.metrics(tmp_path)[:4]][2:] == [None, None]
    assert tiny.metrics(tmp_path)[3]["skipped"] == 2


def test_a_run_does_not_end_well_when_its_last_steps_were_bad(tmp_path, monkeypatch):
    """Seven steps: the look after five sees three bad ones."""
    before_step(monkeypatch, 3, poison)
    with pytest.raises(FloatingPointError, match=WEIGHT):
        run(tmp_path, replace(tiny.CONFIG, optim__length="7 steps"))
    assert not (tmp_path / "backbone.safetensors").exists()


@pytest.mark.parametrize(
    "place, words",
    [
        ("input", "the output of teacher.backbone.patch_embed"),
        ("gradient", f"the gradient of student.{WEIGHT}"),
    ],
)
def test_the_first_bad_tensor_is_named(place, words, tmp_path, monkeypatch):
    if place == "input":
        apply = MultiCrop.apply

        def bad_pixels(self, *arguments):
            crops = apply(self, *arguments)
            crops.global_crops[0, 0, 0, 0, 0] = math.nan
            return crops

        monkeypatch.setattr(MultiCrop, "apply", bad_pixels)
    else:
        make = begin.make_learner

        def with_hook(*arguments):
            made = make(*arguments)
            made.network.get_parameter(WEIGHT).register_hook(lambda grad: grad * math.nan)
            return made

        monkeypatch.setattr(begin, "make_learner", with_hook)
    with pytest.raises(FloatingPointError, match=words):
        run(tmp_path, replace(tiny.CONFIG, optim__length="20 steps"))


def test_a_single_bad_step_is_skipped_counted_and_survived(tmp_path, monkeypatch, capsys):
    """The last of the run: its loss is not a number, and neither the results nor their JSON break over it."""
    forward, calls = learner.DINOLoss.forward, [0]

    def once(self, *arguments):
        calls[0] += 1
        return forward(self, *arguments) * (math.nan if calls[0] == 6 else 1.0)

    monkeypatch.setattr(learner.DINOLoss, "forward", once)
    assert cli.main(["pretrain", "shapes:40x32", "--out", str(tmp_path), *tiny.FLAGS, "--json"]) == 0
    for text in (capsys.readouterr().out.splitlines()[-1], (tmp_path / "results.json").read_text()):
        results = json.loads(text, parse_constant=pytest.fail)
        assert results["skipped"] == 1
        assert results["loss"] is None
    assert tiny.metrics(tmp_path)[5]["loss"] is None


def test_the_command_says_it_in_one_line(tmp_path, monkeypatch, capsys):
    before_step(monkeypatch, 3, poison)
    code = cli.main(
        ["pretrain", "shapes:40x32", "--out", str(tmp_path), *tiny.FLAGS, "--optim.length", "20 steps", "--quiet"]
    )
    output = capsys.readouterr()
    assert code == 1
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert output.err.startswith("dino pretrain: ")
    assert WEIGHT in output.err


# Collapse, provoked.


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("single prototype", {"method__center_momentum": 1.0, "method__teacher_temp": 0.01}),
        ("uniform distribution", {"method__teacher_temp": 5.0}),
    ],
)
def test_a_collapse_is_named_once(kind, changes, tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "GRACE_STEPS", 5)
    config = replace(
        tiny.CONFIG,
        optim__length="60 steps",
        optim__base_lr=0.1,
        model__drop_path=0.0,
        model__out_dim=16,
        method__warmup_teacher_temp_for="0 epochs",
        **changes,
    )
    run(tmp_path, config)
    warnings = (tmp_path / "warnings.txt").read_text().splitlines()
    assert [line for line in warnings if "collapse to" in line and kind in line] == warnings[:1]
    assert "--method.teacher-temp" in warnings[0]
    assert kind in (tmp_path / "report.html").read_text()


def test_a_healthy_run_warns_of_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "GRACE_STEPS", 5)
    run(tmp_path, replace(tiny.CONFIG, optim__length="40 steps"))
    assert not (tmp_path / "warnings.txt").exists()


# Files that cannot be read.


def folder_of_images(folder: Path, count: int) -> Path:
    from PIL import Image

    folder.mkdir()
    for i in range(count):
        Image.fromarray(TRAIN.load(i % 40).permute(1, 2, 0).numpy()).save(folder / f"image{i:03d}.jpg")
    return folder


def break_some(folder: Path) -> set[str]:
    """Files of every broken kind; their names."""
    whole = (folder / "image000.jpg").read_bytes()
    (folder / "broken0.jpg").write_bytes(b"")
    (folder / "broken1.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "broken2.jpg").write_text("not an image")
    (folder / "broken3.png").mkdir()
    (folder / "broken4.jpg").write_bytes(whole)
    (folder / "broken4.jpg").chmod(0)
    readable = os.access(folder / "broken4.jpg", os.R_OK)  # By root it is.
    return {f"broken{i}.{'png' if i == 3 else 'jpg'}" for i in range(4 if readable else 5)}


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_broken_files_are_replaced_and_listed(cache, tmp_path):
    folder = folder_of_images(tmp_path / "images", 115)
    broken = break_some(folder)
    config = replace(tiny.CONFIG, data__cache=cache, optim__length="1 epochs")
    results = run(tmp_path / "out", config, train=open_source(folder))
    lines = (tmp_path / "out" / "broken.txt").read_text().splitlines()
    assert {Path(line.partition("\t")[0]).name for line in lines} == broken
    assert all(len(line.partition("\t")[2]) > 3 for line in lines)
    assert results["broken"] == len(broken)
    assert results["steps"] == 15
    assert all(line["loss"] is not None for line in tiny.metrics(tmp_path / "out"))


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_too_many_broken_files_stop_the_run(cache, tmp_path, capsys):
    folder = folder_of_images(tmp_path / "images", 16)
    broken = break_some(folder)
    code = cli.main(
        ["pretrain", str(folder), "--out", str(tmp_path / "out"), *tiny.FLAGS, "--data.cache", cache, "--quiet"]
    )
    message = capsys.readouterr().err
    assert code == 1
    assert message.count("\n") == 1
    assert "--data.max-broken 0.05" in message
    assert any(name in message for name in broken)


def test_a_canvas_smaller_than_the_images_is_said(tmp_path, capsys):
    for side, said in ((48, True), (32, False)):
        images, config = open_source(f"shapes:16x{side}", "train"), replace(tiny.CONFIG, data__canvas=32)
        pretrain.pretrain(images, tmp_path / f"run{side}", config)
        told = capsys.readouterr().err
        assert ("images of 48 px are kept at 32 px a side: crops see no more (--data.canvas)" in told) == said
