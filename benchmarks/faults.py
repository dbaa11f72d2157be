"""What a run survives: it is killed, stopped and starved in every way, and must end as if nothing had happened.

    python benchmarks/faults.py [--kills 100] [--rank-kills 20] [--worker-kills 20] [--sizes 20] [--only NAME ...]

Each trial is added to results/faults.json when it is done: started again, it goes on with what is missing. A run is as
good as undisturbed when all parameters, the optimizer and the center are equal bit for bit, and metrics.jsonl has the
same lines (but for times): no gap, none twice, none half. `disk full` mounts a small tmpfs and needs root.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from side_by_side import RESULTS, environment

STEPS = 60
FLAGS = [
    *("shapes:200x32", "--crops.global-size", "32", "--crops.local-size", "16", "--crops.local-count", "2"),
    *("--model.backbone", "vit_nano", "--model.patch-size", "8", "--model.drop-path", "0.1", "--model.out-dim", "256"),
    *("--model.no-use-bn", "--optim.length", f"{STEPS} steps", "--optim.batch-size", "8", "--run.device", "cpu"),
    *(
        "--run.log-every",
        "1",
        "--run.threads",
        "1",
        "--run.save-every",
        "2 steps",
        "--run.knn-every",
        "3 steps",
        "--quiet",
    ),
]
TIMES = ("images_per_second", "data_wait")


def start(out: Path, *flags: str, processes: int = 1) -> list[int]:
    """The command, in processes forked from this one (which has imported all: starting takes no time)."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(processes):
        if pid := os.fork():
            pids.append(pid)
            continue
        os.setpgid(0, 0)
        for number in (signal.SIGINT, signal.SIGHUP):  # Of a job in the background they are ignored, and would stay so.
            signal.signal(number, signal.SIG_DFL if number == signal.SIGHUP else signal.default_int_handler)
        if processes > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        from dino.commands import cli

        log = open(out.with_suffix(".log"), "a")  # noqa: SIM115
        os.dup2(log.fileno(), 2)
        os.dup2(log.fileno(), 1)
        try:
            code = cli.main(["pretrain", *FLAGS, *flags, "--out", str(out)])
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 70
        os._exit(code)
    return pids


def wait(pids: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def lines(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in found]


def difference(out: Path, reference: Path) -> str:
    """What differs from the undisturbed run; empty: nothing."""
    import tiny
    from dino.run import checkpoint

    try:
        a, b = (checkpoint.load_latest(each / "checkpoints") for each in (out, reference))
        if a is None:  # None found room on the disk.
            name = "backbone.safetensors"
            assert (out / name).read_bytes() == (reference / name).read_bytes(), name
            tiny.assert_same(lines(out), lines(reference))
            return ""
        assert b is not None
        a, b = ({k: v for k, v in each.items() if k not in ("config", "circumstances")} for each in (a, b))
        tiny.assert_same(a, b)
        tiny.assert_same(lines(out), lines(reference))
    except (AssertionError, OSError, ValueError) as error:
        return " ".join(f"{type(error).__name__} {error}".split())[:300]
    return ""


def steps_done(out: Path) -> int:
    with contextlib.suppress(OSError):
        return (out / "metrics.jsonl").read_bytes().count(b"\n")
    return 0


def wait_for_progress(out: Path, pids: list[int], more: int = 2) -> bool:
    """Until a few more lines are there; False when the run ended."""
    before = steps_done(out)
    while steps_done(out) < before + more:
        if os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        time.sleep(0.005)
    return True


def sigkills(folder: Path, reference: Path, draw: random.Random, processes: int, wanted: int) -> dict[str, Any]:
    """One run that is killed again and again, at most ``wanted`` times."""
    out, kills, during = folder / "run", 0, {"a save": 0, "an evaluation": 0}
    while True:
        pids = start(out, processes=processes)
        alive = wait_for_progress(out, pids) if kills < wanted else False
        if not alive:
            codes = wait(pids)
            break
        time.sleep(draw.random() * 0.25)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        wait(pids)
        kills += 1
        during["a save"] += any((out / "checkpoints").glob(".partial*"))
        step = max((int(p.stem[5:]) for p in (out / "checkpoints").glob("step_*")), default=0)
        during["an evaluation"] += step % 3 == 0 and not any(
            "knn_20_top1" in line for line in tail(out) if f'"step": {step},' in line
        )
    return {"kills": kills, "during": during, "exit codes": codes, "difference": difference(out, reference)}


def tail(out: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return (out / "metrics.jsonl").read_text().splitlines()
    return []


def worker_kills(folder: Path, reference: Path, draw: random.Random, wanted: int) -> dict[str, Any]:
    """One run that streams, whose loader workers are killed one by one."""
    out, kills = folder / "run", 0
    pids = start(out, "--data.cache", "none", "--data.workers", "2")
    while kills < wanted and wait_for_progress(out, pids, 1):
        children = subprocess.run(["pgrep", "-P", str(pids[0])], capture_output=True, text=True).stdout.split()
        if children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(draw.choice(children)), signal.SIGKILL)
                kills += 1
    codes = wait(pids)
    return {"kills": kills, "exit codes": codes, "difference": difference(out, reference)}


def rank_kills(folder: Path, reference: Path, draw: random.Random, wanted: int) -> dict[str, Any]:
    """torchrun with restarts, whose processes are killed one at a time."""
    out, kills = folder / "run", 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(wanted), "-m", "dino", "pretrain", *FLAGS, "--out", str(out)]
    with open(folder / "log", "w") as log:
        agent = subprocess.Popen(command, stderr=log, stdout=log)
        while kills < wanted and agent.poll() is None:
            before = steps_done(out)
            while steps_done(out) < before + 2 and agent.poll() is None:
                time.sleep(0.02)
            time.sleep(draw.random() * 0.25)
            children = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True).stdout.split()
            if children and agent.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(draw.choice(children)), signal.SIGKILL)
                    kills += 1
        code = agent.wait()
    return {"kills": kills, "exit codes": [code], "difference": difference(out, reference)}


