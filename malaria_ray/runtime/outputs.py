"""The protocol of output directories: what stage made them, from what, and whether they are finished.

    claim(…)     may the directory be written? Then the stage looks at its inputs, which may refuse the work too
    .begin()     takes it from other writers until `one_writer` ends (lease.py) and writes config.json: stage, what
                 decides the result (`identity`), the whole config, provenance
    …            the stage writes its files; what only it needs goes to _work/
    finish(…)    writes _SUCCESS.json: counts, the record of every file, timings; then removes _work/

A finished directory is left alone, an unfinished one is resumed if its identity is the same, and else refused with
the difference.
"""

from __future__ import annotations

import datetime
import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from upath import UPath

from malaria_ray.errors import ConfigError, DirectoryError, InvariantError, NotCompleteError
from malaria_ray.runtime import lease, storage
from malaria_ray.runtime.provenance import provenance
from malaria_ray.runtime.redaction import without_secrets_in
from malaria_ray.runtime.storage import FileRecord
from malaria_ray.schema import PROVENANCE

SUCCESS = "_SUCCESS.json"
WORK = "_work"
_CHANGED = "{} was finished or changed by another process meanwhile; run again"
_CONFIG_FILE = {
    "ingest": "config.json",
    "pack": "config.json",
    "train": "config.json",
    "screen": "run.json",
    "audit": "config.json",
}


@dataclass(frozen=True)
class Claim:
    """Permission to write a directory. Nothing changes until `begin`, so that a later check may still refuse the work.
    `seen`: what there was, as `_state` gives it; nothing where all is deleted first.
    """

    path: UPath
    stage: str
    config: Any
    identity: dict[str, Any]
    is_emptied: bool
    is_written: bool
    seen: tuple[dict[str, Any] | None, bool]

    def begin(self) -> None:
        """Deletes what `--overwrite` deletes, makes unfinished what goes on, and writes the config.

        Raises: `DirectoryError` where another process writes the directory, or began or finished it since.
        """
        hold(self.path)
        if not self.is_emptied and self.seen != _state(self.path, self.stage):
            raise DirectoryError(_CHANGED.format(self.path))
        if self.is_emptied:
            _empty(self.path, self.stage)
        _, was_finished = self.seen
        if was_finished:
            storage.remove(self.path / SUCCESS)  # before the config: no kill leaves it finished with the new one
        if self.is_written:
            _write_config(self.path, self.stage, self.config, self.identity)


@dataclass(frozen=True)
class _Holds:
    """What a stage holds while it runs: the leases, and of each directory the check that it is still held."""

    leases: ExitStack
    checks: dict[str, Callable[[], None]]


_holds: ContextVar[_Holds] = ContextVar("holds")


@contextmanager
def one_writer() -> Iterator[None]:
    """Around a stage's `run`: the directory that it begins to write is no other process's until it ends, however."""
    with ExitStack() as leases:
        token = _holds.set(_Holds(leases, {}))
        try:
            yield
        finally:
            _holds.reset(token)


def hold(path: UPath) -> None:
    """Takes a directory until the end of `one_writer`. Raises: `DirectoryError` where another process writes it."""
    holds = _holds.get()
    if str(path) not in holds.checks:
        holds.checks[str(path)] = holds.leases.enter_context(lease.held(path))


def hold_finished(path: UPath, stage: str, success: dict[str, Any]) -> None:
    """The same of a finished directory to which something is added. `success`: its `_SUCCESS.json` as it was read.

    Raises: `DirectoryError` where another process writes the directory, or made it anew since.
    """
    hold(path)
    check_same(path, stage, success)


def check_same(path: UPath, stage: str, success: dict[str, Any]) -> None:
    """Raises: `DirectoryError` where a finished directory was made anew or opened again since `success`, its
    `_SUCCESS.json`, was read. To be asked behind the last read, before anything is told of what was read.
    """
    if check_complete(path, stage) != success:
        raise DirectoryError(_CHANGED.format(path))


def check_held(path: UPath) -> None:
    """Raises: `DirectoryError` where a directory that this process holds was taken by another one, as it may be while
    this one was stopped for long. To be asked before what is there is replaced.
    """
    if (holds := _holds.get(None)) and (check := holds.checks.get(str(path))):
        check()


