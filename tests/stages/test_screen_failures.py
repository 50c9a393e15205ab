"""A screening in bad company: killed actors, full disks, files that storage does not give; and what operators see."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

import boto3
import numpy as np
import pandas as pd
import psutil
import pyarrow.parquet as pq
import pytest
import ray
from stages.conftest import Line, content, write_archive
from stages.killing import run_and_kill
from stages.test_screen import predictions_of, screen_of

from malaria_ray.errors import ArchiveError, ConfigError, DirectoryError, TooManyBadImagesError
from malaria_ray.runtime import outputs, storage
from malaria_ray.stages import ledger, publishing, report, screen, verify


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_archive(tmp_path_factory.mktemp("many") / "cells.zip", n_copies=10)


@pytest.fixture(scope="module")
def undisturbed(line: Line, many: Path, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    return screen_of(many, tmp_path_factory.mktemp("undisturbed") / "results", line.run)


def scorers() -> list[psutil.Process]:
    """Scoring actors of this process's own Ray."""
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if process.is_running() and "MapWorker" in " ".join(process.cmdline())
    ]


def test_an_actor_killed_in_mid_run_costs_no_image(line: Line, many: Path, undisturbed: pd.DataFrame, tmp_path: Path):
    results, killed = tmp_path / "results", []

    def kill_one() -> None:
        while not ledger.committed_files(outputs.work_of(storage.locate(str(results)), "screen")):
            time.sleep(0.02)
        victim = scorers()[0]
        killed.append(victim.pid)
        victim.send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    again = screen_of(many, results, line.run)
    killer.join(timeout=10)
    assert killed, "no actor was alive after the first rows: give it more images"
    pd.testing.assert_frame_equal(again, undisturbed)
    verify.run(verify.Config(directory=str(results)))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own with 400 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine lets us mount no disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_stops_in_one_line_and_with_more_room_it_goes_on(
    line: Line, many: Path, undisturbed: pd.DataFrame, small_disk: Path
):
    with pytest.raises(Exception, match="No space left on device"):
        screen_of(many, small_disk / "results", line.run)
    n_done = len(ledger.keys_done(outputs.work_of(storage.locate(str(small_disk / "results")), "screen")))
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    pd.testing.assert_frame_equal(screen_of(many, small_disk / "results", line.run), undisturbed)
    timings = storage.read_json(storage.locate(str(small_disk / "results/_SUCCESS.json")))["timings"]
    assert timings["images_scored"] == len(undisturbed) - n_done
    verify.run(verify.Config(directory=str(small_disk / "results")))


def command_of(source: Path, results: Path, line: Line, *flags: str, **environment: str) -> subprocess.Popen[str]:
    own = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "malaria_ray", "screen", str(source), str(results), "--model", str(line.run)]
    return subprocess.Popen([*command, *flags], env=own | environment, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)  # fmt: skip


def begun(source: Path, results: Path, line: Line) -> subprocess.Popen[str]:
    """A screening of which the first rows are done."""
    screening = command_of(source, results, line)
    while not ledger.committed_files(outputs.work_of(storage.locate(str(results)), "screen")):
        assert screening.poll() is None, screening.communicate()[0]
        time.sleep(0.05)
    return screening


def test_a_second_process_is_refused_and_the_first_ends_exact(
    line: Line, many: Path, undisturbed: pd.DataFrame, tmp_path: Path
):
    results = tmp_path / "results"
    first = begun(many, results, line)
    first.send_signal(signal.SIGSTOP)  # so that it is not done before the second has started
    second = command_of(many, results, line, "--overwrite", "--engine", "onnx")
    said = second.communicate(timeout=200)[0].strip().splitlines()[-1]
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 1
    assert said.startswith(f"malaria-ray screen: {results} is being written by process {first.pid} on "), said
    output = first.communicate(timeout=200)[0]
    assert first.returncode == 0, output
    pd.testing.assert_frame_equal(predictions_of(results), undisturbed)
    verify.run(verify.Config(directory=str(results)))
    assert not (results / "_writer.json").exists()