def signals(folder: Path, reference: Path, draw: random.Random, name: str) -> dict[str, Any]:
    """Seconds from a signal to the end of the process, saved; its exit code, and that of the run after it."""
    out = folder / "run"
    pids = start(out)
    wait_for_progress(out, pids, draw.randint(5, 20))
    began = time.perf_counter()
    os.kill(pids[0], getattr(signal, name))
    codes = wait(pids)
    seconds = time.perf_counter() - began
    said = out.with_suffix(".log").read_text()
    codes += wait(start(out))
    return {"seconds": round(seconds, 3), "exit codes": codes, "said": said, "difference": difference(out, reference)}


def disk_full(folder: Path, reference: Path, kib: int) -> dict[str, Any]:
    """A run folder on a small disk; then the disk grows, and the same command ends the run."""
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(disk)], check=True)
    try:
        out = disk / "run"
        log = folder / "first"
        first = wait(start(out))
        with contextlib.suppress(OSError):
            shutil.copy(out.with_suffix(".log"), log)
        said = log.read_text() if log.exists() else ""
        kept = len(list((out / "checkpoints").glob("step_*"))) if out.exists() else 0
        left = len(list((out / "checkpoints").glob(".partial*"))) if out.exists() else 0
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        second = wait(start(out))
        different = difference(out, reference)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    return {
        "KiB": kib,
        "exit codes": first + second,
        "checkpoints when full": kept,
        "partial files": left,
        "traceback": "Traceback" in said,
        "difference": different,
    }


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--rank-kills", type=int, default=20)
    parser.add_argument("--worker-kills", type=int, default=20)
    parser.add_argument("--sizes", type=int, default=20)
    parser.add_argument("--only", nargs="*")
    args = parser.parse_args()
    import torch.utils.tensorboard  # noqa: F401

    import dino.commands.cli
    import dino.run.pretrain  # noqa: F401

    file = RESULTS / "faults.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    results["environment"] = environment("cpu")
    results["flags"] = " ".join(FLAGS)

    def add(name: str, number: int, trial: Callable[[Path, random.Random], dict[str, Any]]) -> None:
        done = results.setdefault(name, [])
        if number < len(done) or (args.only and name not in args.only):
            return
        with scratch() as folder:
            done.append(trial(folder, random.Random(f"{name} {number}")))
        print(name, number, done[-1], flush=True)
        file.write_text(json.dumps(results, indent=1))

    with scratch() as references:
        one, two = references / "one", references / "two"
        assert wait(start(one)) == [0]
        assert wait(start(two, processes=2)) == [0, 0]
        for processes, reference in ((1, one), (2, two)):
            name = f"SIGKILL of {processes} process{'es' if processes > 1 else ''}"
            number = 0
            while (left := args.kills - sum(trial["kills"] for trial in results.get(name, []))) > 0:
                number = len(results.get(name, []))
                add(name, number, lambda f, d, p=processes, r=reference, n=left: sigkills(f, r, d, p, min(n, 10)))
                if args.only and name not in args.only:
                    break
        for i, name in enumerate(("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") * 5):
            add("signals", i, lambda f, d, n=name: {"signal": n, **signals(f, one, d, n)})
        while (left := args.worker_kills - sum(t["kills"] for t in results.get("kills of a loader worker", []))) > 0:
            if args.only and "kills of a loader worker" not in args.only:
                break
            number = len(results.get("kills of a loader worker", []))
            add("kills of a loader worker", number, lambda f, d, n=left: worker_kills(f, one, d, n))
        for i in range(args.sizes if os.geteuid() == 0 else 0):
            add("disk full", i, lambda f, _, i=i: disk_full(f, one, 1000 + 60000 * i // max(args.sizes - 1, 1)))
        while (left := args.rank_kills - sum(t["kills"] for t in results.get("kills of a rank", []))) > 0:
            if args.only and "kills of a rank" not in args.only:
                break
            add(
                "kills of a rank",
                len(results.get("kills of a rank", [])),
                lambda f, d, n=left: rank_kills(f, two, d, min(n, 5)),
            )


if __name__ == "__main__":
    main()
