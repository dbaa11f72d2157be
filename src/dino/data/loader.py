"""From a source to batches on the device: decoded once and kept, or streamed from worker processes."""

import contextlib
import functools
import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dino.config import DataConfig
from dino.data.decode import BrokenImage, Canvas, to_canvas
from dino.data.sources import Source
from dino.machine import device as hardware
from dino.machine.files import printable
from dino.machine.progress import ahead, tracked
from dino.machine.randomness import generator

_FEW = 512  # Images that are decoded sooner than a worker process starts.
_HUNG = 600.0  # Seconds without a batch after which worker processes count as hanging.
_LOSSES = 3  # Times in a row that they are replaced.
_log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """``indices`` are those of the images in the canvas (on the CPU), also where one stands in for a broken file."""

    canvas: Canvas
    indices: Int64[Tensor, " b"]


def rows_of_step(
    step: int, count: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
) -> Int64[Tensor, " r"]:
    """Which of ``count`` images process ``rank`` works on in ``step``: its rows of the global batch.

    An epoch is a permutation drawn from (seed, epoch), cut into batches; the last few images that fill none are left
    out. So the rows depend on nothing that happened before, and all processes' rows together on neither their number.

    >>> both = [rows_of_step(5, 10, 4, seed=0, rank=r, world_size=2) for r in (0, 1)]
    >>> torch.equal(torch.cat(both), rows_of_step(5, 10, 4, seed=0))
    True
    """
    epoch, place = divmod(step, count // batch_size)
    share = batch_size // world_size
    start = place * batch_size + rank * share
    return _order(count, seed, epoch)[start : start + share]


@functools.lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=generator(seed, "order", epoch))


