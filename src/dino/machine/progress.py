"""Working through a long list: with a bar on the terminal, and with the next items made ahead."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")
Made = TypeVar("Made")


def tracked(items: Iterable[T], what: str, total: int | None = None, shown: bool = True) -> Iterable[T]:
    """The items, with a bar that disappears at the end: on stderr, which is not for results, and only on a terminal."""
    console = Console(stderr=True)
    if not (shown and console.is_terminal):
        return items
    return track(items, what, total=total, console=console, transient=True)


def ahead(make: Callable[[T], Made], items: Iterable[T], count: int = 2, threads: int = 1) -> Iterator[Made]:
    """``make(item)`` for every item, in order; up to ``count`` are made ahead in threads, while one is worked on.

    >>> list(ahead(lambda i: i * i, range(4)))
    [0, 1, 4, 9]
    """
    pool = ThreadPoolExecutor(threads)
    try:
        pending: deque[Future[Made]] = deque()
        for item in items:
            pending.append(pool.submit(make, item))
            if len(pending) > count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)  # When the reader stops early, what has not begun never does.