def test_sigterm_stops_it_as_ctrl_c_does_and_it_goes_on(
    line: Line, many: Path, undisturbed: pd.DataFrame, tmp_path: Path
):
    results = tmp_path / "results"
    stopped = begun(many, results, line)
    stopped.send_signal(signal.SIGTERM)
    output = stopped.communicate(timeout=100)[0]
    assert stopped.returncode == 130
    assert output.endswith("malaria-ray screen: stopped; run the same command again to go on\n")
    assert "***" not in output, "where Ray's C++ was"
    assert not (results / "_writer.json").exists()
    screen_of(many, results, line.run)
    pd.testing.assert_frame_equal(predictions_of(results), undisturbed)
    success = storage.read_json(storage.locate(str(results / "_SUCCESS.json")))
    assert success["timings"]["images_scored"] < success["counts"]["n_files"]


def test_where_ncnn_is_missing_onnx_runtime_scores_and_the_results_say_so(line: Line, tmp_path: Path):
    (tmp_path / "ncnn.py").write_text("raise ImportError('made for another processor')")
    screening = command_of(line.archive, tmp_path / "results", line, PYTHONPATH=str(tmp_path))
    output = screening.communicate(timeout=200)[0]
    assert screening.returncode == 0, output
    assert "240 files were scored by ONNX Runtime alone, slower" in output
    timings = storage.read_json(storage.locate(str(tmp_path / "results/_SUCCESS.json")))["timings"]
    assert timings["engines"] == {"onnx": 240}
    found, usual = predictions_of(tmp_path / "results"), predictions_of(line.results)
    np.testing.assert_allclose(found["score"], usual["score"], atol=1e-5)
    pd.testing.assert_series_equal(found["predicted_label"], usual["predicted_label"])


def test_where_nothing_is_finished_for_long_it_is_said(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(screen, "_WATCH_EVERY_S", 0.1)
    monkeypatch.setattr(screen, "_QUIET_S", 0.0)  # any look that finds nothing new is one too many
    assert len(screen_of(line.archive, tmp_path / "results", line.run)) == 240
    assert "nothing was finished for 0 s; the workers may wait for nodes, for storage or for room" in caplog.text


@pytest.mark.slow
def test_an_object_store_that_goes_away_stops_in_one_line_and_when_it_is_back_it_goes_on(
    line: Line, many: Path, undisturbed: pd.DataFrame, tmp_path: Path
):
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        **{key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1",
                          aws_access_key_id="test", aws_secret_access_key="test")  # fmt: skip
    client.create_bucket(Bucket="failing")
    command = [sys.executable, "-m", "malaria_ray", "screen", str(many), "s3://failing/results", "--model"]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, str(line.run)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def n_notes() -> int:
        found = client.list_objects_v2(Bucket="failing", Prefix="results/_work/").get("Contents", [])
        notes = [item["Key"] for item in found if "/checkpoint/" in item["Key"]]
        return sum(not note.endswith(".pending.parquet") for note in notes)

    first = start()
    while not n_notes():
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.05)
    server.stop()
    output = first.communicate(timeout=500)[0]
    assert first.returncode == 1, output
    assert output.strip().splitlines()[-1].startswith("malaria-ray screen: "), output
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)  # what was stored is still there
    server.start()
    second = start()
    output = second.communicate(timeout=500)[0]
    assert second.returncode == 0, output
    assert "images were scored before" in output
    for item in client.list_objects_v2(Bucket="failing", Prefix="results/predictions/")["Contents"]:
        target = tmp_path / "results" / Path(item["Key"]).relative_to("results")
        target.parent.mkdir(parents=True, exist_ok=True)
        client.download_file("failing", item["Key"], str(target))
    server.stop()
    pd.testing.assert_frame_equal(predictions_of(tmp_path / "results"), undisturbed)


