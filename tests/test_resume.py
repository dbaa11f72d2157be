"""Whatever happens, a run goes on as if nothing had happened, or says in one line why it cannot."""

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import dino
import tiny
from dino.augment.multicrop import MultiCrop
from dino.commands import cli
from dino.config import DataConfig, replace
from dino.data import loader as loading
from dino.data.sources import open_source
from dino.method import network
from dino.method.loss import DINOLoss
from dino.models.vision_transformer import VisionTransformer
from dino.run import checkpoint, logbook, pretrain
from dino.run.interruption import EXIT_CODE, SIGNALS, Stopped
from test_pretrain import TRAIN, VAL, assert_same_runs, before_step, die, interrupt, run, state

OFTEN = replace(tiny.CONFIG, run__knn_every="2 steps", run__save_every="1 steps")


@pytest.fixture(autouse=True)
def small_backbone(monkeypatch):
    monkeypatch.setattr(network, "build_backbone", tiny.build)


def folder_of_images(folder: Path, count: int, side: int = 24) -> Path:
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(TRAIN.load(i % 40).permute(1, 2, 0).numpy()).resize((side, side)).save(path)
    return folder


def evaluations(out: Path) -> list[int]:
    return [line["step"] for line in tiny.metrics(out) if "knn_20_top1" in line]


# Being asked to stop.


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_saves_at_the_step_and_has_an_exit_code_of_its_own(number, tmp_path, monkeypatch, capsys):
    before = signal.signal(number, signal.SIG_DFL)  # nohup ignores SIGHUP, and so do we then.
    before_step(monkeypatch, 3, lambda _: signal.raise_signal(number))
    command = ["pretrain", "shapes:40x32", "--out", str(tmp_path), *tiny.FLAGS, "--quiet"]
    assert cli.main(command) == EXIT_CODE == 75
    signal.signal(number, before)
    assert state(tmp_path)["step"] == 3
    output = capsys.readouterr()
    assert output.err == "dino pretrain: stopped after step 3 of 6; the same command goes on from there\n"


def test_an_ignored_hangup_stays_ignored(tmp_path, monkeypatch):
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        before_step(monkeypatch, 3, lambda _: signal.raise_signal(signal.SIGHUP))
        assert run(tmp_path)["steps"] == 6
    finally:
        signal.signal(signal.SIGHUP, old)


def test_a_stop_in_an_evaluation_leaves_it_and_the_line_comes_later(tmp_path, monkeypatch):
    run(tmp_path / "whole", OFTEN, val=VAL)
    evaluate, calls = pretrain.knn.run, [0]

    def interrupted(*arguments, **options):
        calls[0] += 1
        if calls[0] == 2:  # After step 2.
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("the evaluation went on")
        return evaluate(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain.knn, "run", interrupted)
        with pytest.raises(Stopped, match="after step 2") as stopped:
            run(tmp_path / "resumed", OFTEN, val=VAL)
    assert stopped.value.step == state(tmp_path / "resumed")["step"] == 2
    assert evaluations(tmp_path / "resumed") == [0]
    run(tmp_path / "resumed", OFTEN, val=VAL)
    assert evaluations(tmp_path / "resumed") == [0, 2, 4, 6]
    assert_same_runs(tmp_path / "whole", tmp_path / "resumed")


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_death_in_an_evaluation_neither_loses_nor_doubles_its_line(call, tmp_path, monkeypatch):
    run(tmp_path / "whole", OFTEN, val=VAL)
    write, calls = pretrain.knn.run, [0]

    def power_cut(*arguments, **options):
        calls[0] += 1
        if calls[0] == call:
            raise SystemExit
        return write(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain.knn, "run", power_cut)
        with pytest.raises(SystemExit):
            run(tmp_path / "resumed", OFTEN, val=VAL)
    run(tmp_path / "resumed", OFTEN, val=VAL)
    assert_same_runs(tmp_path / "whole", tmp_path / "resumed")


def test_a_death_between_two_steps_doubles_no_evaluation(tmp_path, monkeypatch):
    run(tmp_path / "whole", OFTEN, val=VAL)
    die(monkeypatch, tmp_path / "resumed", 3, OFTEN, val=VAL)
    run(tmp_path / "resumed", OFTEN, val=VAL)
    assert_same_runs(tmp_path / "whole", tmp_path / "resumed")


# Two runs in one folder.


