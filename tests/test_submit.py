"""What `submit` refuses before anything is sent; what happens on a cluster: tests/cluster/test_jobs.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus
from servers import closed_url

from malaria_ray.cli import main
from malaria_ray.errors import ConfigError
from malaria_ray.runtime import jobs
from malaria_ray.runtime.jobs import entrypoint
from malaria_ray.submit import packages_of

NOBODY = ["--address", closed_url()]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--", "screen", "a.zip", "/r", "--model", "/run"], 1, "source 'a.zip' is relative"),
        (["--", "screen", "/a.zip", "r", "--model", "/run"], 1, "results 'r' is relative"),
        (["--", "screen", "/a.zip", "/r", "--model", "run"], 1, "model 'run' is relative"),
        (
            ["--", "screen", "/a.zip", "/r", "--model", "/run", "--patients", "/p.txt", "q"],
            1,
            "patients 'q' is relative",
        ),
        (["--", "pack", "/a.zip", "packed"], 1, "packed 'packed' is relative"),
        (["--", "audit", "/r", "/q", "audit"], 1, "results_and_audit 'audit' is relative"),
        (["--", "explain", "/r", "--image-ids", "a.png", "--out", "o"], 1, "out 'o' is relative"),
        (["--", "explain", "/r", "--image-ids", "a.png", "--model", "run"], 1, "model 'run' is relative"),
        (["--", "plan", "/a.zip", "--model", "run"], 1, "model 'run' is relative"),
        (["--", "evaluate", "/r", "--against", "q"], 1, "against 'q' is relative"),
        (["--", "compare", "/r", "q"], 1, "results 'q' is relative"),
        (["--", "compare", "/r", "/q", "--report", "c.html"], 1, "report 'c.html' is relative"),
        (["--", "query", "r", "SELECT 1"], 1, "directories 'r' is relative"),
        (["--", "query", "/r", "SELECT 1", "--format", "csv", "--output", "a.csv"], 1, "output 'a.csv' is relative"),
        (["--", "train", "/d", "/r", "--model", "vgg19-frozen", "--weights", "w.h5"], 1, "weights 'w.h5' is relative"),
        (["--", "train", "/d", "/r", "--model", "vgg19-finetuned", "--init-from", "i"], 1, "init_from 'i' is relative"),
        (["--", "train", "/d", "/r", "--model", "vgg19-frozen", "--weights", "imagenet"], 1, "no cluster answers at"),
        (["--", "compare", "/r", "/q"], 1, "no cluster answers at"),
        (["--", "query", "/r", "SELECT 1"], 1, "no cluster answers at"),
        (["--", "explain", "/r", "--image-ids", "a.png"], 1, "no cluster answers at"),
        (["--", "screens", "/a.zip"], 1, "'screens' is no command"),
        (["--", "demo"], 1, "'demo' is not run on a cluster"),
        (["--", "ingest", "/a.zip", "nih"], 1, "dataset 'nih' is relative"),
        (["--", "screen", "nih", "/r", "--model", "nih"], 1, "model 'nih' is relative"),
        (["--address", "127.0.0.1:1", "--", "schema"], 1, "--address 127.0.0.1:1: give the dashboard's, as http://"),
        (["--", "submit", "--", "schema"], 1, "'submit' is not run on a cluster"),
        (["--submission-id", "a b", "--", "schema"], 1, "--submission-id 'a b': allowed are"),
        (["--", "ingest", "/a.zip", "/d", "--image-size", "1"], 1, "--image-size 1: allowed are"),
        (["--", "ingest", "s3://b/a.zip", "/d"], 1, "no cluster answers at"),
        (["--", "ingest", "nih", "/d", "--debug"], 1, "no cluster answers at"),
    ],
)
def test_what_cannot_work_is_told_in_one_line(
    arguments: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["submit", *NOBODY, *arguments]) == status
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(("content", "said"), [(None, "cannot be read"), ("", "is empty")])
def test_a_token_file_without_a_token_is_told_before_ray_ends_the_process(
    content: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    if content is not None:
        (tmp_path / "token").write_text(content)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert main(["jobs", *NOBODY]) == 1
    assert said in capsys.readouterr().err


def test_a_wrong_flag_of_the_sub_command_is_wrong_usage():
    with pytest.raises(SystemExit) as ended:
        main(["submit", *NOBODY, "--", "screen", "/a.zip", "/r", "--model", "/run", "--bach-size", "3"])
    assert ended.value.code == 2


def test_a_path_with_spaces_or_quotes_reaches_the_job_as_it_is():
    assert entrypoint(["verify", "/data/it's here"]) == "python -m malaria_ray verify '/data/it'\"'\"'s here'"


ROOT = Path(__file__).parents[1]


def test_extras_become_their_packages_at_the_locks_versions():
    assert packages_of(ROOT, ()) == []
    for extra, name in (("s3", "s3fs"), ("gcs", "gcsfs"), ("gpu", "tensorflow")):
        package = packages_of(ROOT, (extra,))[0]
        assert package.split("==")[0] == (name if extra != "gpu" else "tensorflow[and-cuda]")
        assert f"\n{name}=={package.split('==')[1]} " in (ROOT / "requirements-gpu.lock").read_text()


@pytest.mark.parametrize(
    ("tree", "extra", "said"),
    [
        (ROOT, "s4", "--extras s4: allowed are cpu, gpu, s3"),
        (ROOT, "test", "malaria-ray is in no lock"),
        (None, "s3", "submit from the tree"),
        (ROOT / "tests", "s3", "no pyproject.toml"),
    ],
)
def test_extras_that_cannot_be_had_are_told_before_anything_is_sent(tree: Path | None, extra: str, said: str):
    with pytest.raises(ConfigError, match=said):
        packages_of(tree, (extra,))


class EndedWithoutItsLogEnding:
    """A cluster that keeps the connection of a killed job's log open, as Ray 2.60 was seen to."""

    def __init__(self):
        self.n_looks = 0

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        yield "the last line"
        await asyncio.Event().wait()

    def get_job_status(self, job_id: str) -> JobStatus:
        self.n_looks += 1
        return JobStatus.RUNNING if self.n_looks == 1 else JobStatus.FAILED

    def get_job_info(self, job_id: str) -> Any:
        return SimpleNamespace(status=JobStatus.FAILED, driver_exit_code=7, submission_id=job_id, message="killed")


def test_a_job_that_ended_is_left_though_its_log_does_not_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jobs, "_LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(jobs, "_DRAIN_S", 0.05)
    written: list[str] = []
    assert jobs.follow(EndedWithoutItsLogEnding(), "job", written.append) == 7
    assert written == ["the last line"]