def test_rows_whose_note_was_committed_are_kept_where_the_pending_one_is_still_there(
    line: Line, many: Path, undisturbed: pd.DataFrame, tmp_path: Path
):
    """An object store renames by copying and deleting: what a writer leaves that is stopped between the two."""
    results = tmp_path / "results"
    run_and_kill(
        ["screen", str(many), str(results), "--model", str(line.run)],
        when=results / "_work/*/checkpoint/*[0-9].parquet",
    )
    work = outputs.work_of(storage.locate(str(results)), "screen")
    done = ledger.keys_done(work)
    for name in ledger.committed_files(work):
        note = work.joinpath("checkpoint", f"{name}.parquet")
        shutil.copy(note, note.with_name(f"{name}.pending.parquet"))
    pd.testing.assert_frame_equal(screen_of(many, results, line.run), undisturbed)
    timings = storage.read_json(storage.locate(str(results / "_SUCCESS.json")))["timings"]
    assert timings["images_scored"] <= len(undisturbed) - len(done), "what is done is not scored again"


@pytest.fixture
def with_a_hole(line: Line, tmp_path: Path) -> Path:
    """A folder of ten cells, of which one is not to be had, and a file that is no image."""
    archive = tmp_path / "archive"
    archive.mkdir()
    with zipfile.ZipFile(line.archive) as cells:
        for name in cells.namelist()[:10]:
            (archive / Path(name).name).write_bytes(cells.read(name))
    first = min(archive.iterdir())
    first.rename(tmp_path / "away.png")
    first.symlink_to(tmp_path / "nowhere.png")
    (archive / "Thumbs.db").write_bytes(b"no image")
    return archive


@pytest.mark.parametrize("is_killed", [False, True])
def test_quarantined_files_are_scored_again_and_nothing_else(
    line: Line, with_a_hole: Path, tmp_path: Path, is_killed: bool, caplog: pytest.LogCaptureFixture
):
    results = tmp_path / "results"
    before = screen_of(with_a_hole, results, line.run)
    assert len(before) == 9
    published = set(results.iterdir())
    report.run(report.Config(results=str(results)))
    for name in ("metrics", "curves", "patients", "review", "differences"):
        (results / name).mkdir()
        (results / name / "part-00000.parquet").write_bytes(b"of the predictions before")
    (tmp_path / "away.png").rename(tmp_path / "nowhere.png")
    strange = pq.read_table(results / "predictions/part-00000.parquet").to_pandas().assign(score=0.9)
    strange.to_parquet(results / "predictions/part-00009.parquet")
    if is_killed:  # just after the results became unfinished; the command without the flag finishes them
        path = storage.locate(str(results))
        finished = storage.read_json(path / "_SUCCESS.json")
        retried = publishing.to_retry(path, "unreadable", finished)
        publishing.reopen(path, retried, storage.read_table(path / "listing.parquet"), finished=finished, states={})
        after = screen_of(with_a_hole, results, line.run)
    else:
        after = screen_of(with_a_hole, results, line.run, retry_quarantined="unreadable")
    assert len(after) == 10
    assert set(results.iterdir()) == published
    pd.testing.assert_frame_equal(after.loc[before.index], before)
    success = storage.read_json(storage.locate(str(results / "_SUCCESS.json")))
    assert success["timings"]["images_scored"] == 1
    quarantine = pq.read_table(results / "quarantine/part-00000.parquet").to_pylist()
    assert [(row["image_id"], row["reason"]) for row in quarantine] == [("Thumbs.db", "not_an_image")]
    verify.run(verify.Config(directory=str(results)))
    kept = content(results)
    screen_of(with_a_hole, results, line.run, retry_quarantined="unreadable")
    assert content(results) == kept
    assert "no quarantined file to try again" in caplog.text


def test_without_room_nothing_is_retried_or_overwritten(line: Line, with_a_hole: Path, tmp_path: Path):
    results = tmp_path / "results"
    screen_of(with_a_hole, results, line.run)
    kept = content(results)
    for flags in ({"retry_quarantined": "all"}, {"overwrite": True}):
        with pytest.raises(ConfigError, match="--cpus-per-actor 64: no node has so many CPUs"):
            screen_of(with_a_hole, results, line.run, cpus_per_actor=64, **flags)
    assert content(results) == kept


