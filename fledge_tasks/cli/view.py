"""How a run looks: live bars on a terminal, plain lines elsewhere, both on stderr; a closing table."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, Self, TextIO

import click

from fledge_tasks.cli.report import ImageReport, Report, Summary
from fledge_tasks.reporter import TaskResult

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_REFRESH_SECONDS = 0.1


class View(Protocol):
    """A listener that is open while the run lasts."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def tell(self, image: str, why: str) -> None: ...
    def started(self, task: str) -> None: ...
    def finished(self, task: str, result: TaskResult) -> None: ...
    def advanced(self, task: str, done_bytes: int, total_bytes: int | None) -> None: ...
    def tick(self) -> None: ...


def make_view(*, is_quiet: bool) -> View:
    """Return the view that suits stderr."""
    if is_quiet:
        return _Quiet()
    return _Live() if sys.stderr.isatty() else _Plain()


class _Quiet:
    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def tell(self, image: str, why: str) -> None:
        pass

    def started(self, task: str) -> None:
        pass

    def finished(self, task: str, result: TaskResult) -> None:
        pass

    def advanced(self, task: str, done_bytes: int, total_bytes: int | None) -> None:
        pass

    def tick(self) -> None:
        pass


class _Plain(_Quiet):
    """A line for each task that did something, and for each image why."""

    def tell(self, image: str, why: str) -> None:
        click.echo(f"{image}: {why}", err=True)

    def finished(self, task: str, result: TaskResult) -> None:
        if result.status in {"built", "failed"}:
            click.echo(_line(task, result), err=True)


class _Live(_Quiet):
    """Bars for what runs, with a line for each task that has done something above them."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TransferSpeedColumn

        # Refreshed by hand: a thread of its own would be in the way of forking workers.
        self._progress: Progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            console=Console(stderr=True),
            auto_refresh=False,
            transient=True,
        )
        self._bars: dict[str, TaskID] = {}
        self._refreshed = 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def tell(self, image: str, why: str) -> None:
        self._progress.console.print(f"{image}: {why}", highlight=False, markup=False)

    def started(self, task: str) -> None:
        self._bars[task] = self._progress.add_task(task, total=None)
        self.tick()

    def finished(self, task: str, result: TaskResult) -> None:
        bar = self._bars.pop(task, None)
        if bar is not None:
            self._progress.remove_task(bar)
        if result.status in {"built", "failed"}:
            self._progress.console.print(_line(task, result), highlight=False, markup=False)

    def advanced(self, task: str, done_bytes: int, total_bytes: int | None) -> None:
        if task in self._bars:
            self._progress.update(self._bars[task], completed=done_bytes, total=total_bytes)

    def tick(self) -> None:
        now = time.monotonic()
        if now - self._refreshed >= _REFRESH_SECONDS:
            self._refreshed = now
            self._progress.refresh()


def _line(task: str, result: TaskResult) -> str:
    count = result.values.get("bytes", 0)
    fetched = result.values.get("fetched")
    if fetched:
        count = sum(fetched.values())
    size = f", {human(count)}" if count else ""
    return f"{task} {result.status} in {result.seconds:.2f} s{size}"


def human(count: int) -> str:
    """Return a number of bytes for people."""
    from rich.filesize import decimal

    return decimal(count)


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return a number of things for people: '1 entry', '2 entries'."""
    return f"{count} {noun if count == 1 else plural or f'{noun}s'}"


def show_rows(titles: Sequence[str], rows: Iterable[Sequence[str]], file: TextIO) -> None:
    """Print a table; the first column holds names, all others numbers. Lines with tabs where nobody looks."""
    if not file.isatty():
        for row in (titles, *rows):
            file.write("\t".join(row) + "\n")
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for number, title in enumerate(titles):
        table.add_column(title, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console(file=file).print(table)


@contextlib.contextmanager
def bar(name: str, total_bytes: int | None) -> Iterator[Callable[[int], None]]:
    """Show how far a command is while the block runs, on a terminal; the value is told bytes as they are done."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    view = _Live()
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        view.advanced(name, done, total_bytes)
        view.tick()

    with view:
        view.started(name)
        yield advance


def show_report(report: Report) -> None:
    """Print the closing table: a row for each image."""
    summary = report.summary
    if sys.stdout.isatty():
        _show_table(summary)
    else:
        for image in summary.images:
            click.echo(f"{image.name}: {_outcome(image)}, {_stages(image)}, {_seconds(image):.2f} s")
    click.echo(f"{counted(len(summary.images), 'image')} in {summary.seconds:.2f} s")


def _show_table(summary: Summary) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for title in ("image", "built", "reused", "size", "time", "file"):
        table.add_column(title, justify="left" if title in {"image", "file"} else "right", overflow="fold")
    for image in summary.images:
        table.add_row(
            image.name,
            str(image.count("built")),
            str(_reused(image)) if image.sha256 else "-",
            human(image.bytes) if image.sha256 else "-",
            f"{_seconds(image):.2f} s",
            image.image if image.sha256 else "failed",
        )
    Console().print(table)


def _outcome(image: ImageReport) -> str:
    return f"{image.image}, {human(image.bytes)}, {image.sha256}" if image.sha256 else "failed"


def _seconds(image: ImageReport) -> float:
    return sum(stage.seconds for stage in image.stages)


def _stages(image: ImageReport) -> str:
    built = f"{counted(image.count('built'), 'stage')} built"
    return f"{built}, {_reused(image)} reused" if image.sha256 else built


def _reused(image: ImageReport) -> int:
    """Return how many stages did not have to run. Of a failed image nobody knows: what came too late looks the same."""
    return image.count("hit") + image.count("not-needed")
