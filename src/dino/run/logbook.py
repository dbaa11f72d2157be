"""What a run writes while it goes on: metrics.jsonl, TensorBoard, and the lines on the screen."""

import json
import math
import os
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


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
        partial = self._path.with_name("metrics.jsonl.partial")
        partial.write_text("".join(kept))
        os.replace(partial, self._path)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line of ``metrics.jsonl`` (a number that is not finite becomes null) and the same to TensorBoard."""
        if not self._main:
            return
        finite = {k: float(f"{v:.10g}") if math.isfinite(v) else None for k, v in values.items()}
        with open(self._path, "a") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)

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
        with open(self._folder / "warnings.txt", "a") as file:
            file.write(text + "\n")

    def close(self) -> None:
        if self._main:
            self._progress.stop()
            self._tensorboard.close()
