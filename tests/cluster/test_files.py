"""What lies in cluster/ and jobs/ is what the programs that read it accept, and says nothing it should not."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER, JOBS, CRDS = ROOT / "cluster", ROOT / "jobs", ROOT.parent / "shared" / "kuberay-crds"
if not CRDS.exists():
    CRDS = Path(os.environ.get("KUBERAY_CRDS", CRDS))
RAY = Path(ray.__file__).parent
FILES = sorted(file for file in CLUSTER.rglob("*") if file.is_file())


def documents(file: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(file.read_text()) if document]


def crd_schema(kind: str) -> dict[str, Any]:
    """The schema of `ray.io/v1`; unknown fields are refused, as a strict `kubectl apply` does."""
    file = CRDS / f"ray.io_{kind.lower()}s.yaml"
    if not file.exists():
        pytest.skip(f"no CRD schemas at {CRDS}; set KUBERAY_CRDS to their folder")
    [version] = [v for v in documents(file)[0]["spec"]["versions"] if v["name"] == "v1"]
    return closed(version["schema"]["openAPIV3Schema"])


def closed(schema: Any) -> Any:
    """An openAPIV3Schema as JSON Schema: no unknown property, and int-or-string as Kubernetes means it."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema:
        if not schema.get("x-kubernetes-preserve-unknown-fields") and schema["properties"].keys() != {"metadata"}:
            made["additionalProperties"] = False
        if "apiVersion" in schema["properties"] and "spec" in schema["properties"]:
            made["properties"]["metadata"] = {"type": "object"}
    return made


@pytest.mark.parametrize("name", ["cluster", "train", "screen", "nightly"])
def test_kuberay_files_follow_the_crd_schemas(name: str):
    for document in documents(CLUSTER / f"kuberay/{name}.yaml"):
        assert document["apiVersion"] == "ray.io/v1"
        jsonschema.Draft202012Validator(crd_schema(document["kind"])).validate(document)


def test_the_schema_check_finds_a_misspelt_field():
    [document] = documents(CLUSTER / "kuberay/cluster.yaml")
    document["spec"]["headGroupSpec"]["rayStartParameters"] = {}
    with pytest.raises(jsonschema.ValidationError, match="rayStartParameters"):
        jsonschema.Draft202012Validator(crd_schema("RayCluster")).validate(document)


def specs() -> dict[str, dict[str, Any]]:
    """Every RayCluster specification of ours by its file."""
    return {
        "cluster": documents(CLUSTER / "kuberay/cluster.yaml")[0]["spec"],
        "screen": documents(CLUSTER / "kuberay/screen.yaml")[0]["spec"]["rayClusterSpec"],
    }


@pytest.mark.parametrize("name", ["cluster", "screen"])
def test_a_ray_cluster_is_closed_its_head_idle_and_its_workers_from_zero(name: str):
    spec = specs()[name]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["rayVersion"] == ray.__version__
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] == 0
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert {"name": "shm", "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]
        assert "cpu" in pod["containers"][0]["resources"]["limits"]


def test_the_screening_cluster_is_the_standing_one_without_gpus():
    standing, own = specs()["cluster"], specs()["screen"]
    standing["workerGroupSpecs"] = [g for g in standing["workerGroupSpecs"] if g["groupName"] != "gpu"]
    assert own == standing


def test_entry_points_are_jobs_of_ours_or_the_command():
    from malaria_ray.cli import parse

    for name, path in (("train", "spec"), ("screen", "spec"), ("nightly", "spec.jobTemplate")):
        [found] = documents(CLUSTER / f"kuberay/{name}.yaml")
        for key in path.split("."):
            found = found[key]
        words = found["entrypoint"].split()
        if words[0] == "malaria-ray":
            parse(*words[1:])
        else:
            assert words[0] == "python"
            assert (ROOT / words[1]).exists()
            parse(
                name.replace("nightly", "screen"), "/in", "/out", "--model", "cnn", *words[5:]
            )  # flags that are passed


@pytest.mark.parametrize("name", ["aws", "gcp", "on-premises"])
def test_launcher_files_follow_rays_own_schema(name: str):
    [config] = documents(CLUSTER / f"ray-up/{name}.yaml")
    jsonschema.validate(config, json.loads((RAY / "autoscaler/ray-schema.json").read_text()))
    assert "--env=RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert "/home/ray/.ray/auth_token" in config["file_mounts"]
    assert any("--dashboard-host=127.0.0.1" in command for command in config["head_start_ray_commands"])


@pytest.mark.parametrize("script", [*sorted(CLUSTER.glob("*.sh")), ROOT / ".ci/run"], ids=lambda file: file.name)
def test_shellcheck_finds_nothing(script: Path):
    if not shutil.which("shellcheck"):
        assert os.environ.get("CI") != "true", "CI needs shellcheck: apt-get install shellcheck"
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


SCREENING_METRICS = {
    "ray_malaria_images_scored_total", "ray_malaria_images_called_parasitized_total",
    "ray_malaria_images_quarantined_total", "ray_malaria_batch_seconds_bucket",
}  # fmt: skip


def test_the_dashboard_asks_only_for_metrics_that_ray_or_a_screening_has():
    """That a screening has them is seen by tests/stages/test_screen_failures.py at Ray's own endpoint."""
    board = json.loads((CLUSTER / "monitoring/grafana-dashboard.json").read_text())
    asked = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"\b(?:ray|autoscaler)_[a-z_]+", target["expr"])
    } - {"ray_io_cluster", *SCREENING_METRICS}
    source = " ".join(
        file.read_text()
        for folder in ("dashboard/modules/metrics/dashboards", "dashboard/modules/reporter", "autoscaler/_private")
        for file in (RAY / folder).rglob("*.py")
    ) + (RAY / "data/_internal/execution/interfaces/op_runtime_metrics.py").read_text()  # fmt: skip
    prefixes = ("ray_data_", "autoscaler_", "ray_")
    unknown = {
        name
        for name in asked
        if name not in source
        and not any(
            re.search(rf"\b{re.escape(name.removeprefix(prefix))}\b", source) for prefix in prefixes if prefix in name
        )
    }
    assert asked
    assert not unknown


