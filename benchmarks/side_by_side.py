"""The harness: contenders in processes of their own take turns, A B C A B C, so that a drifting machine is fair to all.

``compare`` gives medians, ratios (round by round, then their median), and peak memory; ``save`` adds hardware and
versions.
"""

import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Make = Callable[[str, dict[str, Any]], Callable[[], int]]


def peak_mib(since_now: bool = False) -> float:
    """Largest resident memory of this process, so far or from now on (where the system says it, else NaN)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    if since_now:
        Path("/proc/self/clear_refs").write_text("5")
    return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10


def _serve(pipe: Connection, make: Make, name: str, options: dict[str, Any]) -> None:
    import torch

    if "fork" in multiprocessing.get_all_start_methods():  # For data workers, as in a process that was not spawned.
        multiprocessing.set_start_method("fork", force=True)
    cuda = options["device"] == "cuda"
    try:
        torch.manual_seed(0)
        run = make(name, options)
        before = peak_mib(since_now=True)
        pipe.send(None)
        while pipe.recv():  # Ends also when the parent is gone.
            if cuda:
                torch.cuda.synchronize()
            start, cpu_start = time.perf_counter(), time.process_time()
            images = run()
            if cuda:
                torch.cuda.synchronize()
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
            cuda_mib = torch.cuda.max_memory_allocated() / 2**20 if cuda else 0.0
            pipe.send((seconds, cpu_seconds, images, peak_mib(), peak_mib() - before, cuda_mib))
    except EOFError:
        return
    except Exception as error:  # Whatever it is, the parent says it.
        pipe.send(f"{type(error).__name__}: {error}")


class _Contender:
    """One contender's process."""

    def __init__(self, make: Make, name: str, options: dict[str, Any]):
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, child = context.Pipe()
        variable, _, value = name.partition("=")
        if value:
            os.environ[variable] = value
        self.process = context.Process(target=_serve, args=(child, make, name, options))
        self.process.start()
        child.close()  # So that a contender that dies is noticed.
        if value:
            del os.environ[variable]
        self._receive()

    def run(self) -> tuple[float, ...]:
        self.pipe.send(True)
        return self._receive()

    def stop(self) -> None:
        self.pipe.send(False)
        self.process.join()

    def _receive(self) -> Any:
        try:
            answer = self.pipe.recv()
        except EOFError:
            raise SystemExit(f"{self.name} died") from None
        if isinstance(answer, str):
            raise SystemExit(f"{self.name} failed: {answer}")
        return answer


def compare(
    make: Make, names: Sequence[str], options: dict[str, Any], runs: int, warmup: int = 1, alone: bool = False
) -> dict[str, dict[str, float]]:
    """Times ``make(name, options)()``, which does some work and returns the number of images, for every name.

    ``options["device"]`` says where. A name like ``VARIABLE=value`` sets that in its environment. ``alone``: a new
    process for every turn, for contenders whose workers would go on in the turns of others. Ratios are how many times
    as long as the first contender one takes.
    """
    rows: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    together = [] if alone else [_Contender(make, name, options) for name in names]
    for turn in range(runs if alone else warmup + runs):
        for i, name in enumerate(names):
            contender = _Contender(make, name, options) if alone else together[i]
            for _ in range(warmup if alone else 0):
                contender.run()
            row = contender.run()
            if alone:
                contender.stop()
            if alone or turn >= warmup:
                rows[name].append(row)
    for contender in together:
        contender.stop()
    return {name: _summary(rows[name], rows[names[0]]) for name in names}


def _summary(rows: list[tuple[float, ...]], first: list[tuple[float, ...]]) -> dict[str, float]:
    each = [row[0] / row[2] for row in rows]  # Seconds an image.
    ratios = [own / (row[0] / row[2]) for own, row in zip(each, first, strict=True)]
    numbers = {
        "images_per_second": 1 / statistics.median(each),
        "slowest": 1 / max(each),
        "fastest": 1 / min(each),
        "times_as_long": statistics.median(ratios),
        "cpu_ms_per_image": 1000 * statistics.median(row[1] / row[2] for row in rows),
        "peak_mib": rows[-1][3],
        "added_mib": rows[-1][4],  # To what it took to get ready.
        "cuda_peak_mib": rows[-1][5],
    }
    return {key: float(f"{value:.4g}") for key, value in numbers.items()}


def environment(device: str) -> dict[str, Any]:
    """Hardware and versions."""
    import torch

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    versions = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "timm", "lightly", "pillow"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": gpu,
        "versions": versions,
        "load": round(os.getloadavg()[0], 2),
        "date": time.strftime("%Y-%m-%d"),
    }


def available(names: Sequence[str]) -> list[str]:
    """The contenders that are installed; says which are not."""
    import importlib.util
    import sys

    if "lightly" in names and importlib.util.find_spec("lightly") is None:
        print("lightly is not installed and left out: pip install lightly", file=sys.stderr)
        return [name for name in names if name != "lightly"]
    return list(names)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Of a harness that resumes: a row a run, in a file of results."""
    return json.loads(file.read_text())["rows"] if file.exists() else []


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """Whole or not at all: a harness may be killed."""
    file.with_suffix(".partial").write_text(
        json.dumps({"environment": environment("cpu"), "rows": rows}, indent=1) + "\n"
    )
    os.replace(file.with_suffix(".partial"), file)


def show(title: str, contenders: dict[str, dict[str, float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("who", "images/s", "(range)", "times as long", "CPU ms an image", "peak MiB", title=title)
    for name, row in contenders.items():
        peak = row["cuda_peak_mib"] or row["peak_mib"]
        span = f"{row['slowest']:.4g}-{row['fastest']:.4g}"
        ratio, cpu = f"{row['times_as_long']:.2f}", f"{row['cpu_ms_per_image']:.3g}"
        table.add_row(name, f"{row['images_per_second']:.4g}", span, ratio, cpu, f"{peak:.0f}")
    Console(width=110).print(table)


def save(name: str, results: dict[str, Any], device: str) -> None:
    """Writes ``results/NAME-DEVICE.json``, in ``$OUT`` where that is set."""
    folder = Path(os.environ.get("OUT", RESULTS))
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**results, "environment": environment(device)}, indent=2)
    (folder / f"{name}-{device}.json").write_text(text + "\n")
