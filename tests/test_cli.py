"""The command line as users meet it: exit codes, one clear line, one JSON object."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image

import tiny
from dino import __version__
from dino.commands import cli
from dino.config import Config, replace
from dino.encoder.embeddings import read_embeddings
from dino.method import network
from dino.models.build import build_backbone as build_by_name
from dino.recipes import RECIPES, Facts
from dino.run import pretrain


@pytest.fixture(autouse=True)
def small_backbone(monkeypatch):
    monkeypatch.setattr(network, "build_backbone", tiny.build)


def dino(*arguments: object) -> int:
    """The exit code, also where usage is wrong and tyro exits by itself."""
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


def commands(chosen=cli.COMMANDS, words=()):
    for word, inner in chosen.items():
        if isinstance(inner, Mapping):
            yield from commands(inner, (*words, word))
        else:
            yield (*words, word)


@pytest.mark.parametrize("words", [*commands(), ("eval",), ()], ids=" ".join)
def test_help_is_there(words, capsys):
    assert dino(*words, "--help") == 0
    output = capsys.readouterr()
    assert output.out.startswith(f"usage: dino {' '.join(words)}".rstrip())
    assert output.err == ""


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_every_command_takes_json(words, capsys):
    dino(*words, "--help")
    assert "--json" in capsys.readouterr().out


def test_the_help_of_pretrain_names_every_setting(capsys):
    dino("pretrain", "--help")
    text = capsys.readouterr().out
    for name in Config().flat():
        flag = name.removeprefix("adapt.").replace("_", "-")  # Adapting is a command: its flags stand alone.
        assert f"--{flag}" in text, name


def test_the_version(capsys):
    assert dino("--version") == 0
    assert capsys.readouterr().out == f"dino {__version__}\n"


def test_importing_dino_and_help_need_no_torch():
    """Also the help of commands: someone who types --help waits for nothing."""
    code = (
        "import sys, dino\nfrom dino.commands.cli import main\nmain(['--help'])\n"
        "for words in (['pretrain'], ['eval', 'knn']):\n"
        "    try: main([*words, '--help'])\n"
        "    except SystemExit: pass\n"
        "heavy = {'torch', 'torchvision', 'timm', 'matplotlib', 'sklearn', 'tensorboard'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_python_m_dino_gives_the_exit_code():
    done = subprocess.run([sys.executable, "-m", "dino", "no-such"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "no command 'no-such'" in done.stderr
    assert "pretrain" in done.stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("pretrain {there}/gone --out {out}", "{there}/gone does not exist"),
        ("pretrain {there}/empty --out {out}", "no images in {there}/empty"),
        ("pretrain shapes:40x32 --out {out} --optim.batch-size 41", "--optim.batch-size 41 is more than the 40 images"),
        ("pretrain shapes:40x32 --out {out} --model.backbone vit_giant", "--model.backbone 'vit_giant' is unknown"),
        ("pretrain shapes:40x32 --out {out} --model.backbone timm:resnet51", "close names: resnet"),
        ("pretrain shapes:40x32 --out {there}/file", "File exists: {there}/file"),
        ("pretrain cifar11 --out {out}", "cifar11 does not exist and is no named data set"),
        ("eval knn {there}/gone shapes:40x32", "neither a file, a run folder"),
        ("eval knn {there}/empty shapes:40x32", "holds neither backbone.safetensors nor checkpoints"),
    ],
)
def test_what_fails_fails_with_one_clear_line(arguments, words, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    places = {"there": tmp_path, "out": tmp_path / "out"}
    command = arguments.format(**places).split()
    settings = tiny.FLAGS if command[0] == "pretrain" else []
    # What a test sets itself comes last and counts.
    assert dino(*command[:4], *settings, *command[4:]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1, output.err
    assert output.err.startswith("dino pretrain: " if settings else "dino eval knn: ")
    assert words.format(**places) in output.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("pretrain shapes:40x32 --out {out} --recipe best", ["--recipe", "'best'", "vits16_800ep"]),
        ("pretrain shapes:40x32 --out {out} --optim.length 5parsecs", ["--optim.length", "'5parsecs'", "100 epochs"]),
        ("pretrain shapes:40x32 --out {out} --optim.batch-size 0", ["--optim.batch-size 0", "at least 1"]),
        ("pretrain shapes:40x32 --out {out} --optim.batch-size many", ["--optim.batch-size", "'many'"]),
        ("pretrain shapes:40x32 --out {out} --run.device gpu", ["--run.device", "'gpu'", "'cuda'"]),
        ("pretrain shapes:40x32 --out {out} --optim.bath-size 8", ["--optim.bath-size", "--optim.batch-size"]),
        ("pretrain shapes:40x32", ["--out"]),
        ("pretrain --out {out}", ["DATA"]),
        ("eval knn", ["WEIGHTS"]),
        ("eval knn {out}", ["DATA"]),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments, words, tmp_path, capsys):
    assert dino(*arguments.format(out=tmp_path / "out").split()) == 2
    output = capsys.readouterr()
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", output.err).split())  # As it reads, without its frame.
    assert output.out == ""
    for word in words:
        assert word.lower() in text.lower(), text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["eval"]])
def test_no_command_shows_what_there_is(arguments, capsys):
    assert dino(*arguments) == 2
    assert "knn" in "".join(capsys.readouterr())


def test_pretrain_and_knn_from_end_to_end(tmp_path, capsys):
    """The same command again says that all is done; other settings are refused with both values."""
    command = ["pretrain", "shapes:40x32", "--out", tmp_path / "run", *tiny.FLAGS, "--json"]
    assert dino(*command) == 0
    first = capsys.readouterr()
    results = json.loads(first.out.splitlines()[-1])
    assert results["steps"] == 6
    assert len(first.out.splitlines()) == 1
    assert dino(*command) == 0
    assert json.loads(capsys.readouterr().out) == results
    assert dino(*command[:-1]) == 0
    shown = capsys.readouterr()
    assert "already complete: 6 steps" in shown.err
    assert "knn_20_top1" in shown.out

    assert dino(*command, "--optim.base-lr", "0.03") == 1
    assert "--optim.base-lr 0.02 -> 0.03" in capsys.readouterr().err

    knn = ["eval", "knn", tmp_path / "run", "shapes:40x32", "--resize", 37, "--crop", 32, "--k", 5, 20, "--json"]
    assert dino(*knn) == 0
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert measured["knn_20_top1"] == pytest.approx(results["knn_20_top1"])
    assert measured.keys() >= {"knn_5_top1", "knn_5_top5", "settings"}
    assert dino(*knn[:-1]) == 0
    assert re.search(r"^knn_20_top1 +[\d.]+$", capsys.readouterr().out, re.MULTILINE)


def test_an_interrupted_command_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    command = ["pretrain", "shapes:40x32", "--out", tmp_path, *tiny.FLAGS, "--quiet"]
    step = pretrain.train_step

    def train_step(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "train_step", train_step)
        assert dino(*command) == 75
    text = capsys.readouterr().err
    assert text == "dino pretrain: stopped after step 1 of 6; the same command goes on from there\n"
    assert dino(*command) == 0
    assert [line["step"] for line in tiny.metrics(tmp_path) if "loss" in line] == [1, 2, 3, 4, 5, 6]


def stop_before_training(monkeypatch) -> list[Config]:
    """What ``dino pretrain`` would train with."""
    seen = []

    def remember(_train, _out: Path, config: Config, **_) -> dict:
        seen.append(config)
        return {}

    monkeypatch.setattr(pretrain, "pretrain", remember)
    return seen


@pytest.mark.parametrize("recipe", ["auto", "vits16_800ep", "demo"])
def test_flags_change_the_recipe_and_leave_the_rest(recipe, tmp_path, monkeypatch):
    seen = stop_before_training(monkeypatch)
    data, where = "shapes:40x32", ["--out", tmp_path, "--run.device", "cpu"]
    flags = ["--optim.length", "7 steps", "--crops.global-scale", "0.3", "0.9", "--model.no-use-bn", "--run.seed", "3"]
    assert dino("pretrain", data, *where, "--recipe", recipe, *flags, "--quiet") == 0
    expected = RECIPES[recipe](Facts(images=40, side=32, accelerator=False))
    assert seen == [
        replace(
            expected,
            optim__length="7 steps",
            crops__global_scale=(0.3, 0.9),
            model__use_bn=False,
            run__seed=3,
            run__device="cpu",
        )
    ]


@pytest.mark.parametrize("flag", [["--optim.batch-size", "4"], ["--optim.batch-size=4"], ["--optim.batch_size", "4"]])
def test_auto_fits_to_the_chosen_batch(flag, tmp_path, monkeypatch):
    seen = stop_before_training(monkeypatch)
    assert dino("pretrain", "shapes:40x32", "--out", tmp_path, "--run.device", "cpu", *flag, "--quiet") == 0
    facts = Facts(images=40, side=32, accelerator=False, batch_size=4)
    assert seen == [replace(RECIPES["auto"](facts), run__device="cpu")]
    assert seen[0].optim != RECIPES["auto"](facts._replace(batch_size=None)).optim


def test_a_full_device_is_one_clear_line(tmp_path, capsys, monkeypatch):
    def full(*_arguments, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(pretrain, "pretrain", full)
    command = ["pretrain", "shapes:40x32", "--out", tmp_path, "--run.device", "cpu", "--quiet"]
    assert dino(*command) == 1
    text = capsys.readouterr().err
    assert text.startswith("dino pretrain: the device's memory is full: take smaller batches (--optim.batch-size")
    assert text.count("\n") == 1
    text = "DataLoader worker (pid 17) is killed by signal: Killed. "
    monkeypatch.setattr(pretrain, "pretrain", lambda *_, **__: (_ for _ in ()).throw(RuntimeError(text)))
    assert dino(*command) == 1
    assert "a process that reads images was killed" in capsys.readouterr().err
    monkeypatch.setattr(pretrain, "pretrain", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("a defect")))
    with pytest.raises(RuntimeError, match="a defect"):
        dino(*command)


def test_the_demo_does_not_repeat_its_table(capsys, monkeypatch, tmp_path):
    from dino.run import demo

    monkeypatch.setattr(demo, "demo", lambda *_, **__: {"knn": {"trained": 0.9}})
    assert dino("demo", "--out", tmp_path) == 0
    assert capsys.readouterr().out == ""
    assert dino("demo", "--out", tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"knn": {"trained": 0.9}}


def test_flags_that_make_no_sense_are_one_line(tmp_path):
    """A thirtieth of all flags and values; ``python tests/walk_flags.py FOLDER`` walks them all."""
    import walk_flags

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "build_backbone", build_by_name)  # The walk loads what it trains.
        assert walk_flags.main(tmp_path, share=30) == 0


@pytest.mark.parametrize("command", ["eval knn", "eval linear", "eval lowshot", "embed", "explore"])
def test_weights_that_are_not_there_are_said_before_data_is_read(command, tmp_path, capsys):
    out = {"embed": ["--out", "x.npz"], "explore": ["--out", "x.html"]}.get(command, [])
    assert dino(*command.split(), tmp_path / "no_weights", tmp_path / "no_data", *out) == 1
    assert "no_weights" in (said := capsys.readouterr().err)
    assert "no_data" not in said


DATA_COMMANDS = ("eval knn", "eval linear", "eval lowshot", "eval retrieval", "predict", "finetune", "embed", "explore")


@pytest.mark.parametrize("command", [*DATA_COMMANDS, "neighbors", "anomaly fit", "anomaly score"])
def test_every_command_that_reads_data_can_be_told_how(command, capsys):
    dino(*command.split(), "--help")
    assert "--data.label-column" in capsys.readouterr().out


def test_an_evaluation_takes_the_columns_it_is_told(tmp_path, capsys):
    """The list has two columns of classes; by one a class is a colour, by the other the files' first halves."""
    lines = ["file,colour,half"]
    for i in range(12):
        Image.new("RGB", (32, 32), [(200, 30, 30), (30, 30, 200)][i % 2]).save(tmp_path / f"{i:02}.png")
        lines.append(f"{i:02}.png,{'red' if i % 2 else 'blue'},{'first' if i < 6 else 'second'}")
    listed = tmp_path / "photos.csv"
    listed.write_text("\n".join(lines))
    found = {}
    for column in ("colour", "half"):
        assert dino("eval", "knn", "example", listed, "--k", "3", "--data.label-column", column, "--json") == 0
        found[column] = json.loads(capsys.readouterr().out)
    assert found["colour"]["settings"]["classes"] == ["blue", "red"]
    assert found["half"]["settings"]["classes"] == ["first", "second"]
    assert found["colour"]["knn_3_top1"] == 100
    # The file of features is read again by the same columns.
    file = tmp_path / "x.npz"
    assert dino("embed", "example", listed, "--out", file, "--data.path-column", "file", "--json") == 0
    kept = read_embeddings(file)
    assert kept.read.path_column == "file"
    assert kept.image(0).shape == (3, 32, 32)
