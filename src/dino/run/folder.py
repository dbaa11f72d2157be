"""A run folder belongs to one run at a time, and every process of the run sees the same one."""

import contextlib
import fcntl
import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from dino.machine import distributed

_WAIT = 10.0  # Seconds that a network file system may take to show a new file to another machine.


@contextlib.contextmanager
def own(out: Path) -> Iterator[None]:
    """Holds the run folder for this run, by a lock that ends with the process that holds it, however it ends.

    Raises:
        ValueError: another run is at work there, or some process sees another folder than the first.
    """
    if not distributed.is_main():
        _same_folder(out, "")
        yield
        return
    existed = out.exists()
    out.mkdir(parents=True, exist_ok=True)
    path = out / ".lock"
    with open(path, "a+") as file:
        try:
            # A record lock: unlike flock, worker processes do not inherit it, and network file systems know it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"another run is at work in --out {out} ({file.read().partition(' as ')[0] or 'unknown'}): "
                "wait for it, or use another --out"
            ) from None
        token = uuid.uuid4().hex
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} as {token}")
        file.flush()
        try:
            _same_folder(out, token)
            yield
        finally:
            if not existed and list(out.iterdir()) == [path]:  # Nothing came of it.
                path.unlink()
                out.rmdir()


def _same_folder(out: Path, token: str) -> None:
    token, *_ = distributed.gather(token)
    if distributed.world_size() == 1:
        return
    end = time.monotonic() + _WAIT
    while not (seen := _reads(out / ".lock", token)) and time.monotonic() < end:
        time.sleep(0.2)
    hosts = distributed.gather((seen, socket.gethostname()))
    missing = [f"process {rank} on {host}" for rank, (sees, host) in enumerate(hosts) if not sees]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} does not see what process 0 on {hosts[0][1]} wrote to --out {out}: "
            "all nodes need the same folder, on a file system that they share"
        )


def _reads(path: Path, token: str) -> bool:
    with contextlib.suppress(OSError):
        return path.read_text().endswith(token)
    return False
