"""The command as a user meets it: exit status, stdout, stderr. Each call is a process of its own."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import samples
from botocore.exceptions import ClientError, NoCredentialsError
from ray.exceptions import RayTaskError

from malaria_ray import cli
from malaria_ray.schema import TABLES, VIEWS, Reason


def malaria_ray(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.run(
        [sys.executable, "-m", "malaria_ray", *arguments],
        env={**own, **environment},
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--help"], 0, "archive → dataset"),
        (["--version"], 0, "malaria-ray 0."),
        (["ingest", "--help"], 0, "--image-size"),
        (["schema", "predictions"], 0, "P(parasitized)"),
        ([], 2, "usage"),
        (["inject"], 2, "'inject' is no command; allowed are demo, ingest"),
        (["ingest", "only-one-path"], 2, "DATASET"),
        (["ingest", "a", "b", "--image-sise", "125"], 2, "--image-sise"),
        (["train", "a", "b", "--model", "resnet"], 2, "resnet"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_help_and_usage(arguments: list[str], status: int, says: str):
    done = malaria_ray(*arguments)
    assert done.returncode == status
    assert says in " ".join((done.stdout + done.stderr).replace("│", " ").split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["ingest", "/no/such", "out"], "malaria-ray ingest: /no/such is not there; an archive is a folder"),
        (["ingest", "/", "out", "--image-size", "5"], "--image-size 5: allowed are 16 to 1024 pixels"),
        (["train", "/no/such", "out", "--model", "cnn"], "/no/such is not there; it is made by 'malaria-ray ingest'"),
        (["screen", "/", "out", "--model", "/no/such"], "/no/such is not there; it is made by 'malaria-ray train'"),
        (["evaluate", "/"], "/ was not made by 'malaria-ray screen'"),
        (["verify", "/no/such"], "is no dataset, run or results directory"),
        (["schema", "unknown"], "'unknown' is no table; allowed are manifest"),
        (["ingest", "nowhere://x", "out"], "nowhere://x: Unsupported filesystem: 'nowhere'; allowed are"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_failure_is_one_line_that_says_what_to_do(tmp_path: Path, arguments: list[str], line: str):
    done = malaria_ray(*[argument.replace("out", str(tmp_path / "out")) for argument in arguments])
    assert done.returncode == 1
    assert line in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists(), "nothing is written where nothing could be done"


def test_where_nothing_may_be_written_it_is_said_without_an_exceptions_name(tmp_path: Path):
    archive = tmp_path / "cells"
    archive.mkdir()
    (archive / "a.png").write_bytes(samples.noise(1))
    done = malaria_ray("ingest", str(archive), "/sys/dataset", "--image-size", "16")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("malaria-ray ingest: /sys/")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_what_the_system_refuses_is_told_with_what_to_do(code: int):
    said = cli._unexpected(OSError(code, os.strerror(code), "/data/out"))
    assert said.startswith(f"/data/out: {os.strerror(code)}; ")
    assert said.endswith(", or choose another place, then run again")
    of_a_worker = OSError(code, "Error writing bytes to file. Detail: [errno]")  # as Arrow raises it
    said = cli._unexpected(RayTaskError("task", "Traceback", of_a_worker).as_instanceof_cause())
    assert said.startswith(f"{os.strerror(code)}; ")
    said = cli._unexpected(OSError(code, "", "Failed to apply UDF transform.\nTo change"))  # as Ray Data words it
    assert said.startswith(f"{os.strerror(code)}; ")
    assert said.endswith(", or choose another place, then run again")


def test_what_a_client_of_storage_raises_is_told_with_what_to_do():
    of_the_client = NoCredentialsError()
    said = cli._unexpected(of_the_client)
    assert said.startswith("Unable to locate credentials; check the URLs that were given, your credentials and ")
    translated = FileNotFoundError("The specified bucket does not exist")  # as s3fs raises it
    translated.__cause__ = ClientError({"Error": {"Code": "NoSuchBucket"}}, "PutObject")
    assert cli._unexpected(translated).startswith("The specified bucket does not exist; check the URLs ")
    assert cli._unexpected(FileNotFoundError("x")) == "FileNotFoundError: x; --debug shows where"


@pytest.mark.parametrize("job", sorted(Path("jobs").glob("*.py")), ids=lambda job: job.stem)
def test_a_job_without_arguments_says_what_it_takes(job: Path):
    done = subprocess.run([sys.executable, str(job)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"python {job}" in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_adds_the_traceback():
    assert "Traceback" in malaria_ray("verify", "/no/such", "--debug").stderr


@pytest.mark.parametrize("is_job", [False, True])
def test_no_password_or_signature_is_printed(tmp_path: Path, is_job: bool):
    url = "https://user:PASSW0RD@127.0.0.1:1/x.zip?X-Amz-Signature=SECRET"
    if is_job:  # jobs/ are the same command
        job = [sys.executable, "jobs/ingest.py", url, str(tmp_path / "d"), "--debug"]
        done = subprocess.run(job, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=100)
    else:
        done = malaria_ray("ingest", url, str(tmp_path / "d"), "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "x.zip" in done.stderr
    for secret in ("PASSW0RD", "SECRET"):
        assert secret not in done.stderr + done.stdout


def test_the_data_dictionary_names_every_column_and_reason():
    printed = malaria_ray("schema", COLUMNS="200").stdout
    for table in [*TABLES.values(), *VIEWS.values()]:
        assert all(column.name in printed for column in table.columns)
    assert all(reason in printed for reason in Reason)


@pytest.mark.parametrize("n_signals", [1, 3])
def test_sigterm_while_ray_starts_stops_it_in_one_line(n_signals: int, tmp_path: Path):
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive/P1thin.png").write_bytes(samples.noise(1))
    command = [sys.executable, "-m", "malaria_ray", "ingest", str(tmp_path / "archive"), str(tmp_path / "dataset")]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "1 files" in process.stderr.readline(), "what is said before Ray is started"
    for _ in range(n_signals):
        time.sleep(0.4)
        process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=100)[1]
    assert (process.returncode, said) == (130, "malaria-ray ingest: stopped; run the same command again to go on\n")


def test_the_demo_runs_the_whole_line_and_a_second_time_does_nothing(tmp_path: Path):
    done = malaria_ray("demo", str(tmp_path / "demo"), "--epochs", "1")
    assert done.returncode == 0, done.stderr
    assert "SYNTHETIC" in done.stdout
    assert "results/metrics" in done.stdout
    for name in ("dataset/samples.png", "run/learning_curves.png", "run/model.onnx", "results/_SUCCESS.json"):
        assert (tmp_path / "demo" / name).exists(), name
    metrics = pq.read_table(tmp_path / "demo/results/metrics").to_pandas()
    assert set(metrics["split"]) == {"test"}
    again = malaria_ray("demo", str(tmp_path / "demo"), "--epochs", "1")
    assert again.returncode == 0
    assert again.stderr.count("nothing to do") == 5
