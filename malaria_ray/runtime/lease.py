"""One writer of a directory at a time, on any storage: a file that says who writes it, written again while he lives.

No lock: what a killed writer leaves must not stop the next one, and object stores have none. Whether the one who is
named lives is asked of the operating system where it is this one; else the file is watched for some beats, so that no
two clocks are ever compared.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from upath import UPath

from malaria_ray.errors import DirectoryError
from malaria_ray.runtime import storage

log = logging.getLogger("malaria_ray")

FILE = "_writer.json"
BEAT_S = 10.0
_TAKEN = signal.SIGUSR1  # not SIGINT, which a shell turns off for what it runs in the background
_WATCH_S = 2.5 * BEAT_S  # for so long a writer elsewhere may give no sign
_SETTLE_S = 0.5


class _Taken(BaseException):
    """Raised in the main thread, and no `Exception`, which much code takes for a failed read and tries again."""


@contextmanager
def held(path: UPath) -> Iterator[None]:
    """Says in the directory that this process writes it, until the end of the block.

    Raises: `DirectoryError` where a process that lives writes it; where meanwhile another one took it, which it may
    when this one gave no sign for long: the main thread is then interrupted, as by Ctrl-C.
    """
    pid = os.getpid()
    me = {
        "writer": secrets.token_hex(8),
        "host": socket.gethostname(),
        "kernel": _kernel(),
        "pid": pid,
        "begun": _begun(pid),
        "beat": 0,
    }
    _take(path, me)
    is_over, taken_by = threading.Event(), list[dict[str, Any]]()
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(_TAKEN, _interrupt) if is_main else None

    def beat() -> None:
        n = 0
        while not is_over.wait(BEAT_S):
            n += 1
            try:
                found = _read(path)
                if found is not None and found["writer"] != me["writer"]:
                    taken_by.append(found)
                    if is_main and not is_over.is_set():
                        signal.pthread_kill(int(threading.main_thread().ident or 0), _TAKEN)
                    return
                if found is not None:  # where it is not, somebody deleted the directory
                    storage.write_json(path / FILE, {**me, "beat": n})
            except Exception as error:  # storage's clients raise kinds of their own; the next beat may get through
                log.debug("%s: no sign of life could be given: %s", path, error)

    beating = threading.Thread(target=beat, name="lease", daemon=True)
    beating.start()
    try:
        yield
    except BaseException:
        if not taken_by:
            raise
    finally:
        if is_main:
            signal.signal(_TAKEN, signal.SIG_IGN)  # one that is on its way has nothing to stop any more
        is_over.set()
        beating.join()
        if is_main:
            signal.signal(_TAKEN, before)
        if not taken_by:
            _give_back(path)
    if taken_by:
        raise DirectoryError(f"{path} is being written by {_name(taken_by[0])}, which goes on; this one stops")


def _take(path: UPath, me: dict[str, Any]) -> None:
    """Writes the file. Raises: `DirectoryError` where a process that lives has it, or took it at the same moment."""
    if _is_created(path, me):
        return
    _check_free(path)
    storage.write_json(path / FILE, me)
    time.sleep(_SETTLE_S)  # of those who found it free together the last one's file is there now, and all see it
    found = _read(path)
    if found is None or found["writer"] != me["writer"]:
        raise _refused(path, found or me)


def _is_created(path: UPath, me: dict[str, Any]) -> bool:
    """Makes the file where there is none and the storage lets only one of several do that: on a disk, by a link."""
    if not storage.is_local(path):
        return False
    draft = path / f".{me['writer']}.tmp"
    storage.write_json(draft, me)
    try:
        os.link(draft.path, (path / FILE).path)
    except OSError:  # it is there, or the disk knows no links
        return False
    finally:
        Path(draft.path).unlink()
    return True


def _check_free(path: UPath) -> None:
    """Raises: `DirectoryError` where a process that lives writes the directory."""
    found = _read(path)
    if found is None:
        return
    if found["kernel"] is not None and found["kernel"] == _kernel():
        if _begun(found["pid"]) != found["begun"]:
            return
    else:
        log.info("%s was written last by %s: waiting %.0f s for a sign of it", path, _name(found), _WATCH_S)
        end = time.monotonic() + _WATCH_S
        while (now := _read(path)) == found:
            if time.monotonic() > end:
                return
            time.sleep(1)
        if now is None:  # it ended meanwhile
            return
        found = now
    raise _refused(path, found)


def _refused(path: UPath, found: dict[str, Any]) -> DirectoryError:
    return DirectoryError(
        f"{path} is being written by {_name(found)}; wait until that ends or stop it, then run again: what it finished "
        "is kept"
    )


def _interrupt(*_: Any) -> None:
    raise _Taken


def _give_back(path: UPath) -> None:
    try:
        storage.remove(path / FILE)
    except Exception as error:  # the next writer finds that this one has ended
        log.debug("%s could not be removed: %s", path / FILE, error)


def _read(path: UPath) -> dict[str, Any] | None:
    try:
        return storage.read_json(path / FILE)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def _kernel() -> str | None:
    """Where process numbers mean the same: one boot of one system, and one container of it. None where none tells."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return None


def _begun(pid: int) -> str | None:
    """When the process began, in the kernel's ticks: numbers are used again. None where it is not there, or only its
    parent has not yet asked how it ended.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


def _name(found: dict[str, Any]) -> str:
    return f"process {found['pid']} on {found['host']}"
