"""One writer of a directory at a time: real processes that live, are killed, are somewhere else."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from upath import UPath

from malaria_ray.errors import DirectoryError
from malaria_ray.runtime import lease, storage

HOLD = """
import sys, time
from malaria_ray.runtime import lease, storage
lease.BEAT_S = 0.5
with lease.held(storage.locate(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def beats_beyond(folder: UPath, n: int) -> int:
    """Waits for the writer's next sign of life."""
    end = time.monotonic() + 60
    while (beat := storage.read_json(folder / lease.FILE)["beat"]) <= n:
        assert time.monotonic() < end
        time.sleep(0.05)
    return int(beat)


def try_to_hold(folder: UPath) -> None:
    with lease.held(folder):
        assert storage.read_json(folder / lease.FILE)["pid"] == os.getpid()


@pytest.fixture
def folder(tmp_path: Path) -> UPath:
    return storage.locate(str(tmp_path / "out"))


@pytest.fixture
def writer(folder: UPath) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.2)
    monkeypatch.setattr(lease, "_WATCH_S", 3.0)


def elsewhere(folder: UPath, **facts: object) -> None:
    """As if the writer's file had been written by a process of another machine."""
    found = storage.read_json(folder / lease.FILE)
    storage.write_json(folder / lease.FILE, {**found, "host": "other", "kernel": "another", **facts})


def test_a_directory_is_free_until_and_after_somebody_writes_it(folder: UPath):
    try_to_hold(folder)
    with lease.held(folder):
        assert (folder / lease.FILE).exists()
        with pytest.raises(DirectoryError, match=rf"is being written by process {os.getpid()} on .*; wait until that"):
            try_to_hold(folder)
    assert not (folder / lease.FILE).exists()
    try_to_hold(folder)


def test_the_directory_is_free_again_where_the_work_failed(folder: UPath):
    with pytest.raises(ZeroDivisionError), lease.held(folder):
        raise ZeroDivisionError
    assert not (folder / lease.FILE).exists()


def test_a_process_that_lives_keeps_others_out_also_while_it_is_stopped(folder: UPath, writer: subprocess.Popen[str]):
    for number in (signal.SIGSTOP, signal.SIGCONT):
        writer.send_signal(number)
        with pytest.raises(DirectoryError, match=f"process {writer.pid} on"):
            try_to_hold(folder)


@pytest.mark.parametrize("is_reaped", [True, False])
def test_a_killed_process_keeps_nobody_out(folder: UPath, writer: subprocess.Popen[str], is_reaped: bool):
    writer.kill()
    if is_reaped:
        writer.wait()
    else:
        while "\nState:\tZ" not in Path(f"/proc/{writer.pid}/status").read_text():
            time.sleep(0.01)
    begun = time.monotonic()
    try_to_hold(folder)
    assert time.monotonic() - begun < lease.BEAT_S / 2, "known at once, not watched for"


def test_another_process_under_a_killed_ones_number_is_not_taken_for_it(folder: UPath, writer: subprocess.Popen[str]):
    storage.write_json(folder / lease.FILE, {**storage.read_json(folder / lease.FILE), "begun": "1"})
    try_to_hold(folder)


def test_a_writer_on_another_machine_is_watched_for_and_refused_by_its_next_sign(
    folder: UPath, writer: subprocess.Popen[str], quick: None, monkeypatch: pytest.MonkeyPatch, caplog
):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(lease, "_kernel", lambda: None)  # as where no system tells
    with pytest.raises(DirectoryError, match=f"process {writer.pid} on"):
        try_to_hold(folder)
    assert "waiting 3 s for a sign of it" in caplog.text


def test_a_writer_on_another_machine_that_gives_no_sign_is_taken_for_dead(
    folder: UPath, writer: subprocess.Popen[str], quick: None
):
    writer.kill()
    elsewhere(folder, beat=7)
    begun = time.monotonic()
    try_to_hold(folder)
    assert time.monotonic() - begun >= 3


def taken_while_held(folder: UPath, *, becomes: type[BaseException]) -> None:
    with lease.held(folder):
        elsewhere(folder, writer="another", pid=7)
        try:
            time.sleep(30)
        except lease._Taken as error:
            raise becomes from error


@pytest.mark.parametrize("becomes", [lease._Taken, RuntimeError])
def test_a_writer_whose_directory_another_took_stops_and_leaves_it_to_him(
    folder: UPath, quick: None, becomes: type[BaseException]
):
    with pytest.raises(DirectoryError, match="written by process 7 on other, which goes on; this one stops"):
        taken_while_held(folder, becomes=becomes)
    assert storage.read_json(folder / lease.FILE)["pid"] == 7


def test_a_writer_who_slept_while_another_took_the_directory_and_ended_stops(folder: UPath, quick: None):
    def sleeps() -> None:
        with lease.held(folder):
            storage.remove(folder / lease.FILE)
            time.sleep(30)

    storage.write_json(folder / "config.json", {})
    with pytest.raises(DirectoryError, match="was written by another process; this one stops"):
        sleeps()
    assert not (folder / lease.FILE).exists()


def test_the_check_tells_at_once_and_what_is_anothers_is_not_given_back(folder: UPath):
    with lease.held(folder) as check:
        check()
        elsewhere(folder, writer="another", pid=7)
        with pytest.raises(DirectoryError, match="written by process 7 on other, which goes on; this one stops"):
            check()
    assert storage.read_json(folder / lease.FILE)["pid"] == 7


def test_a_writer_is_stopped_also_where_the_first_signal_is_dropped(
    folder: UPath, quick: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(lease, "_SIGNAL_EVERY_S", 0.2)
    n_dropped = 0

    def drops() -> None:
        nonlocal n_dropped
        with lease.held(folder):
            elsewhere(folder, writer="another")
            while n_dropped < 3:
                try:
                    time.sleep(30)
                except KeyboardInterrupt:
                    n_dropped += 1

    with pytest.raises(DirectoryError, match="this one stops"):
        drops()
    assert n_dropped == 3


@pytest.mark.parametrize("content", ["{}", "[]", "5", '{"writer": "a", "kernel": null}', "", "\xff"])
def test_a_file_that_no_writer_wrote_keeps_nobody_out(folder: UPath, content: str):
    storage.write_bytes(folder / lease.FILE, content.encode("latin-1"))
    try_to_hold(folder)


def test_a_process_that_is_hidden_from_this_user_is_watched_for(
    folder: UPath, writer: subprocess.Popen[str], quick: None, monkeypatch: pytest.MonkeyPatch
):
    def refused(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refused)
    monkeypatch.setattr(lease, "_begun", lambda pid: "1" if pid == os.getpid() else None)
    assert not lease._is_hidden(writer.pid), "its /proc is there, so it is not hidden"
    assert lease._is_hidden(2**22 + 1)
    elsewhere(folder, kernel=lease._kernel(), pid=2**22 + 1)
    with pytest.raises(DirectoryError, match="is being written by"):
        try_to_hold(folder)


def test_a_deleted_directory_is_not_made_again_by_a_sign_of_life(folder: UPath, quick: None):
    with lease.held(folder):
        storage.remove(folder)
        time.sleep(1.5)
        assert not folder.exists()


def test_storage_that_fails_for_a_while_ends_nothing(folder: UPath, quick: None, monkeypatch: pytest.MonkeyPatch):
    with lease.held(folder):
        with monkeypatch.context() as patched:
            patched.setattr(storage, "read_json", lambda path: (_ for _ in ()).throw(OSError("503")))
            time.sleep(1.5)
        beats_beyond(folder, storage.read_json(folder / lease.FILE)["beat"])


def test_it_is_the_same_on_an_object_store(s3, quick: None):
    folder = storage.locate("s3://cells-bucket/held")
    with lease.held(folder):
        beats_beyond(folder, beats_beyond(folder, 0))
        with pytest.raises(DirectoryError, match="is being written by"):
            try_to_hold(folder)
    assert not (folder / lease.FILE).exists()


def test_it_is_read_while_it_is_written_again_on_an_object_store(s3):
    """Opened and then read, it was of another version between the two: "pre-conditions … did not hold"."""
    file = storage.locate("s3://cells-bucket/read/writer.json")
    storage.write_json(file, {"beat": 0})
    is_over = threading.Event()

    def write() -> None:
        n = 0
        while not is_over.is_set():
            storage.write_json(file, {"beat": (n := n + 1)})

    writing = threading.Thread(target=write)
    writing.start()
    found = [storage.read_json(file)["beat"] for _ in range(100)]
    is_over.set()
    writing.join()
    assert found == sorted(found)
    assert found[-1] > found[0]


RACE = """
import sys, time
from malaria_ray.errors import DirectoryError
from malaria_ray.runtime import lease, storage
folder = storage.locate(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
try:
    with lease.held(folder):
        print("held", flush=True)
        sys.stdin.readline()
except DirectoryError:
    print("refused", flush=True)
"""


@pytest.mark.parametrize("is_fresh", [True, False], ids=["fresh", "behind a killed one"])
def test_of_those_who_begin_at_the_same_moment_one_goes_on(folder: UPath, is_fresh: bool):
    if not is_fresh:
        storage.write_json(
            folder / lease.FILE,
            {"writer": "gone", "host": "here", "kernel": lease._kernel(), "pid": 2**22 + 1, "begun": "1", "beat": 3},
        )
    racers = [
        subprocess.Popen([sys.executable, "-c", RACE, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                         text=True, bufsize=1)
        for _ in range(6)
    ]  # fmt: skip
    assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 6  # type: ignore[union-attr]
    for racer in racers:
        racer.stdin.write("go\n")  # type: ignore[union-attr]
    said = sorted(racer.stdout.readline().strip() for racer in racers)  # type: ignore[union-attr]
    for racer in racers:
        racer.communicate("end\n", timeout=20)
    assert said == ["held", *["refused"] * 5]


def test_a_disk_without_links_will_do(folder: UPath, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    try_to_hold(folder)
    with lease.held(folder), pytest.raises(DirectoryError, match="is being written by"):
        try_to_hold(folder)
    assert storage.children(folder) == []