def claim(
    path: UPath,
    *,
    stage: str,
    config: Any,
    identity: dict[str, Any],
    overwrite: bool,
    inputs: Sequence[str] = (),
    may_grow: str | None = None,
    may_change: str | None = None,
) -> Claim | None:
    """What a stage needs to write a directory; None where it was finished before. Nothing is changed yet.

    `config` is the stage's dataclass, `identity` the part of it and of its inputs that decides the result; `inputs` are
    the paths and URLs that it reads. `may_grow` names a number of the identity that a later run may raise: what was
    finished is then unfinished and goes on; `may_change` what another run may change as long as the directory is
    unfinished.
    Raises: `DirectoryError` where the directory holds something else, or the same with another identity, `ConfigError`
    where its name would be taken for a pattern, it lies in an input, or `overwrite` would delete one.
    """
    if not storage.is_local(path) and (letters := set("*?[") & set(path.path)):
        raise ConfigError(
            f"{path} has {' '.join(sorted(letters))} in its name, which clients of object stores take for a "
            "pattern of other names; choose a name without"
        )
    if storage.is_local(path):
        _check_place(path)
    identity = without_secrets_in(json.loads(json.dumps(identity, default=str)))
    seen = found, is_finished = (None, False) if overwrite else _state(path, stage)
    work = Claim(path, stage, config, identity, is_emptied=overwrite, is_written=True, seen=seen)
    if overwrite:
        _check_is_ours(path, stage)
        _check_keeps(path, inputs)
    if found is None:
        _check_outside(path, inputs)
        if not overwrite and _is_somebodys(path):
            raise DirectoryError(
                f"{path} is not empty and was not made by 'malaria-ray {stage}'; choose another directory"
            )
        return work
    was = found["identity"]
    if may_change and not is_finished and may_change in was:
        was = {**was, may_change: identity[may_change]}
    has_grown = bool(may_grow) and _has_grown(was, identity, str(may_grow))
    if not has_grown and (differences := _differences(was, identity)):
        raise DirectoryError(
            f"{path} was {'finished' if is_finished else 'begun'} with another config: {'; '.join(differences)}; "
            "choose another directory, or --overwrite to delete it and begin again"
        )
    if is_finished and not has_grown:
        _remove_leftover(path)
        return None
    _check_outside(path, inputs)
    return replace(work, is_written=identity != found["identity"])


def write_table(
    path: UPath, name: str, table: pa.Table, *, stage: str, sorted_by: Sequence[str] = ()
) -> dict[str, FileRecord]:
    """Writes one table of a directory of `stage`, its footer saying where it comes from; returns {name: its record}.

    The footer has what decides the result and not paths, times or machines: the same input gives the same bytes.
    """
    code = {key: provenance()[key] for key in ("malaria_ray", "code_digest", "packages")}
    origin = json.dumps({"stage": stage, "identity": read_config(path, stage)["identity"], **code})
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), PROVENANCE: origin})
    check_held(path)
    return {name: storage.write_table(path / name, table, sorted_by=sorted_by)}


def finish(
    path: UPath, *, counts: dict[str, Any], files: dict[str, FileRecord], timings: dict[str, Any], **more: Any
) -> None:
    """Writes `_SUCCESS.json`: with this the directory is finished. Then removes the stage's work folder: killed before,
    a process that goes on still finds what is done.

    Raises: `InvariantError` where a file does not lie there as it was written.
    """
    check_held(path)
    _check_lie_there(path, files)
    name = _CONFIG_FILE[str(stage_of(path))]
    config = {name: storage.record_of(path / name)}
    content = {"finished_at": _now(), "counts": counts, **more, "timings": timings, "config": config, "files": files}
    storage.write_json(path / SUCCESS, content)
    _remove_work(path)


def _remove_work(path: UPath) -> None:
    with suppress(FileNotFoundError):  # another process may do it at the same moment
        storage.remove(path / WORK)


def _remove_leftover(path: UPath) -> None:
    """Removes the work folder that a process left which was killed right behind its end; not that of one that lives and
    is about to open the directory again.
    """
    if (path / WORK).exists():
        with suppress(DirectoryError, OSError), lease.held(path):
            if (path / SUCCESS).exists():
                _remove_work(path)


