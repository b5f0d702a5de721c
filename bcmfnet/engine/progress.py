"""A progress bar on a terminal; nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """What a loop reports to. `visible` says whether a person sees it."""

    visible = False

    def advance(self) -> None:
        """One more unit of work is done."""

    def note(self, text: str) -> None:
        """Show a text at the end of the bar."""


@contextmanager
def progress_bar(label: str, total: int, done: int = 0) -> Iterator[Progress]:
    """Show a bar on standard error while the code inside runs, if standard error is a terminal."""
    if not sys.stderr.isatty():
        yield Progress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total, completed=done, note="")

        class Visible(Progress):
            visible = True

            def advance(self) -> None:
                bar.advance(task)

            def note(self, text: str) -> None:
                bar.update(task, note=text)

        yield Visible()