def test_a_second_run_is_refused_and_a_dead_one_leaves_no_lock(tmp_path):
    script = f"""
import sys, time
from pathlib import Path
from dino.run.folder import own
with own(Path({str(tmp_path)!r})):
    print("mine", flush=True)
    time.sleep(60)
"""
    source = Path(__file__).parents[1] / "src"
    first = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(source)}
    )
    assert first.stdout is not None
    assert first.stdout.readline() == b"mine\n"
    with pytest.raises(ValueError, match=rf"another run is at work .*process {first.pid} on .*another --out"):
        run(tmp_path)
    first.kill()
    first.wait()
    assert run(tmp_path)["steps"] == 6


def test_worker_processes_do_not_hold_the_lock_of_a_run_that_is_gone(tmp_path):
    """They live a few seconds longer than a parent that was killed."""
    script = f"""
import os, time
from pathlib import Path
from dino.run.folder import own
with own(Path({str(tmp_path)!r})):
    if os.fork() == 0:
        time.sleep(20)
        os._exit(0)
    os.kill(os.getpid(), 9)
"""
    source = Path(__file__).parents[1] / "src"
    subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(source)}, timeout=15)
    assert run(tmp_path)["steps"] == 6


# What must be the same.


def test_grown_data_is_said_as_grown_data_not_as_settings(tmp_path, capsys):
    """With `auto`, more images are other settings, which nobody gave."""
    images = folder_of_images(tmp_path / "images", 40)
    command = ["pretrain", str(images), "--out", str(tmp_path / "out"), "--optim.length", "1 steps", "--quiet"]
    command += ["--run.device", "cpu", "--model.backbone", "vit_tiny", "--crops.local-count", "1"]
    assert cli.main(command) == 0
    folder_of_images(tmp_path / "images", 80)
    assert cli.main(command) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "holds a run on 36 images, DATA has 72" in error
    assert "--method" not in error


@pytest.mark.parametrize("change", ["name", "size"])
def test_as_many_other_images_are_noticed(change, tmp_path, monkeypatch):
    images = folder_of_images(tmp_path / "images", 20)
    with monkeypatch.context() as patch:
        before_step(patch, 3, lambda _: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Stopped):
            run(tmp_path / "out", train=open_source(images))
    if change == "name":
        (images / "a" / "000.png").rename(images / "a" / "0000.png")
    else:
        Image.new("RGB", (31, 17)).save(images / "a" / "000.png")
    with pytest.raises(ValueError, match="20 images, DATA has as many of other names or sizes"):
        run(tmp_path / "out", train=open_source(images))


def test_a_data_set_may_be_moved(tmp_path, monkeypatch):
    images = folder_of_images(tmp_path / "images", 20)
    with monkeypatch.context() as patch:
        before_step(patch, 3, lambda _: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Stopped):
            run(tmp_path / "out", train=open_source(images))
    images.rename(tmp_path / "elsewhere")
    assert run(tmp_path / "out", train=open_source(tmp_path / "elsewhere"))["steps"] == 6


def test_settings_that_changed_are_shown(tmp_path, monkeypatch, capsys):
    interrupt(monkeypatch, tmp_path, 3)
    pretrain.pretrain(TRAIN, tmp_path, replace(tiny.CONFIG, run__accumulate=2, run__precision="bfloat16"))
    said = capsys.readouterr().err
    assert "settings changed: --run.accumulate 1 -> 2, --run.precision float32 -> bfloat16" in said.replace(
        "auto", "float32"
    )
    assert "goes on with precision float32 -> bfloat16" in said


def test_a_finished_run_is_extended_and_says_so(tmp_path, capsys):
    run(tmp_path, val=VAL)
    longer = replace(tiny.CONFIG, optim__length="9 steps")
    results = pretrain.pretrain(TRAIN, tmp_path, longer, val=VAL)
    assert "extends the finished run of 6 steps to 9" in capsys.readouterr().err
    assert results["steps"] == 9
    assert [line["step"] for line in tiny.metrics(tmp_path) if "loss" in line] == list(range(1, 10))
    assert run(tmp_path, longer, val=VAL) == results
    with pytest.raises(ValueError, match=r"--optim.length 9 steps -> 6 steps"):
        run(tmp_path, val=VAL)


