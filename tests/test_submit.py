"""A job by submitit's local executor: the command runs; asked to stop, it is saved and runs again."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

import tiny
from dino.commands import cli

submitit = pytest.importorskip("submitit", reason="the extra slurm is not installed")
from dino.commands.submit import Job  # noqa: E402

FLAGS = ["shapes:40x32", *tiny.FLAGS, "--model.backbone", "vit_nano", "--quiet"]


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "src"))


def test_a_local_job_runs_the_command(tmp_path, capsys):
    command = ["submit", "--local", "--gpus", "0", "--logs", str(tmp_path / "logs"), "--json", "--"]
    assert cli.main([*command, "pretrain", *FLAGS, "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 6
    assert Path(json.loads(capsys.readouterr().out)["log"]).exists()


def test_more_gpus_than_this_machine_has_are_refused_where_it_runs_the_job(tmp_path, capsys):
    """submitit numbers them one by one: 10^12 would never end."""
    flags = ["--local", "--gpus", "1000000000000", "--logs", str(tmp_path)]
    assert cli.main(["submit", *flags, "--", "--version"]) == 1
    assert "--gpus 1000000000000 is not allowed with --local" in capsys.readouterr().err


def test_an_array_is_a_job_for_each_value(tmp_path, capsys):
    flags = ["--local", "--gpus", "0", "--logs", str(tmp_path / "logs"), "--json", "--array", "3", "4"]
    command = ["submit", *flags, "--"]
    assert cli.main([*command, "pretrain", *FLAGS, "--out", str(tmp_path / "{}"), "--run.seed", "{}"]) == 0
    made = [json.loads((tmp_path / seed / "config.json").read_text())["run"]["seed"] for seed in "34"]
    assert made == [3, 4]
    assert len(json.loads(capsys.readouterr().out)["jobs"]) == 2
    assert cli.main([*command, "pretrain", *FLAGS, "--out", str(tmp_path / "run")]) == 1
    assert "has no {}" in capsys.readouterr().err


def test_a_stopped_job_is_saved_and_the_same_is_submitted_again(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    for name, value in {"JOB_ID": "1", "NTASKS": "1", "GLOBALID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SUBMITIT_LOCAL_{name}", value)
    out = tmp_path / "run"
    job = Job(["pretrain", *FLAGS, "--out", str(out), "--optim.length", "100000 steps"])
    if pid := os.fork():
        end = time.monotonic() + 200
        while not ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text()):
            assert time.monotonic() < end
            time.sleep(0.05)
        os.kill(pid, signal.SIGUSR2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert len(list((out / "checkpoints").glob("step_*"))) == 1
        return

    def timeout(*_):  # As submitit does.
        again = job.checkpoint()
        os._exit(0 if again.function._command == job._command else 1)

    signal.signal(signal.SIGUSR2, timeout)
    try:
        job()
    finally:
        os._exit(1)


@pytest.mark.parametrize(
    "flags, words", [(["--nodes", "0"], "--nodes 0"), (["--hours", "nan"], "--hours nan"), ([], "no command")]
)
def test_what_cannot_be_is_one_line(flags, words, capsys):
    assert cli.main(["submit", "--local", *flags, "--", *(["pretrain"] if flags else [])]) == 1
    assert words in capsys.readouterr().err
