"""A progress bar on a terminal; nothing elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


class Progress:
    """What a loop reports to. `visible` says whether a person sees it."""

    visible = False

    def advance(self) -> None:
        """One more unit of work is done."""

    def note(self, text: str) -> None:
        """Show a text at the end of the bar."""


@contextlib.contextmanager
def progress_bar(label: str, total: int | None, done: int = 0) -> Iterator[Progress]:
    """Show a bar on standard error while the code inside runs, if that is a terminal; a total of None is unknown."""
    if not _on_terminal():
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
    bar = RichProgress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(label, total=total, completed=done, note="")

    class Visible(Progress):
        visible = True

        def advance(self) -> None:
            bar.advance(task)

        def note(self, text: str) -> None:
            bar.update(task, note=text)

    bar.start()
    try:
        yield Visible()
    finally:
        with contextlib.suppress(OSError):  # the terminal may have been closed meanwhile
            bar.stop()


def _on_terminal() -> bool:
    """Whether standard error is a terminal that this process may draw on: of several processes the leading one may.

    A process started without one has None or a closed file.
    """
    leads = os.environ.get("RANK", "0") == "0"
    return leads and sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()