class Loader:
    """Batches of a source for training, by step: the same for every start and, put together, every number of processes.

    A broken file is replaced by the next good image in index order and noted in ``broken`` (name -> reason).

    Raises:
        ValueError: fewer images than a batch, a batch that does not divide over the processes, or (also later, from
            ``batches``) a larger share of broken files than ``data.max_broken``.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        *,
        data: DataConfig,
        seed: int,
        device: torch.device | str,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size > len(source):
            raise ValueError(
                f"--optim.batch-size {batch_size} is more than the {len(source)} images there are to train on"
            )
        if batch_size % world_size:
            raise ValueError(f"--optim.batch-size {batch_size} does not divide over {world_size} processes")
        self.steps_per_epoch = len(source) // batch_size
        self.broken: dict[str, str] = {}
        self.cache = (
            _choose_cache(source, data, torch.device(device), world_size) if data.cache == "auto" else data.cache
        )
        self._source, self._data, self._device, self._processes = source, data, torch.device(device), world_size
        self._rows = functools.partial(
            rows_of_step, count=len(source), batch_size=batch_size, seed=seed, rank=rank, world_size=world_size
        )
        if self.cache != "none":
            self._decode_all(quiet=rank > 0)

    def batches(self, start_step: int, end_step: int) -> Iterator[Batch]:
        """The batches of steps ``start_step`` to ``end_step - 1``, this process's rows, on the device.

        Call it once for a whole run: worker processes live as long as the iterator.
        """
        steps = range(start_step, end_step)
        if self.cache == "none":
            reader = _Reader(self._source, self._data.canvas, self._limit)
            rows = (self._rows(step).tolist() for step in steps)
            for read in _stream(reader, rows, self._data.workers, self._device, self._processes):
                self.note(read.broken)
                yield Batch(read.canvas.to(self._device), read.indices)
        elif self.cache == "ram" and self._device.type == "cuda":
            for batch in ahead(lambda step: self._from_cache(step, pin=True), steps):
                yield Batch(batch.canvas.to(self._device), batch.indices)
        else:
            yield from map(self._from_cache, steps)

    @property
    def _limit(self) -> float:
        return self._data.max_broken * len(self._source)

    def remember(self, broken: dict[str, str]) -> None:
        """What an earlier part of the run found broken; a cache has looked at every file anew."""
        if self.cache == "none":
            self.note(broken)

    def note(self, broken: dict[str, str]) -> None:
        """Counts broken files, those of other processes too.

        Raises:
            ValueError: together they are more than ``data.max_broken`` allows.
        """
        self.broken.update(broken)
        if len(self.broken) > self._limit or len(self.broken) == len(self._source):
            examples = "; ".join(f"{name} ({reason})" for name, reason in list(self.broken.items())[:3])
            raise ValueError(
                f"{len(self.broken)} of {len(self._source)} images ({len(self.broken) / len(self._source):.1%}) cannot "
                f"be read, more than --data.max-broken {self._data.max_broken} allows: {examples}"
            )

    def _decode_all(self, quiet: bool) -> None:
        """Fills the cache: one canvas of all images, and for every index that of the image that is used for it."""
        chunks = torch.arange(len(self._source)).split(32)  # A task each: less than a chunk, and the lock costs more.
        reader = _Reader(self._source, self._data.canvas, limit=None)
        images: dict[int, Tensor] = {}
        with ThreadPoolExecutor(_cores()) as pool:  # Decoders release the interpreter's lock.
            results = pool.map(lambda chunk: reader.load(chunk.tolist()), chunks)
            for loaded, broken in tracked(results, "decoding images", len(chunks), shown=not quiet):
                images.update(loaded)
                self.broken.update(broken)
        self.note({})
        good = torch.tensor(sorted(images))
        following = torch.searchsorted(good, torch.arange(len(self._source))) % len(good)
        self._stand_in, self._place = good[following], following
        canvas = _fitting_canvas([images.pop(i) for i in good.tolist()])
        self._canvas = canvas.to(self._device) if self.cache == "device" else canvas

    def _from_cache(self, step: int, pin: bool = False) -> Batch:
        rows = self._rows(step)
        place, pixels = self._place[rows], self._canvas.pixels
        pixels = pixels.index_select(0, hardware.upload(place, pixels.device))
        return Batch(Canvas(pixels.pin_memory() if pin else pixels, self._canvas.sizes[place]), self._stand_in[rows])


def iterate_once(
    source: Source,
    batch_size: int,
    *,
    prepare: Callable[[Tensor], Tensor] | None = None,
    workers: int = -1,
    device: torch.device | str = "cpu",
    broken: dict[str, str] | None = None,
) -> Iterator[Batch]:
    """Every image exactly once in order, the last batch smaller. Broken ones are left out and noted in ``broken``.

    Each is decoded as large as it is; ``prepare`` makes of it what goes into the batch, in the process that read it.
    """
    rows = (chunk.tolist() for chunk in torch.arange(len(source)).split(batch_size))
    reader = _Reader(source, None, limit=None, prepare=prepare)
    for read in _stream(reader, rows, workers, torch.device(device), processes=1):
        if broken is not None:
            broken.update(read.broken)
        if len(read.indices):
            yield Batch(read.canvas.to(device), read.indices)


class _Read(NamedTuple):
    canvas: Canvas
    indices: Tensor
    broken: dict[str, str]


class _Reader(Dataset):
    """Reads the images of a list of indices; runs in worker processes, so it keeps no state.

    ``limit`` None: broken images are left out. A number: each is replaced by the next good one, until more than that
    many are broken (what is returned then is incomplete, and whoever gets it stops the run).
    """

    def __init__(
        self,
        source: Source,
        max_side: int | None,
        limit: float | None,
        prepare: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.source, self.max_side, self.limit, self.prepare = source, max_side, limit, prepare

    def __getitem__(self, indices: list[int]) -> _Read:
        images, broken = self.load(indices)
        return _Read(
            _fitting_canvas([image for _, image in images]), torch.tensor([i for i, _ in images]).long(), broken
        )

    def load(self, indices: list[int]) -> tuple[list[tuple[int, Tensor]], dict[str, str]]:
        images: list[tuple[int, Tensor]] = []
        broken: dict[str, str] = {}
        count = len(self.source)
        for wanted in indices:
            for i in range(wanted, wanted + 1 if self.limit is None else wanted + count):
                try:
                    image = self.source.load(i % count, self.max_side)
                    images.append((i % count, self.prepare(image) if self.prepare else image))
                    break
                except BrokenImage as error:
                    broken[self.source.name(i % count)] = str(error)
                if self.limit is not None and (len(broken) > self.limit or len(broken) == count):
                    return images, broken
        return images, broken


def _fitting_canvas(images: list[Tensor]) -> Canvas:
    height, width = (max((image.shape[axis] for image in images), default=1) for axis in (1, 2))
    return to_canvas(images, height, width)


class WorkersLost(RuntimeError):
    """Processes that read images were killed, or hung, again and again."""


def _stream(
    reader: _Reader, rows: Iterable[list[int]], workers: int, device: torch.device, processes: int
) -> Iterator[_Read]:
    """Reads every list of indices, in order. When a worker process is killed or hangs, all are replaced, and what had
    been given to them is given again.

    Raises:
        WorkersLost: that happened several times without a batch in between.
    """
    if workers < 0:
        workers = 0 if len(reader.source) <= _FEW else _auto_workers(device, processes)
    rows = iter(rows)
    given: deque[list[int]] = deque()  # And not yet back.
    losses = 0
    while True:
        batches = iter(
            DataLoader(
                reader,
                batch_size=None,
                sampler=_and_remembered(rows, given),
                num_workers=workers,
                pin_memory=device.type == "cuda",
                worker_init_fn=_leave_stopping_to_the_parent,
                generator=torch.Generator(),  # Or it draws from the global one, and reading would change the run.
                timeout=_HUNG if workers else 0,
            )
        )
        # torch would raise out of a signal handler, in the middle of a training step; here the next batch says it.
        if workers and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        own = set(multiprocessing.active_children())
        try:
            for read in batches:
                given.popleft()
                losses = 0
                yield read
            return
        except RuntimeError as error:
            if not str(error).startswith("DataLoader"):
                raise
            losses += 1
            what = f"a process that reads images {'hung' if 'timed out' in str(error) else 'was killed'}"
            names = ", ".join(printable(reader.source.name(i)) for i in given[0][:3])
            if losses > _LOSSES:
                raise WorkersLost(
                    f"{what} {losses} times in a row at {names}, ...: if memory ran out, take fewer processes "
                    "(--data.workers) or smaller images (--data.canvas)"
                ) from error
            _log.warning("%s at %s, ...: it is replaced", what, names)
            for worker in own & set(multiprocessing.active_children()):
                worker.kill()  # A process that hangs would not end otherwise.


def _and_remembered(rows: Iterator[list[int]], given: deque[list[int]]) -> Iterator[list[int]]:
    """First what had been given before and is not back, then the rest, each noted in ``given``."""
    yield from tuple(given)
    for row in rows:
        given.append(row)
        yield row


def _leave_stopping_to_the_parent(_worker: int) -> None:
    """Ctrl-C and a scheduler's signals reach every process of a run. The first one saves a checkpoint; if its workers
    died of the signal, it could not."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)


