"""Live progress on the terminal's error stream: stages, trials, best objective, time left."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from orchestrate.redaction import redact


class StudyProgress:
    """One bar over all stages; lines for trials that ended. On a pipe it prints the lines only.

    Args:
        title: what is being done.
        stages: how many stages there will be at most.
        quiet: show nothing at all.
    """

    def __init__(self, title: str, stages: int, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("stages · {task.fields[note]} ·"),
            TimeElapsedColumn(),
            TextColumn("· left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal or quiet,
        )
        self.task = self.progress.add_task(title, total=stages, note="starting workers")

    def stage(self, note: str) -> None:
        """A stage is done."""
        self.progress.update(self.task, advance=1, note=note)

    def skip(self, stages: int) -> None:
        """Stages that nobody will ask for any more (a failed trial's)."""
        self.progress.update(self.task, advance=stages)

    def line(self, text: str) -> None:
        """A line above the bar."""
        self.progress.console.print(redact(text), highlight=False)

    def __enter__(self) -> StudyProgress:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