def _check_lie_there(path: UPath, files: dict[str, FileRecord]) -> None:
    """By name and size: finds what else wrote the directory meanwhile, workers of a node that is cut off for one."""
    sizes = {}
    for folder in {name.rpartition("/")[0] for name in files}:
        with suppress(FileNotFoundError):
            for info in path.fs.ls((path / folder).path if folder else path.path, detail=True):
                name = info["name"].rstrip("/").rpartition("/")[2]
                sizes[f"{folder}/{name}" if folder else name] = info["size"]
    for name, record in files.items():
        if sizes.get(name) != record["bytes"]:
            raise InvariantError(
                f"{path / name} has {sizes.get(name, 'no')} bytes, {record['bytes']} were written: something else "
                "writes there too; stop it, then run again with --overwrite"
            )


def check_complete(path: UPath, stage: str) -> dict[str, Any]:
    """The `_SUCCESS.json` of a finished directory of `stage`. Raises: `NotCompleteError`, `DirectoryError`."""
    if not path.exists():
        raise NotCompleteError(f"{path} is not there; it is made by 'malaria-ray {stage}'")
    if _read_config(path, stage) is None:
        raise DirectoryError(
            f"{path} was not made by 'malaria-ray {stage}': it has no {_CONFIG_FILE[stage]} of that stage"
        )
    if not (path / SUCCESS).exists():
        raise NotCompleteError(
            f"{path} is not complete: no {SUCCESS}; run 'malaria-ray {stage}' again to finish it, or choose another "
            "directory"
        )
    try:
        return storage.read_json(path / SUCCESS)
    except ValueError as error:
        raise DirectoryError(f"{path / SUCCESS} is damaged: {error}; make {path} anew with --overwrite") from error


def digests_in(success: dict[str, Any], folder: str) -> dict[str, str]:
    """SHA-256 of each file of a folder, by name, from a `_SUCCESS.json`: identifies what was made from those files."""
    return {name: record["sha256"] for name, record in success["files"].items() if name.startswith(f"{folder}/")}


def files_in(path: UPath, success: dict[str, Any], folder: str) -> list[tuple[UPath, str]]:
    """The files that the stage wrote into a folder, in order of their names, each with its SHA-256; whatever else lies
    there is not among them.
    """
    return [(path / name, digest) for name, digest in sorted(digests_in(success, folder).items())]


