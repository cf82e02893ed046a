"""The progress bar of `site.map(..., progress=True)`. rich is imported only when a bar is shown."""

from collections.abc import Callable
from types import TracebackType

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Bar:
    """A context manager that gives the function to call with the number of items done since."""

    def __init__(self, name: str, total: int | None) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:>9.0f} items/s"), TimeElapsedColumn(), TimeRemainingColumn(),
        )  # fmt: skip
        self._task = self._progress.add_task(name.rpartition(".")[2], total=total, rate=0.0)

    def advance(self, items: int) -> None:
        self._progress.advance(self._task, items)
        speed = self._progress.tasks[self._task].speed
        self._progress.update(self._task, rate=speed or 0.0)

    def __enter__(self) -> Callable[[int], None]:
        self._progress.start()
        return self.advance

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