def _auto_workers(device: torch.device, processes: int) -> int:
    """A GPU is fed by all cores; on the CPU the training step itself needs them, and decoding takes few."""
    if device.type == "cpu":
        return min(2, max(1, _cores() // 4))
    return min(16, max(1, _cores() // int(os.environ.get("LOCAL_WORLD_SIZE", processes)) - 1))


def _choose_cache(source: Source, data: DataConfig, device: torch.device, processes: int) -> str:
    """``device`` or ``ram`` where all images, as large as the largest of a sample, fill at most a quarter of it. On
    their way to the device they are in RAM, twice while they are put together."""
    sizes = []
    for i in range(0, len(source), max(1, len(source) // 64)):
        with contextlib.suppress(BrokenImage):
            sizes.append(source.size(i, data.canvas))
    height, width = (max(sides) for sides in zip(*(sizes or [(data.canvas, data.canvas)]), strict=True))
    once, free = len(source) * source.channels * height * width, _free_memory()
    if device.type == "cuda" and 4 * once <= torch.cuda.mem_get_info(device)[0] and 2 * once * processes <= free:
        return "device"
    return "ram" if 4 * once * processes <= free else "none"


def _free_memory() -> int:
    """Bytes of RAM that can be had, also within a container's limit."""
    with contextlib.suppress(OSError, ValueError):
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
        with contextlib.suppress(OSError, ValueError):
            limit, used = (int(Path(f"/sys/fs/cgroup/memory.{kind}").read_text()) for kind in ("max", "current"))
            free = min(free, limit - used)
        return free
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # macOS does not say what is free.


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
