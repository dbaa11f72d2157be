"""What a run writes while it goes on: metrics.jsonl, TensorBoard, and the lines on the screen."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from dino.machine.files import write_text


class Stopwatch:
    """How fast steps are done since the last look, and which share of that time was spent waiting for images."""

    def __init__(self, step: int) -> None:
        self.restart(step)

    def restart(self, step: int) -> None:
        self._step, self._waited, self._since = step, 0.0, time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def lap(self, step: int, batch_size: int) -> dict[str, float]:
        """The numbers up to ``step``; counts from there on."""
        seconds = time.perf_counter() - self._since
        numbers = {
            "images_per_second": (step - self._step) * batch_size / seconds,
            "data_wait": self._waited / seconds,
        }
        self.restart(step)
        return numbers


class Logbook:
    """Writes metrics and shows progress; in any process but the first it does nothing.

    Args:
        folder: the run folder.
        total_steps: length of the run.
        start_step: steps already done; later lines of an earlier, interrupted run are dropped from ``metrics.jsonl``.
        quiet: writes files only.
    """

    def __init__(
        self, folder: Path, total_steps: int, start_step: int = 0, main: bool = True, quiet: bool = False
    ) -> None:
        self._main = main
        self.console = Console(stderr=True, quiet=quiet or not main)
        self._folder = folder
        self._path = folder / "metrics.jsonl"
        self._steps = total_steps
        self._unwritten = ""  # Lines that found the disk full.
        self._results: dict[str, Any] = {}  # The newest line of an evaluation.
        self._complained = False
        if not main:
            return
        if start_step:
            self._keep_until(start_step)
        else:
            self._path.write_text("")
            (folder / "warnings.txt").unlink(missing_ok=True)
        # Imported here: TensorBoard takes a second to import.
        from torch.utils.tensorboard.writer import SummaryWriter

        self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            disable=quiet or not sys.stderr.isatty(),
        )
        self._task = self._progress.add_task("pretrain", total=total_steps, completed=start_step, text="")
        self._progress.start()
        self._next_line = 0.0

    def _keep_until(self, step: int) -> None:
        """A resumed run repeats the steps after its checkpoint: their old lines go."""
        kept = []
        for line in self._path.read_text().splitlines() if self._path.exists() else []:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # The line that was being written when the run died.
            if entry["step"] <= step:
                kept.append(line + "\n")
                self._remember(entry)
        write_text(self._path, "".join(kept))

    def _remember(self, entry: dict[str, Any]) -> None:
        if any(name.startswith(("knn_", "anchor")) for name in entry):
            self._results = entry

    def evaluation(self, step: int) -> dict[str, Any]:
        """The results (k-NN, anchor) of the network after ``step`` steps, as written; empty when there are none."""
        return {k: v for k, v in self._results.items() if k != "step"} if self._results.get("step") == step else {}

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line of ``metrics.jsonl`` (a number that is not finite becomes null) and the same to TensorBoard."""
        if not self._main:
            return
        entry = {"step": step} | {k: float(v) if math.isfinite(v) else None for k, v in values.items()}
        self._remember(entry)
        self._unwritten += json.dumps(entry) + "\n"
        try:
            self._append()
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        except OSError as error:
            if not self._complained:
                self.warn(f"step {step}: {self._path.name} cannot be written now ({error.strerror}); the run goes on")
            self._complained = True

    def _append(self) -> None:
        """Adds the lines not yet written: whole, or none of them."""
        size = self._path.stat().st_size
        try:
            with open(self._path, "a") as file:
                file.write(self._unwritten)
            self._unwritten, self._complained = "", False
        except OSError:
            os.truncate(self._path, size)
            raise

    def to_disk(self) -> None:
        """Before a checkpoint: the lines of its steps are on the disk when it is."""
        if self._main:
            with open(self._path, "a") as file:
                os.fsync(file.fileno())

    def progress(self, step: int, values: dict[str, float]) -> None:
        """Moves the bar; without a terminal, prints a line at most every ten seconds."""
        if not self._main:
            return
        text = (
            f"loss {values['loss']:.3f}  {values['images_per_second']:.0f} img/s  "
            f"data wait {values['data_wait']:.0%}  teacher entropy {values['teacher_entropy_ratio']:.2f} ln K"
        )
        self._progress.update(self._task, completed=step, text=text)
        if self._progress.disable and (time.monotonic() >= self._next_line or step == self._steps):
            self.say(f"step {step}/{self._steps}  {text}")
            self._next_line = time.monotonic() + 10

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A warning: on the screen and in ``warnings.txt``."""
        if not self._main:
            return
        self.console.print(f"warning: {text}", style="bold yellow", markup=False, highlight=False, soft_wrap=True)
        with contextlib.suppress(OSError), open(self._folder / "warnings.txt", "a") as file:
            file.write(text + "\n")

    def close(self) -> None:
        if self._main:
            self._progress.stop()
            with contextlib.suppress(OSError):  # A full disk, of which was said enough.
                self._append()
                self._tensorboard.close()
