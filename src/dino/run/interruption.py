"""Being asked to stop: the run ends after the step in hand, with a checkpoint."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: what a scheduler can requeue on.

T = TypeVar("T")


class Stopped(Exception):
    """A run was asked to stop and is saved: the same call goes on from there. ``step``: steps done."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class _BrokenOff(BaseException):
    """What the handler raises where work may be broken off; not an Exception, which image readers catch."""


class Interruption:
    """Whether the run was asked to stop."""

    def __init__(self) -> None:
        self.asked = False
        self._since = 0.0
        self._may_break_off = False

    def breaks_off(self, work: Callable[[], T]) -> T | None:
        """What ``work`` gives; None where it was left because the run is asked to stop, and its result not needed."""
        try:
            self._may_break_off = True
            if self.asked:
                return None
            result = work()
            self._may_break_off = False
            return result
        except _BrokenOff:
            return None
        except Exception:  # Another process left the work, and broke an exchange with this one.
            if self.asked:
                return None
            raise
        finally:
            self._may_break_off = False

    def note(self, number: int, _frame: Any = None) -> None:
        if self.asked and number == signal.SIGINT and time.monotonic() > self._since + 1:
            raise KeyboardInterrupt  # Sooner it is the same Ctrl-C, which torchrun passes on.
        if not self.asked:
            self.asked, self._since = True, time.monotonic()
        if self._may_break_off:
            self._may_break_off = False
            raise _BrokenOff


@contextmanager
def interruption() -> Iterator[Interruption]:
    """SIGTERM and SIGUSR1 (a scheduler's preemption), SIGINT (Ctrl-C) and SIGHUP (a terminal that closes) ask the run
    to stop; a second Ctrl-C ends it at once. A signal that is ignored (SIGHUP under nohup) stays ignored."""
    asked = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    old = {s: h for s in SIGNALS if (h := signal.getsignal(s)) not in (signal.SIG_IGN, None)}
    for s in old:
        signal.signal(s, asked.note)
    try:
        yield asked
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)