def test_prometheus_reads_the_list_that_ray_writes():
    [config] = documents(CLUSTER / "monitoring/prometheus.yaml")
    [job] = config["scrape_configs"]
    assert job["file_sd_configs"] == [{"files": ["/tmp/ray/prom_metrics_service_discovery.json"]}]


def test_cluster_holds_no_python_no_hyperparameters_no_package_index_and_no_secret():
    assert not [file for file in FILES if file.suffix == ".py"]
    for file in FILES:
        text = file.read_text()
        assert not re.search(r"--(epochs|learning-rate|batch-size|patience|seed)\b", text), file
        assert not re.search(r"pypi\.|index-url|find-links|trusted-host", text), file
        assert not re.search(
            r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|(token|password|secret)[=:] *[0-9a-f]{16}", text
        )


def test_the_image_copies_what_is_there_checks_hashes_and_is_no_root():
    text = (CLUSTER / "Dockerfile").read_text()
    for sources in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE):
        for source in sources.replace("${LOCK}", "requirements.lock").split():
            assert (ROOT / source).exists() or source in ("README.md",), source
    assert "--require-hashes" in text
    assert re.search(r"^USER 1000$", text, re.MULTILINE)
    assert "RAY_AUTH_MODE=token" in text


def test_a_private_ca_makes_certificates_that_hold(tmp_path: Path):
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    make = [str(CLUSTER / "tls.sh"), str(tmp_path), "head=10.0.0.10", "node1=10.0.0.11,node1.example.org"]
    subprocess.run(make, check=True, capture_output=True)
    first = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    subprocess.run([*make, "node2=10.0.0.12"], check=True, capture_output=True)
    assert {name: (tmp_path / name).read_bytes() for name in first if name != "ca.srl"} == {
        name: content for name, content in first.items() if name != "ca.srl"
    }
    for name in ("head", "node1", "node2"):
        subprocess.run(
            ["openssl", "verify", "-x509_strict", "-CAfile", "ca.crt", f"{name}.crt"],
            cwd=tmp_path, check=True, capture_output=True,
        )  # fmt: skip
        assert (tmp_path / f"{name}.key").stat().st_mode & 0o077 == 0
    shown = subprocess.run(
        ["openssl", "x509", "-in", "node1.crt", "-noout", "-ext", "subjectAltName"],
        cwd=tmp_path, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert "IP Address:10.0.0.11" in shown
    assert "DNS:node1.example.org" in shown


@pytest.mark.parametrize("job", sorted(JOBS.glob("*.py")), ids=lambda file: file.stem)
def test_a_job_is_a_page_of_the_lab_notebook_and_its_configs_hold(job: Path, monkeypatch: pytest.MonkeyPatch):
    tree = ast.parse(job.read_text())
    header = ast.get_docstring(tree) or ""
    assert [line.split(":")[0] for line in header.splitlines()[2:]] == ["command", "hardware", "time", "result"]
    assert [node.module for node in tree.body if isinstance(node, ast.ImportFrom)] == ["malaria_ray"]
    stages: list[str] = []
    configs: list[Any] = []
    for stage in ("ingest", "train", "screen", "evaluate"):
        run = lambda config, stage=stage: (stages.append(stage), configs.append(config))[2:]  # noqa: E731 - returns ()
        monkeypatch.setattr(import_module(f"malaria_ray.stages.{stage}"), "run", run)
    places = re.findall(r"\b[A-Z]+(?:_[A-Z]+)*\b", header.split(f"jobs/{job.name}")[1].splitlines()[0])
    arguments = [f"/data/{place.lower()}" for place in places if place != "FLAGS"]
    flags = ["--overwrite"] if "[FLAGS]" in header and job.stem != "evaluate" else []
    monkeypatch.setattr(sys, "argv", [str(job), *arguments, *flags])
    ended = pytest.raises(SystemExit) if not job.stem.startswith("cross_validate") else contextlib.nullcontext()
    with ended as exit_info:
        runpy.run_path(str(job), run_name="__main__")
    assert exit_info is None or exit_info.value.code == 0
    assert [type(config).__module__.rpartition(".")[2] for config in configs] == stages
    assert not flags or all(config.overwrite for config in configs)
    assert len(configs) == 1 or job.stem.startswith("cross_validate")
