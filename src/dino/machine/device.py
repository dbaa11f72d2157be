"""The machine: which device, which precision, how the CPU allocates, how much memory was used."""

import contextlib
import ctypes
import importlib.util
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


def choose_device(name: str) -> torch.device:
    """``auto``: CUDA when there is one, then MPS, then the CPU.

    Raises:
        ValueError: the named device is not there.
    """
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(device for device in ("cuda", "mps", "cpu") if has[device])
    if not has.get(name, False):
        raise ValueError(f"no device {name!r}: this machine has {', '.join(d for d in has if has[d])}")
    return torch.device(name)


def choose_precision(device: torch.device, choice: str) -> str:
    """``float32`` or ``bfloat16``; ``auto`` means bfloat16 on CUDA cards and on CPUs that have the instructions
    (AVX512-BF16 or AMX): without them it is slower than float32."""
    if choice == "auto":
        on_card = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if on_card or (device.type == "cpu" and _multiplies_bfloat16()) else "float32"
    return choice


def _multiplies_bfloat16() -> bool:
    """Whether this CPU says so; torch's own question is not public, so its absence means no."""
    questions = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(question is not None and question() for question in questions)


def autocast(device: torch.device, choice: str) -> torch.autocast:
    """The autocast context of ``choose_precision``."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=choose_precision(device, choice) == "bfloat16")


def compiles(device: torch.device, choice: str) -> bool:
    """Whether networks are compiled (torch.compile): ``auto`` means on CUDA, where Triton is installed.

    Raises:
        ValueError: ``on``, but torch has no compiler for this device here.
    """
    triton = importlib.util.find_spec("triton") is not None
    if choice == "on" and device.type == "cuda" and not triton:
        raise ValueError("--run.compile on needs Triton: pip install triton, or --run.compile off")
    return choice == "on" or (choice == "auto" and device.type == "cuda" and triton)


def overlapped(items: Iterator[Item], device: torch.device) -> Iterator[Item]:
    """The same items (tensors in tuples and lists). On CUDA each is made on a stream of its own, while the device
    still works on the one before."""
    if device.type != "cuda":
        yield from items
        return
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))  # Where a cache of images may still be on its way.
    while True:
        with torch.cuda.stream(side):
            item = next(items, None)
        if item is None:
            return
        main = torch.cuda.current_stream(device)
        main.wait_stream(side)
        for tensor in _tensors(item):
            tensor.record_stream(main)  # So that its memory is not given away while ``main`` reads it.
        yield item


def upload(host: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting for it: a copy from ordinary memory would."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def _tensors(item: Any) -> Iterator[Tensor]:
    if isinstance(item, Tensor):
        if item.is_cuda:
            yield item
    elif isinstance(item, tuple | list):
        for part in item:
            yield from _tensors(part)


def prepare(device: torch.device, threads: int = 0) -> None:
    """For the whole process, before the first large tensor: TF32 for products that stay in float32 on CUDA, and the
    number of threads; on Linux, memory that stays with the process.

    glibc gives large blocks back to the kernel at every free, and each training step then pays for the page faults
    again.
    """
    if threads:
        torch.set_num_threads(threads)
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # Whoever set it by torch's newer name (fp32_precision) keeps it.
            torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("high")
    if device.type == "cpu" and sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none.
        if mallopt is not None:
            m_trim_threshold, m_mmap_threshold = -1, -3
            mallopt(m_mmap_threshold, 1 << 30)
            mallopt(m_trim_threshold, 1 << 30)


@contextlib.contextmanager
def prepared(device: torch.device, threads: int = 0) -> Iterator[None]:
    """``prepare`` for as long as a run takes: precision and threads are the caller's own again afterwards."""
    products = torch.backends.cuda.matmul
    before, named, chosen = torch.get_num_threads(), products.fp32_precision, None
    with contextlib.suppress(RuntimeError):
        chosen = torch.get_float32_matmul_precision()
    prepare(device, threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if chosen is not None:
            torch.set_float32_matmul_precision(chosen)
            products.fp32_precision = named


def peak_rss_gib() -> float:
    """Largest resident memory of this process so far, in GiB."""
    with contextlib.suppress(OSError, StopIteration):  # Of a child, getrusage counts what its parent held before.
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