def read_written(path: UPath, success: dict[str, Any], name: str, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file of a finished directory. Raises: `DirectoryError` where it is not the one that the stage wrote."""
    return storage.read_table(path / name, columns, sha256=success["files"][name]["sha256"])


def read_folder(path: UPath, success: dict[str, Any], folder: str, columns: list[str] | None = None) -> pa.Table:
    """All parts that the stage wrote into a folder. Raises: as `read_written`."""
    files = files_in(path, success, folder)
    return storage.concat(storage.read_table(file, columns, sha256=digest) for file, digest in files)


def check_written(path: UPath, success: dict[str, Any], *folders: str) -> None:
    """Raises: `DirectoryError` where a file of these folders is not the one that the stage wrote."""
    for folder in folders:
        for file, digest in files_in(path, success, folder):
            storage.content(file, digest)


def files_added(path: UPath) -> dict[str, FileRecord]:
    """Records of the files that later stages (evaluate, report) added to a finished directory, of all that finished."""
    files: dict[str, FileRecord] = {}
    for marker in (child / SUCCESS for child in storage.children(path)):
        if marker.exists():
            files |= storage.read_json(marker)["files"]
    return files


def read_config(path: UPath, stage: str) -> dict[str, Any]:
    """The config file of a directory of `stage`. Raises: `DirectoryError`."""
    found = _read_config(path, stage)
    if found is None:
        raise DirectoryError(f"{path} was not made by 'malaria-ray {stage}'")
    return found


def work_of(path: UPath, stage: str) -> UPath:
    """The work folder of a directory since it was begun: after `--overwrite` another, into which no worker writes that
    a cut-off node still runs for what was there before.
    """
    return path / WORK / str((_read_config(path, stage) or {}).get("begun", "begun"))


def stage_of(path: UPath) -> str | None:
    """The stage that made a directory; None where none did: a config.json may be anybody's.

    Raises: `DirectoryError` where a finished one has a config that is damaged.
    """
    try:
        return next((stage for stage in _CONFIG_FILE if _read_config(path, stage) is not None), None)
    except (DirectoryError, OSError):
        if (path / SUCCESS).exists():
            raise
        return None


def _read_config(path: UPath, stage: str) -> dict[str, Any] | None:
    file = path / _CONFIG_FILE[stage]
    if not file.exists():
        return None
    try:
        content: Any = storage.read_json(file)
    except ValueError as error:
        raise DirectoryError(f"{file} is damaged: {error}; choose another directory") from error
    if not isinstance(content, dict) or content.get("stage") != stage:
        return None
    if not isinstance(content.get("identity"), dict):
        raise DirectoryError(f"{file} is damaged: it has no identity; choose another directory")
    return content


def _state(path: UPath, stage: str) -> tuple[dict[str, Any] | None, bool]:
    """The config of a directory of `stage`, None where there is none, and whether it is finished."""
    found = _read_config(path, stage)
    return found, found is not None and (path / SUCCESS).exists()


def _write_config(path: UPath, stage: str, config: Any, identity: dict[str, Any]) -> None:
    begun = {"stage": stage, "begun": secrets.token_hex(4), "created_at": _now()}
    content = {**begun, "identity": identity, "config": asdict(config)}
    storage.write_json(path / _CONFIG_FILE[stage], without_secrets_in({**content, "provenance": provenance()}))


def _is_somebodys(path: UPath) -> bool:
    """Whether there is anything but what a writer leaves who was killed before the config was there."""
    if not path.exists() or not path.is_dir():
        return path.exists()
    return any(child.name != lease.FILE and not storage.is_draft(child.name) for child in path.iterdir())


def _check_place(path: UPath) -> None:
    """Raises: `DirectoryError` where no directory can be at a local path, as it or what it lies in is a file."""
    for place in (Path(path.path), *Path(path.path).parents):
        if place.is_dir():
            return
        if place.is_symlink() or place.exists():
            what = "a file" if place.exists() else "a link to nothing"
            raise DirectoryError(f"{place} is {what} and no directory; choose another place for the output")


def _check_is_ours(path: UPath, stage: str) -> None:
    """Refuses to delete what no stage made: --overwrite on a wrong path must not empty a home directory."""
    if _is_somebodys(path) and _read_config(path, stage) is None:
        raise DirectoryError(f"{path} was not made by 'malaria-ray {stage}'; --overwrite does not delete it")


def _check_outside(path: UPath, inputs: Sequence[str]) -> None:
    """Refuses an output in what the stage reads: it would be listed as a part of that, or be deleted with it."""
    for url in inputs:
        if storage.lies_in(path, storage.locate(url)):
            raise ConfigError(f"{path} lies in {url}, of which it would be a part; give a directory outside")


def _check_keeps(path: UPath, inputs: Sequence[str]) -> None:
    """Refuses to delete what the stage is to read."""
    for url in inputs:
        if storage.lies_in(storage.locate(url), path):
            raise ConfigError(f"{url} lies in {path}, which --overwrite would delete; choose another directory")


def _empty(path: UPath, stage: str) -> None:
    """Deletes all in a directory of the stage, which stays itself: it may be a mount point, or where the shell stands.

    Killed half-way it leaves a config that no later run takes for its own, so that no half of a result is resumed.
    """
    config = path / _CONFIG_FILE[stage]
    if not config.exists():
        return
    storage.remove(path / SUCCESS)
    storage.write_json(config, {"stage": stage, "identity": {"deletion": "begun by --overwrite, not finished"}})
    for child in list(path.iterdir()):
        if child.name not in (config.name, lease.FILE):
            storage.remove(child)
    storage.remove(config)


def _has_grown(was: dict[str, Any], now: dict[str, Any], name: str) -> bool:
    """Whether the number `name` was raised and nothing else is another."""
    return {**was, name: now[name]} == now and was[name] < now[name]


def _differences(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"{key} was {was.get(key)!r}, is now {now.get(key)!r}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key)
    ]


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