def test_a_retry_of_results_that_another_process_made_anew_is_refused(
    line: Line, with_a_hole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    results = tmp_path / "results"
    screen_of(with_a_hole, results, line.run)
    marker = storage.locate(str(results / "_SUCCESS.json"))

    def made_anew(config: screen.Config) -> tuple[int, int]:
        storage.write_json(marker, {**storage.read_json(marker), "run_id": "another"})
        return pool(config)

    pool = screen._pool
    monkeypatch.setattr(screen, "_pool", made_anew)
    with pytest.raises(DirectoryError, match="was finished or changed by another process meanwhile"):
        screen_of(with_a_hole, results, line.run, retry_quarantined="all")
    assert storage.read_json(marker)["run_id"] == "another"


def test_a_retry_does_not_publish_what_screening_did_not_write(line: Line, with_a_hole: Path, tmp_path: Path):
    results = tmp_path / "results"
    screen_of(with_a_hole, results, line.run)
    part = storage.locate(str(results / "predictions/part-00000.parquet"))
    storage.write_table(part, storage.read_table(part).slice(1))
    kept = content(results)
    with pytest.raises(DirectoryError, match=r"part-00000.parquet is not the file that was written"):
        screen_of(with_a_hole, results, line.run, retry_quarantined="all")
    assert content(results) == kept


def test_a_retry_that_is_refused_leaves_finished_results_as_they_were(line: Line, with_a_hole: Path, tmp_path: Path):
    results = tmp_path / "results"
    screen_of(with_a_hole, results, line.run)
    kept = content(results)
    shutil.copy(max(with_a_hole.glob("*.png")), with_a_hole / "one_more.png")
    with pytest.raises(ArchiveError, match="11 files then, 12 now"):
        screen_of(with_a_hole, results, line.run, retry_quarantined="all")
    assert content(results) == kept


def test_an_unfinished_screening_tries_its_quarantined_files_again(line: Line, with_a_hole: Path, tmp_path: Path):
    """Too many were bad, so that it never finished; then storage is back and a file mended, to another size."""
    results = tmp_path / "results"
    for flags in ({}, {"retry_quarantined": "unreadable"}):  # what is still bad is bad again
        with pytest.raises(TooManyBadImagesError, match="--retry-quarantined unreadable"):
            screen_of(with_a_hole, results, line.run, max_bad_fraction=0.0, **flags)
    (tmp_path / "away.png").rename(tmp_path / "nowhere.png")
    with pytest.raises(TooManyBadImagesError, match=r"\(not_an_image 1\)"):
        screen_of(with_a_hole, results, line.run, max_bad_fraction=0.0, retry_quarantined="unreadable")
    shutil.copy(max(with_a_hole.glob("*.png")), with_a_hole / "Thumbs.db")
    after = screen_of(with_a_hole, results, line.run, max_bad_fraction=0.0, retry_quarantined="all")
    assert len(after) == 11
    success = storage.read_json(storage.locate(str(results / "_SUCCESS.json")))
    assert success["timings"]["images_scored"] == 1
    verify.run(verify.Config(directory=str(results)))
    whole = screen_of(with_a_hole, tmp_path / "whole", line.run)
    pd.testing.assert_frame_equal(after.drop(columns="score"), whole.drop(columns="score"))


def test_the_ceiling_is_that_of_the_actors_that_ran(line: Line, tmp_path: Path):
    """Not of as many as were asked for: on two CPUs there is room for two."""
    ceilings = []
    for num_actors in ("2", "1-64"):
        results = tmp_path / num_actors
        screen_of(line.archive, results, line.run, num_actors=num_actors)
        success = storage.read_json(storage.locate(str(results / "_SUCCESS.json")))
        ceilings.append(success["timings"]["ceiling_images_per_second"])
    assert ceilings[1] < 10 * ceilings[0]


def test_what_operators_watch_is_at_rays_own_endpoint(line: Line, copy_of, with_a_hole: Path, tmp_path: Path):
    run = copy_of(line.run)
    success = storage.locate(str(run / "_SUCCESS.json"))
    storage.write_json(success, {**storage.read_json(success), "threshold": 0.0})
    assert screen_of(with_a_hole, tmp_path / "results", run)["predicted_label"].all()
    [node] = [node for node in ray.nodes() if node["Alive"]]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = (
        "images_scored_total",
        "images_called_parasitized_total",
        "images_quarantined_total",
        "batch_seconds_bucket",
    )
    deadline = time.monotonic() + 60
    while True:
        page = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10).read().decode()
        missing = [name for name in wanted if f"ray_malaria_{name}{{" not in page]
        if not missing or time.monotonic() > deadline:
            break
        time.sleep(1)
    assert not missing
    assert 'reason="unreadable"' in page


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"num_actors": "0"}, "--num-actors 0: allowed are N or MIN-MAX"),
        ({"num_actors": "8-2"}, "--num-actors 8-2"),
        ({"num_actors": "many"}, "--num-actors many"),
        ({"cpus_per_actor": 0}, "--cpus-per-actor 0"),
        ({"gpus_per_actor": 1.5}, "--gpus-per-actor 1.5: allowed are 0 to 1 and whole numbers"),
        ({"gpus_per_actor": 1, "engine": "ncnn"}, "--engine ncnn computes on CPUs"),
        ({"retry_quarantined": "all", "overwrite": True}, "--retry-quarantined keeps what --overwrite would delete"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags: dict, said: str):
    with pytest.raises(ConfigError, match=said):
        screen.Config(source="a", results="b", model="c", **flags)


