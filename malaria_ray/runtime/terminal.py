"""What people see: tables on stdout, and the progress of long work, a bar on a terminal and plain log lines
elsewhere. And how they stop it.
"""

from __future__ import annotations

import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

log = logging.getLogger("malaria_ray")

_LOG_EVERY_S = 10.0
_PLAIN_WIDTH = 110  # columns of a table where there is no terminal to ask


def stop_on_sigterm() -> None:
    """Lets SIGTERM, by which batch systems end jobs, stop this process as Ctrl-C does."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def ignore_sigterm() -> None:
    """For the end of a process that is stopped already: batch systems send more than one."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def console() -> Console:
    """Where tables are printed: stdout, as wide as the terminal. Text is printed as it is, names may hold brackets."""
    width = None if sys.stdout.isatty() else _PLAIN_WIDTH
    return Console(width=width, highlight=False, markup=False, emoji=False)


def printable(text: str) -> str:
    """The text with everything that could move the cursor, hide or turn letters round written as an escape."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def number(value: float | None, digits: str = ".4f") -> str:
    """A metric as tables show it; `digits` is Python's format."""
    return "undefined" if value is None or math.isnan(value) else f"{value:{digits}}"


class Report(Protocol):
    def __call__(self, n: int, note: str = "") -> None:
        """`n` units more are done; `note` replaces what stands behind the numbers."""


@contextmanager
def progress(what: str, total: int, unit: str = "images") -> Iterator[Report]:
    """Shows done of total, units per second and the time left, until the block ends."""
    if sys.stderr.isatty():
        with _bar(what, total, unit) as report:
            yield report
    else:
        yield _lines(what, total, unit)


@contextmanager
def _bar(what: str, total: int, unit: str) -> Iterator[Report]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]} {task.fields[note]}"),
        TimeRemainingColumn(),
    )
    begun = time.monotonic()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total, note="", rate="")

        def report(n: int, note: str = "") -> None:
            done = bar.tasks[0].completed + n
            rate = f"{done / (time.monotonic() - begun):,.0f} {unit}/s"
            bar.update(task, advance=n, note=note, rate=rate)

        yield report


def _lines(what: str, total: int, unit: str) -> Report:
    begun = last = time.monotonic()
    done, first = 0, (begun, 0)

    def report(n: int, note: str = "") -> None:
        nonlocal done, last, first
        done += n
        now = time.monotonic()
        if done == n:
            first = now, n
        if (done < total or not total) and now - last < _LOG_EVERY_S:
            return
        last = now
        rate = done / max(now - begun, 1e-9)
        since, before = first if now > first[0] else (begun, 0)  # without what it took to start
        left = (total - done) * (now - since) / (done - before) if done > before else float("inf")
        ending = f", {left:,.0f} s left" if done < total else f" in {now - begun:,.1f} s"
        whole = f"{total:,}" if total else "an unknown number of"
        log.info(
            "%s: %s of %s %s, %.0f/s%s%s",
            what,
            f"{done:,}",
            whole,
            unit,
            rate,
            ending,
            f", {note}" if note else "",
        )

    return report


def counted(numbers: Mapping[str, int]) -> str:
    """Numbers of things by their names, in a line of text."""
    return ", ".join(f"{name} {n:,}" for name, n in numbers.items())


def folded(table: Table) -> Table:
    """What is too wide for the terminal goes on in the next line, never lost."""
    for column in table.columns:
        column.overflow = "fold"
    return table
