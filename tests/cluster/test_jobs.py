"""Jobs on a real cluster of several nodes: who is let in, what comes back, and what a lost node costs."""

from __future__ import annotations

import json
import signal
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from cluster.bed import S3_SECRET, Bed, wait_for
from cluster.conftest import Line, write_archive

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LOOKS_FOR_NODES_EVERY_S = 20  # Ray's AutoscalingCoordinator, which says how many workers a training gets


def n_parts(results: Path) -> int:
    return len(list(results.glob("_work/*/scored/*.parquet")))


def check_results(cluster: Bed, results: Path, n: int) -> None:
    status, output = cluster.client("verify", str(results))
    assert status == 0, output
    assert sum(pq.read_metadata(part).num_rows for part in (results / "predictions").glob("*.parquet")) == n


def states(cluster: Bed) -> dict[str, str]:
    """State of each submitted job by its id."""
    listed = cluster.script("run", "--", "env", "COLUMNS=200", "python", "-m", "malaria_ray", "jobs")
    rows = [row.split("│") for row in listed.splitlines() if row.startswith("│")]
    return {row[1].strip(): row[2].strip() for row in rows}


@pytest.mark.parametrize(("header", "status"), [(None, 401), ("wrong", 403), ("right", 200)])
@pytest.mark.parametrize("path", ["/api/jobs/", "/api/version", "/nodes?view=summary"])
def test_http_is_answered_with_the_token_only(cluster: Bed, tmp_path: Path, path: str, header: str, status: int):
    token = (cluster.folder / "token").read_text() if header == "right" else "0" * 64
    (tmp_path / "header").write_text(f"Authorization: Bearer {token}\n")
    headers = [f"@{tmp_path / 'header'}"] if header else []
    assert cluster.http_status(path, *headers) == status


@pytest.mark.parametrize(("is_right", "status"), [(False, 403), (True, 200)])
def test_a_job_is_taken_by_http_with_the_token_only(cluster: Bed, tmp_path: Path, is_right: bool, status: int):
    name = f"by-http-{is_right}"
    token = (cluster.folder / "token").read_text() if is_right else "0" * 64
    (tmp_path / "header").write_text(f"Authorization: Bearer {token}\n")
    body = json.dumps({"entrypoint": "python -m malaria_ray schema", "submission_id": name})
    assert cluster.http_status("/api/jobs/", body=body) == 401
    assert cluster.http_status("/api/jobs/", f"@{tmp_path / 'header'}", body=body) == status
    assert (name in states(cluster)) == is_right


def test_the_token_file_is_the_owners_only_and_no_process_shows_the_token(cluster: Bed):
    assert (cluster.folder / "token").stat().st_mode & 0o077 == 0
    token = (cluster.folder / "token").read_bytes()
    for process in Path("/proc").glob("[0-9]*"):
        for file, secrets in (("cmdline", (token, S3_SECRET.encode())), ("environ", (token,))):
            with suppress(OSError):  # it ended meanwhile
                assert not [secret for secret in secrets if secret in (process / file).read_bytes()], process


