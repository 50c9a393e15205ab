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
from collections.abc import Callable, Iterator
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
_SETTLE_S = 2.0  # in which the slowest of several writes to a store arrives
_SIGNAL_EVERY_S = 2.0
_FACTS = ("writer", "host", "kernel", "pid", "begun", "beat")


class _Taken(KeyboardInterrupt):
    """Raised in the main thread. As Ctrl-C: other exceptions are lost where Ray waits."""


@contextmanager
def held(path: UPath) -> Iterator[Callable[[], None]]:
    """Says in the directory that this process writes it, until the end of the block. Gives a check that it still does,
    for whoever is about to change what cannot be changed back.

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
    is_over, taken = threading.Event(), list[DirectoryError]()
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(_TAKEN, _interrupt) if is_main else None

    def check() -> None:
        found = _read(path)
        if found is None or found["writer"] != me["writer"]:
            who = f"is being written by {_name(found)}, which goes on" if found else "was written by another process"
            raise DirectoryError(f"{path} {who}; this one stops")

    def beat() -> None:
        n = 0
        while not is_over.wait(BEAT_S):
            n += 1
            try:
                check()
                storage.write_json(path / FILE, {**me, "beat": n})
            except DirectoryError as error:
                if not path.exists():  # somebody deleted it all
                    continue
                taken.append(error)
                break
            except Exception as error:  # storage's clients raise kinds of their own; the next beat may get through
                log.debug("%s: no sign of life could be given: %s", path, error)
        while taken and is_main and not is_over.is_set():  # not once: what the main thread waits in may drop it
            signal.pthread_kill(int(threading.main_thread().ident or 0), _TAKEN)
            is_over.wait(_SIGNAL_EVERY_S)

    beating = threading.Thread(target=beat, name="lease", daemon=True)
    beating.start()
    try:
        yield check
    except BaseException:
        if not taken:
            raise
    finally:
        if is_main:
            signal.signal(_TAKEN, signal.SIG_IGN)  # one that is on its way has nothing to stop any more
        is_over.set()
        beating.join()
        if is_main:
            signal.signal(_TAKEN, before)
        _give_back(path, me)
    if taken:
        raise taken[0]


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
    if not storage.is_local(path):  # stores there are that write over what is there, whatever the request says
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
    if found["kernel"] is not None and found["kernel"] == _kernel() and not _is_hidden(found["pid"]):
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


def _give_back(path: UPath, me: dict[str, Any]) -> None:
    try:
        if (_read(path) or me)["writer"] == me["writer"]:
            storage.remove(path / FILE)
    except Exception as error:  # the next writer finds that this one has ended
        log.debug("%s could not be removed: %s", path / FILE, error)


def _read(path: UPath) -> dict[str, Any] | None:
    """The file; None where there is none, or it is not what a writer writes."""
    try:
        found: Any = storage.read_json(path / FILE)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    is_ours = isinstance(found, dict) and found.keys() >= set(_FACTS) and isinstance(found["pid"], int)
    return found if is_ours else None


def _kernel() -> str | None:
    """Boot and PID namespace, within which process numbers mean the same; None where the system does not tell."""
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


def _is_hidden(pid: int) -> bool:
    """Whether the process is there and /proc does not show it, as others' are hidden on some shared machines."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return not Path(f"/proc/{pid}").exists()
    except ProcessLookupError:
        pass
    return False


def _name(found: dict[str, Any]) -> str:
    return f"process {found['pid']} on {found['host']}"
