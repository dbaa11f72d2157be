"""The machine: which device, which precision, how the CPU allocates, how much memory was used."""

import ctypes
import resource
import sys

import torch


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


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bfloat16 autocast; ``auto`` means on CUDA only (on CPUs without the instructions it is slower than float32)."""
    enabled = precision == "bfloat16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def prepare(device: torch.device, threads: int = 0) -> None:
    """Once, before the first large tensor: TF32 for what stays in float32 on CUDA; on Linux, memory that stays with
    the process.

    glibc gives large blocks back to the kernel at every free, and each training step then pays for the page faults
    again.
    """
    if threads:
        torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    if device.type == "cpu" and sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none.
        if mallopt is not None:
            m_trim_threshold, m_mmap_threshold = -1, -3
            mallopt(m_mmap_threshold, 1 << 30)
            mallopt(m_trim_threshold, 1 << 30)


def peak_rss_gib() -> float:
    """Largest resident memory of this process so far, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