def test_a_wrong_token_is_refused_in_one_line(cluster: Bed, tmp_path: Path):
    (tmp_path / "token").write_text("0" * 64)
    status, output = cluster.client("submit", "--", "schema", RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    assert status == 1
    assert "Invalid authentication token" in output.splitlines()[-1]
    assert "RAY_AUTH_TOKEN_PATH" in output.splitlines()[-1]


def test_the_jobs_log_and_exit_status_come_back(cluster: Bed):
    status, output = cluster.client("submit", "--", "verify", "/nowhere")
    assert status == 1
    assert "/nowhere is no dataset, run or results directory" in output
    status, output = cluster.client("submit", "--", "schema", "manifest")
    assert status == 0
    assert "image_id" in output


def test_the_same_id_joins_the_job_and_starts_no_second_one(cluster: Bed):
    first = cluster.start("submit", "--submission-id", "twice", "--", "schema")
    second = cluster.start("submit", "--submission-id", "twice", "--", "schema")
    outputs = [process.communicate(timeout=300)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), outputs
    assert sorted(word for output in outputs for word in ("submitted twice", "joined twice") if word in output) == [
        "joined twice",
        "submitted twice",
    ]
    assert all("schema version" in output for output in outputs)
    assert list(states(cluster)).count("twice") == 1
    status, output = cluster.client("submit", "--submission-id", "twice", "--", "schema", "manifest")
    assert status == 1
    assert "taken by another command" in output


def test_a_dataset_and_a_model_are_made_across_the_nodes(cluster: Bed, line: Line):
    for directory in (line.dataset, line.run):
        status, output = cluster.client("verify", str(directory))
        assert status == 0, output


def test_a_screening_uses_three_nodes(cluster: Bed, line: Line):
    results = line.folder / "three"
    command = ["screen", str(line.large), str(results), "--model", str(line.run), "--num-actors", "3"]
    status, output = cluster.client("submit", "--", *command)
    assert status == 0, output
    check_results(cluster, results, 7200)
    assert cluster.scorers_on() == {"10.213.101.11", "10.213.101.12", "10.213.101.13"}


def test_a_node_killed_while_an_archive_is_ingested_costs_no_image(cluster: Bed, line: Line):
    dataset = line.folder / "ingested"
    process = cluster.start("submit", "--", "ingest", str(line.large), str(dataset), "--image-size", "32")
    wait_for("a first part", lambda: (dataset / "crops").exists(), process=process)
    cluster.script("kill-node", "3")
    output = process.communicate(timeout=400)[0]
    assert process.returncode == 0, output
    status, output = cluster.client("verify", str(dataset))
    assert status == 0, output
    assert pq.read_metadata(dataset / "manifest.parquet").num_rows == 7200
    wait_for("the loss to be seen", lambda: "10.213.101.13" not in cluster.alive(), timeout_s=90)


def test_ctrl_c_stops_the_job(cluster: Bed, line: Line):
    command = ["screen", str(line.large), str(line.folder / "stopped"), "--model", str(line.run)]
    process = cluster.start("submit", "--submission-id", "stopped", "--", *command)
    wait_for("a first part", lambda: n_parts(line.folder / "stopped") > 0, process=process)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130, output
    assert "stopped: STOPPED" in output
    assert states(cluster)["stopped"] == "stopped"


def test_a_killed_node_costs_no_image(cluster: Bed, line: Line):
    results = line.folder / "killed"
    process = cluster.start("submit", "--", "screen", str(line.large), str(results), "--model", str(line.run))
    wait_for("two parts", lambda: n_parts(results) >= 2, process=process)
    cluster.script("kill-node", "1")
    output = process.communicate(timeout=400)[0]
    assert process.returncode == 0, output
    check_results(cluster, results, 7200)
    wait_for("the loss to be seen", lambda: "10.213.101.11" not in cluster.alive(), timeout_s=90)


def test_a_node_added_in_mid_run_is_used(cluster: Bed, line: Line):
    """On a cluster of one worker by now: the second actor that was asked for waits until there is a node for it."""
    results = line.folder / "grown"
    larger = write_archive(line.folder / "more.zip", n_patients=24, n_cells_per_patient=10, n_copies=250)
    command = ["screen", str(larger), str(results), "--model", str(line.run), "--num-actors", "2"]
    process = cluster.start("submit", "--", *command)
    wait_for("a first part", lambda: n_parts(results) >= 1, process=process)
    cluster.script("add-node")
    assert process.poll() is None, "it ended before the node was there: give it more copies"
    output = process.communicate(timeout=400)[0]
    assert process.returncode == 0, output
    check_results(cluster, results, 60_000)
    assert "10.213.101.14" in cluster.scorers_on()


def test_a_cut_link_costs_no_image(cluster: Bed, line: Line):
    results = line.folder / "cut"
    process = cluster.start("submit", "--", "screen", str(line.large), str(results), "--model", str(line.run))
    wait_for("two parts", lambda: n_parts(results) >= 2, process=process)
    cluster.script("cut-link", "4")
    assert "link cut" in cluster.script("status")
    output = process.communicate(timeout=300)[0]  # by Ray's own keep-alive it waits for more than 7 minutes
    cluster.script("heal-link", "4")
    assert process.returncode == 0, output
    check_results(cluster, results, 7200)


def test_a_node_killed_in_mid_training_leaves_one_worker_less_that_go_on_from_the_last_epoch(cluster: Bed, line: Line):
    cluster.script("add-node")
    time.sleep(LOOKS_FOR_NODES_EVERY_S + 5)  # before that, training starts without it and takes it a minute later
    n_nodes = len(cluster.alive()) - 1  # the head trains nothing
    flags = ["--model", "cnn", "--epochs", "12", "--patience", "0", "--batch-size", "16"]
    run, alone = line.folder / "elastic", line.folder / "alone"
    before = cluster.listed("actors", "--filter", "class_name=RayTrainWorker")
    train = ["submit", "--", "train", str(line.dataset), str(run), *flags, "--num-workers", f"1-{n_nodes}"]
    process = cluster.start(*train)
    snapshot = run / "checkpoints/checkpoint_manager_snapshot.json"
    wait_for("a first epoch", snapshot.exists, process=process)
    trained_on = cluster.actors_on("RayTrainWorker", "--filter", "state=ALIVE")
    assert len(trained_on) == n_nodes > 1
    cluster.script("kill-node", str(int(max(trained_on).rpartition(".")[2]) - 10))
    assert process.poll() is None, "it ended before the node was killed: give it more epochs"
    output = process.communicate(timeout=400)[0]
    assert process.returncode == 0, output
    assert cluster.client("verify", str(run))[0] == 0
    workers = cluster.listed("actors", "--filter", "class_name=RayTrainWorker")
    assert len(workers) - len(before) == n_nodes + n_nodes - 1
    status, output = cluster.client("submit", "--", "train", str(line.dataset), str(alone), *flags)
    assert status == 0, output
    curves = [pq.read_table(one / "history.parquet").to_pandas() for one in (run, alone)]
    assert curves[0]["epoch"].tolist() == list(range(1, 13))
    # Each worker draws its own dropout, so the curve is that of one worker but for what is drawn.
    np.testing.assert_allclose(curves[0]["train_loss"], curves[1]["train_loss"], atol=0.05)


def test_archive_model_and_results_may_all_be_in_an_object_store(cluster: Bed, line: Line, s3: str):
    for source, target in ((line.archive, f"{s3}/cells.zip"), (line.run, f"{s3}/run")):
        copy = f"import fsspec; fsspec.filesystem('s3').put({str(source)!r}, {target!r}, recursive=True)"
        cluster.script("run", "--", "python", "-c", copy)
    status, output = cluster.client("doctor", "--storage", f"{s3}/check", "--model", f"{s3}/run")
    assert status == 0, output
    command = ["screen", f"{s3}/cells.zip", f"{s3}/results", "--model", f"{s3}/run"]
    status, output = cluster.client("submit", "--", *command)
    assert status == 0, output
    status, output = cluster.client("verify", f"{s3}/results")
    assert status == 0, output


def test_no_log_or_job_of_all_these_shows_a_secret(cluster: Bed, s3: str):
    """The last test of this file: whatever Ray and the jobs wrote while the others ran is searched."""
    secrets = [(cluster.folder / "token").read_bytes(), S3_SECRET.encode()]
    logs = [file for file in cluster.folder.rglob("*") if file.is_file() and file.name != "token"]
    assert len([file for file in logs if file.name.startswith("job-driver")]) > 1
    for file in logs:
        assert not [secret for secret in secrets if secret in file.read_bytes()], file
    shown = cluster.script("run", "--", "ray", "list", "jobs", "--detail", "--format", "json", "--limit", "1000")
    assert not [secret for secret in secrets if secret.decode() in shown]
