"""Randomness is a function, not a state: whatever is random in step ``s`` comes from ``generator(seed, purpose, s)``.

So a resumed run continues bit for bit with no generator state in the checkpoint, and one or eight processes draw the
same numbers.
"""

import contextlib
import hashlib
from collections.abc import Iterator

import torch


def derive_seed(seed: int, purpose: str, step: int = 0) -> int:
    """A 63-bit seed that differs for every (seed, purpose, step); the same on every machine."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, purpose: str, step: int = 0) -> torch.Generator:
    """A CPU generator seeded by (seed, purpose, step).

    Always on the CPU: parameters are few, and CUDA's and MPS's generators give other numbers.

    >>> one, same = (torch.rand(3, generator=generator(0, "crops", 7)) for _ in range(2))
    >>> torch.equal(one, same)
    True
    """
    return torch.Generator().manual_seed(derive_seed(seed, purpose, step))


@contextlib.contextmanager
def seeded(seed: int, purpose: str, step: int = 0) -> Iterator[None]:
    """For libraries that draw from torch's own generators: those are seeded by (seed, purpose, step) meanwhile, and
    afterwards as they were.

    >>> state = torch.get_rng_state()
    >>> with seeded(0, "weights"):
    ...     _ = torch.rand(3)
    >>> torch.equal(torch.get_rng_state(), state)
    True
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive_seed(seed, purpose, step))
        yield
