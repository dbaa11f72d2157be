"""An error in one process ends all of them, soon and with its message."""

import os
import random
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

import tiny
from dino.commands import cli
from dino.config import replace
from dino.data import loader
from dino.data.decode import BrokenImage
from dino.data.sources import open_source
from dino.machine import distributed
from dino.method import network
from dino.run import pretrain


def in_each_process(case: str, folder: Path) -> int:
    network.build_backbone = tiny.build
    mine = int(os.environ["RANK"])
    step, calls = pretrain.train_step, [0]

    def train_step(*arguments):
        calls[0] += 1
        if calls[0] == 3 and mine == 1:
            if case == "killed":
                os.kill(os.getpid(), 9)
            raise ValueError("the third step of the second process is too much")
        return step(*arguments)

    if case in ("error", "killed"):
        pretrain.train_step = train_step
    if case == "evaluation" and mine == 1:
        pretrain.knn.run = lambda *_, **__: (_ for _ in ()).throw(ValueError("no evaluation here"))
    if case == "folders":  # As on two machines that share no file system.
        folder = folder / str(mine)
    if case == "broken":  # Each process finds other files that it cannot read.
        load = loader._Reader.load

        def broken(self, rows):
            images, _ = load(self, rows)
            return images, {f"file {mine}": BrokenImage("damaged").args[0]}

        loader._Reader.load = broken
        config = replace(tiny.CONFIG, data__cache="none", data__workers=0)
        with distributed.process_group(torch.device("cpu")):
            results = pretrain.pretrain(open_source("shapes:40x32", "train"), folder / "out", config, quiet=True)
        assert results["broken"] == 2
        return 0
    command = ["pretrain", "shapes:40x32", "--out", str(folder / "out"), *tiny.FLAGS, "--quiet"]
    return cli.main([*command, "--run.knn-every", "2 steps"])


def processes(case: str, folder: Path) -> tuple[list[int], list[str], float]:
    """Exit codes and stderr of two processes, and the seconds until the second had followed the first."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    running = []
    for rank in (0, 1):
        if pid := os.fork():
            running.append(pid)
            continue
        os.dup2(os.open(folder / f"log{rank}", os.O_CREAT | os.O_WRONLY), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
        os.environ["MASTER_PORT"] = str(port)
        code = 70
        try:
            code = in_each_process(case, folder)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    ends = {}
    deadline = time.monotonic() + 100
    while len(ends) < 2 and time.monotonic() < deadline:
        for pid in set(running) - ends.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                ends[pid] = (os.waitstatus_to_exitcode(status), time.monotonic())
        time.sleep(0.02)
    for pid in set(running) - ends.keys():
        os.kill(pid, signal.SIGKILL)
        ends[pid] = (os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), time.monotonic())
    times = [when for _, when in ends.values()]
    logs = [(folder / f"log{rank}").read_text() for rank in (0, 1)]
    return [ends[pid][0] for pid in running], logs, max(times) - min(times)


@pytest.mark.parametrize(
    "case, message",
    [
        ("error", "the third step of the second process is too much"),
        ("evaluation", "no evaluation here"),
        ("killed", "another process of this run ended without a message"),
        ("folders", "all nodes need the same folder, on a file system that they share"),
        ("broken", None),
    ],
)
def test_all_processes_end_together(case, message, tmp_path):
    codes, logs, seconds = processes(case, tmp_path)
    if message is None:
        assert codes == [0, 0], logs
        assert len((tmp_path / "out" / "broken.txt").read_text().splitlines()) == 2
        return
    assert codes == [1, -9 if case == "killed" else 1], logs
    assert message in logs[0]
    assert case == "killed" or message in logs[1]
    assert not any("Traceback" in log for log in logs)
    assert seconds < 15


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes of torchrun by pgrep")
def test_a_rank_that_is_killed_is_started_again_and_the_run_is_as_if_it_had_not_been(tmp_path, monkeypatch):
    """torchrun's store outlives the restart: the new processes must not meet the addresses of the dead."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import faults

    assert faults.wait(faults.start(tmp_path / "undisturbed", processes=2)) == [0, 0]
    folder = tmp_path / "killed"
    folder.mkdir()
    trial = faults.rank_kills(folder, tmp_path / "undisturbed", random.Random(0), 1)
    assert trial == {"kills": 1, "exit codes": [0], "difference": ""}, (folder / "log").read_text()[-2000:]
