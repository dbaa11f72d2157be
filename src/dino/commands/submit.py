"""``dino submit``: another command of dino as a job of Slurm, which goes on where it was when it is preempted."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from dino.commands.shared import Command


@dataclass(frozen=True)
class Submit(Command):
    """Sends a command to a Slurm cluster. At preemption or the time limit it is saved, and requeued.

    `dino submit --nodes 2 --gpus 8 --partition gpu --hours 48 -- pretrain DATA --out RUN`, or three seeds as one array:
    `dino submit --array 0 1 2 -- pretrain DATA --out runs/{} --run.seed {}`. Needs the extra `slurm`.
    """

    command: tyro.conf.Positional[tuple[str, ...]] = ()
    """After `--`: the command, as it would follow `dino`."""
    logs: Path = Path("slurm")
    """Folder for the job's output, on a file system that all nodes share."""
    nodes: int = 1
    gpus: int = 1
    """GPUs a node; a process each. 0: one process a node, on the CPU."""
    cpus: int = 8
    """CPU cores a process."""
    hours: float = 24.0
    """Time limit; the job is saved some minutes before it, and requeued."""
    partition: str | None = None
    comment: str | None = None
    name: str = "dino"
    array: tuple[str, ...] = ()
    """A job for each of these values, as one array: the value stands wherever the command says `{}`."""
    local: bool = False
    """Run it on this machine by submitit's local executor, and wait for it."""

    def run(self) -> dict[str, Any]:
        try:
            import submitit
        except ImportError as error:
            raise ValueError("dino submit needs submitit: pip install 'dino-ssl[slurm]'") from error
        for flag, value, least in (("nodes", self.nodes, 1), ("gpus", self.gpus, 0), ("cpus", self.cpus, 1)):
            if value < least:
                raise ValueError(f"--{flag} {value} is not allowed: at least {least}")
        import torch

        if self.local and self.gpus > max(there := torch.cuda.device_count(), 1):  # 1, the default, harms nothing.
            raise ValueError(f"--gpus {self.gpus} is not allowed with --local: this machine has {there} GPUs")
        if not 0 < self.hours < float("inf"):
            raise ValueError(f"--hours {self.hours} is not allowed: above 0")
        if not self.command:
            raise ValueError("no command given: dino submit [flags] -- pretrain DATA --out RUN")
        if self.array and not any("{}" in word for word in self.command):
            raise ValueError("--array has values, but the command has no {} for them to stand in: --out runs/{}")
        executor = submitit.AutoExecutor(folder=self.logs, cluster="local" if self.local else None)
        executor.update_parameters(
            name=self.name,
            nodes=self.nodes,
            tasks_per_node=max(self.gpus, 1),
            gpus_per_node=self.gpus,
            cpus_per_task=self.cpus,
            timeout_min=max(1, round(60 * self.hours)),
            **{f"slurm_{key}": value for key in ("partition", "comment") if (value := getattr(self, key))},
        )
        commands = [[word.replace("{}", value) for word in self.command] for value in self.array] or [self.command]
        with executor.batch():  # One array, where there are several.
            jobs = [executor.submit(Job(command)) for command in commands]
        if self.local:
            for job in jobs:
                job.wait()
            if failed := [str(job.paths.stderr) for job in jobs if job.exception() is not None]:
                raise ValueError(f"{len(failed)} of {len(jobs)} jobs failed; their output is in {', '.join(failed)}")
        if not self.array:
            return {"job": jobs[0].job_id, "log": str(jobs[0].paths.stdout)}
        return {"jobs": [job.job_id for job in jobs], "logs": [str(job.paths.stdout) for job in jobs]}


class Job:
    """What a process of the job does: the command, in a process of its own, which a signal from Slurm asks to stop."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = list(command)
        self._pid = 0

    def __call__(self) -> None:
        from submitit.helpers import TorchDistributedEnvironment

        place = TorchDistributedEnvironment()
        if place.world_size > 1:
            place.export(set_cuda_visible_devices=False)
        process = subprocess.Popen([sys.executable, "-m", "dino", *self._command])
        self._pid = process.pid
        while process.poll() is None:
            time.sleep(0.2)
        if process.returncode:
            raise RuntimeError(f"dino {' '.join(self._command)} ended with exit code {process.returncode}")

    def checkpoint(self) -> Any:
        """submitit calls this in its signal handler: the command is saved, and the same one submitted again."""
        from submitit.helpers import DelayedSubmission

        try:
            os.kill(self._pid, signal.SIGTERM)
            # Not by ``process.wait``: this may have interrupted its ``poll``, which holds a lock.
            while os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                time.sleep(0.05)
        except (ProcessLookupError, ChildProcessError):
            pass
        return DelayedSubmission(Job(self._command))