def test_an_unfinished_run_keeps_its_length(tmp_path, monkeypatch):
    interrupt(monkeypatch, tmp_path, 3)
    with pytest.raises(ValueError, match=r"--optim.length 6 steps -> 9 steps"):
        run(tmp_path, replace(tiny.CONFIG, optim__length="9 steps"))


@pytest.mark.parametrize("name", ["backbone.safetensors", "report.html", "results.json", "model_card.md"])
def test_what_is_missing_in_a_finished_folder_is_made_again(name, tmp_path):
    results = run(tmp_path, val=VAL)
    before = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    again = run(tmp_path, val=VAL)
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in results.items() if k != "seconds"}
    assert len((tmp_path / name).read_bytes()) == pytest.approx(len(before), rel=0.05)


def test_a_checkpoint_of_version_0_1_goes_on(tmp_path, monkeypatch):
    run(tmp_path / "whole")
    interrupt(monkeypatch, tmp_path / "old", 3)
    old = state(tmp_path / "old")
    for name in ("names", "circumstances", "broken"):  # It had none of these.
        del old[name]
    folder = tmp_path / "old" / "checkpoints"
    (folder / "step_00000003.safetensors").unlink()
    torch.save(old, folder / "step_00000003.pt")
    run(tmp_path / "old")
    assert_same_runs(tmp_path / "whole", tmp_path / "old")


# Files, disks and processes that fail.


def test_broken_files_are_remembered(tmp_path, monkeypatch):
    images = folder_of_images(tmp_path / "images", 40)
    (images / "a" / "000.png").write_bytes(b"")
    config = replace(tiny.CONFIG, data__cache="none", data__workers=0, optim__length="9 steps")
    whole = run(tmp_path / "whole", config, train=open_source(images))
    assert whole["broken"] == 1
    with monkeypatch.context() as patch:
        before_step(patch, 6, lambda _: signal.raise_signal(signal.SIGTERM))  # After an epoch of 5 steps.
        with pytest.raises(Stopped):
            run(tmp_path / "out", config, train=open_source(images))
    reads = loading._Reader.load
    monkeypatch.setattr(loading._Reader, "load", lambda self, rows: (reads(self, rows)[0], {}))
    assert run(tmp_path / "out", config, train=open_source(images)) | {"seconds": 0} == whole | {"seconds": 0}
    assert (tmp_path / "out" / "broken.txt").read_text().startswith(str(images / "a" / "000.png"))


def test_a_full_disk_changes_nothing_but_what_is_kept(tmp_path, monkeypatch):
    config = replace(tiny.CONFIG, run__save_every="1 steps")
    run(tmp_path / "whole", config)
    write = checkpoint.save_file

    def full(tensors, path, **options):
        if "0000003" in str(path) or "0000004" in str(path):
            raise OSError(28, "full")
        write(tensors, path, **options)

    monkeypatch.setattr(checkpoint, "save_file", full)
    pretrain.pretrain(TRAIN, tmp_path / "full", config)
    warned = (tmp_path / "full" / "warnings.txt").read_text()
    assert warned.count("a checkpoint could not be written (No space left on device") == 2
    assert_same_runs(tmp_path / "whole", tmp_path / "full")


def test_metrics_that_find_the_disk_full_are_written_later(tmp_path, monkeypatch):
    append, calls = logbook.Logbook._append, [0]

    def full(self):
        calls[0] += 1
        if calls[0] in (2, 3):
            raise OSError(28, "No space left on device")
        append(self)

    monkeypatch.setattr(logbook.Logbook, "_append", full)
    run(tmp_path)
    assert [line["step"] for line in tiny.metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "warnings.txt").read_text().count("cannot be written now") == 1


def kill_workers() -> None:
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()


STREAMED = replace(tiny.CONFIG, data__cache="none", data__workers=2, optim__length="12 steps")


def test_a_killed_worker_is_replaced(tmp_path, monkeypatch, caplog):
    run(tmp_path / "whole", STREAMED)
    before_step(monkeypatch, 5, lambda _: kill_workers())
    run(tmp_path / "killed", STREAMED)
    assert "a process that reads images was killed" in caplog.text
    assert_same_runs(tmp_path / "whole", tmp_path / "killed")


class Slow:
    """A source whose image 7 hangs: the first time only, or always."""

    def __init__(self, reader, once: Path | None):
        self.reader, self.once = reader, once

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.reader, name)

    def load(self, i, *arguments):
        if i == 7 and not (self.once and self.once.exists()):
            if self.once:
                self.once.touch()
            time.sleep(60)
        return self.reader.load(i, *arguments)


