"""Bars for what takes long."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

notices = Console(stderr=True, highlight=False, soft_wrap=True)
"""Where progress and remarks go: not into the tables."""


@contextmanager
def step(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar; the function that is yielded takes how much more is done.

    Where there is no terminal, a line says what begins.
    """
    if not notices.is_terminal:
        notices.print(f"{what} …")
        yield lambda _: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=notices, transient=True) as bars:
        task = bars.add_task(what, total=total)
        yield lambda done: bars.advance(task, done)
