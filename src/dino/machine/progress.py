"""Progress on the terminal."""

from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def tracked(items: Iterable[T], what: str, total: int | None = None, shown: bool = True) -> Iterable[T]:
    """The items, with a bar that disappears at the end: on stderr, which is not for results, and only on a terminal."""
    console = Console(stderr=True)
    if not (shown and console.is_terminal):
        return items
    return track(items, what, total=total, console=console, transient=True)