def slow(tmp_path, once: bool):
    return dataclasses.replace(TRAIN, reader=Slow(TRAIN.reader, tmp_path / "once" if once else None))


def test_a_hung_worker_is_replaced(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(loading, "_HUNG", 2.0)
    source = slow(tmp_path, once=True)
    data = DataConfig(cache="none", workers=1)
    batches = loading.Loader(source, 8, data=data, seed=0, device="cpu").batches(0, 5)
    seen = torch.cat([batch.indices for batch in batches])
    assert sorted(seen.tolist()) == list(range(40))
    assert "a process that reads images hung at" in caplog.text


def test_workers_that_hang_again_and_again_end_a_run_that_is_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "_HUNG", 0.5)
    monkeypatch.setattr(loading, "_LOSSES", 1)
    with pytest.raises(ValueError, match=r"hung 2 times in a row at .*shapes.*Saved after step \d"):
        run(tmp_path, STREAMED, train=slow(tmp_path, once=False))
    lines = [line["step"] for line in tiny.metrics(tmp_path)]
    assert state(tmp_path)["step"] == (lines[-1] if lines else 0)


@pytest.mark.parametrize(
    ("config", "helps"),
    [
        (tiny.CONFIG, "--run.accumulate 2, --run.shard, --run.recompute"),
        (replace(tiny.CONFIG, optim__optimizer="muon"), "--run.accumulate 2, --run.recompute"),
        (replace(tiny.CONFIG, method__coding_rate=0.1), "--run.shard, --run.recompute"),
        (replace(tiny.CONFIG, model__use_bn=True), "--run.shard, --run.recompute"),
    ],
)
def test_out_of_memory_says_what_helps_and_is_allowed(tmp_path, monkeypatch, config, helps):
    def full(_):
        monkeypatch.setattr(pretrain.distributed, "world_size", lambda: 2)  # As if one of two had failed.
        raise torch.OutOfMemoryError("CUDA out of memory")

    before_step(monkeypatch, 2, full)
    with pytest.raises(ValueError, match=rf"out of memory with 4 images .* 2 crops of 32 px.*memory: {helps}"):
        run(tmp_path, config)


# From Python.


def test_from_paths_with_ones_own_network_loss_and_augmentation(tmp_path):
    images = folder_of_images(tmp_path / "images", 40)
    seen = {"crops": 0, "losses": 0}

    class Loss(DINOLoss):
        def forward(self, *arguments):
            seen["losses"] += 1
            return 2 * super().forward(*arguments)

    multicrop = MultiCrop(tiny.CONFIG.crops)

    def augment(canvas, generator, *, rank, world_size):
        seen["crops"] += 1
        return multicrop(canvas, generator, rank=rank, world_size=world_size)

    mine = VisionTransformer(32, 8, 3, 24, 2, 2, 2.0)
    before = mine.norm.bias.clone()
    results = pretrain.pretrain(
        str(images),
        tmp_path / "out",
        tiny.CONFIG,
        backbone=mine,
        loss=Loss(tiny.CONFIG.model.out_dim),
        augment=augment,
        quiet=True,
        optim__length="4 steps",
    )
    assert results["steps"] == 4
    assert "knn_20_top1" in results  # A tenth was held out.
    assert seen == {"crops": 4, "losses": 4}
    assert not torch.equal(mine.norm.bias, before)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model"]["backbone"].startswith("vit(img_size=32, patch_size=8")
    assert dino.load(tmp_path / "out").embed_dim == 24


def test_a_recipe_by_name_with_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "RECIPES", {"auto": lambda _: tiny.CONFIG})
    assert pretrain.pretrain(TRAIN, tmp_path, quiet=True, optim__length="2 steps")["steps"] == 2
    with pytest.raises(ValueError, match="recipe 'best' is unknown: auto"):
        pretrain.pretrain(TRAIN, tmp_path, "best")
    with pytest.raises(ValueError, match=r"optim__lenght is no setting: .*optim__length"):
        pretrain.pretrain(TRAIN, tmp_path, optim__lenght="2 steps")


def test_what_is_no_backbone_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the backbone, a Linear, has no embed_dim"):
        pretrain.pretrain(TRAIN, tmp_path / "out", tiny.CONFIG, backbone=torch.nn.Linear(2, 2))
    assert not (tmp_path / "out").exists()