@pytest.mark.parametrize("num_actors", [None, "1", "1-4"])
def test_more_cpus_than_a_node_has_are_refused(line: Line, tmp_path: Path, num_actors: str | None):
    """And not waited for: no node joins the Ray that a command starts for itself."""
    with pytest.raises(ConfigError, match="--cpus-per-actor 3: no node has so many CPUs; lower it$"):
        screen_of(line.archive, tmp_path / "results", line.run, cpus_per_actor=3, num_actors=num_actors)


def test_tasks_on_cpus_feed_actors_on_gpus(line: Line, with_a_hole: Path, tmp_path: Path, caplog):
    """Without CUDA the network is computed on the CPU, which one line says; all else goes the way of a GPU."""
    pd.testing.assert_frame_equal(
        screen_of(with_a_hole, tmp_path / "gpu", line.run, gpus_per_actor=0.5, batch_size=8),
        screen_of(with_a_hole, tmp_path / "cpu", line.run, batch_size=8),
    )
    assert "ONNX Runtime has no CUDAExecutionProvider here" in caplog.text
    verify.run(verify.Config(directory=str(tmp_path / "gpu")))


@pytest.mark.parametrize("num_actors", [None, "1"])
def test_more_gpus_than_a_node_has_are_refused_in_one_line(line: Line, tmp_path: Path, num_actors: str | None):
    with pytest.raises(ConfigError, match="--gpus-per-actor 2: no node has so many GPUs; lower it$"):
        screen_of(line.archive, tmp_path / "results", line.run, gpus_per_actor=2, num_actors=num_actors)


def test_more_actors_than_have_room_are_not_waited_for(line: Line, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    pd.testing.assert_frame_equal(
        screen_of(line.archive, tmp_path / "results", line.run, num_actors="8"), predictions_of(line.results)
    )
    assert "--num-actors 8: there is room for 2 now" in caplog.text


def test_a_pool_may_grow(line: Line, tmp_path: Path):
    pd.testing.assert_frame_equal(
        screen_of(line.archive, tmp_path / "results", line.run, num_actors="1-2"), predictions_of(line.results)
    )


def test_rates_of_each_stage_are_in_the_results(line: Line):
    timings = storage.read_json(storage.locate(str(line.results / "_SUCCESS.json")))["timings"]
    assert 0 < timings["first_image_scored_s"] <= timings["scoring_s"]
    assert 0 < timings["percent_of_ceiling"] < 110
    assert set(timings["stages"]) == {"read_and_decode", "score"}
    assert all(stage["alone_images_per_second"] > 0 for stage in timings["stages"].values())
