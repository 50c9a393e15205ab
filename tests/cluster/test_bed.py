"""The test bed in a minute: it comes up, is called sound, takes jobs with the token only, leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from cluster.bed import ROOT, bed


def test_down_removes_what_a_failed_up_left_and_no_other_folder(network: None, tmp_path: Path):
    folder = tmp_path / f"mrt6-{os.getpid()}"
    environment = {**os.environ, "BED": str(folder), "PYTHON": "/bin/false"}

    def script(command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([ROOT / "cluster/local.sh", command], env=environment, capture_output=True, text=True)

    assert script("up").returncode != 0
    assert folder.exists()
    assert script("down").returncode == 0
    assert not folder.exists()
    spaces = [folder.name, f"{folder.name}-0"]
    for space in spaces:  # of a bed whose folder was deleted
        subprocess.run(["ip", "netns", "add", space], check=True)
    with subprocess.Popen(["ip", "netns", "exec", spaces[1], "sleep", "600"]) as node:
        done = script("down")
        node.kill()
    assert (done.returncode, done.stderr) == (0, "")
    assert not set(spaces) & set(printed("ip", "netns", "list").split())
    (folder / "mine").mkdir(parents=True)
    assert f"{folder} is no test bed" in script("down").stderr
    assert (folder / "mine").exists()


def printed(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.timeout(900)
def test_a_cluster_comes_up_sound_takes_a_job_and_leaves_nothing_behind(network: None):
    with bed(1, number=5) as cluster:
        assert cluster.script("up", check=False).endswith("'cluster/local.sh down' removes it\n")
        assert "no node '7'; there are: 0 1" in cluster.script("kill-node", "7", check=False)
        assert cluster.http_status("/api/jobs/", body='{"entrypoint": "true"}') == 401
        status, report = cluster.client("doctor", "--storage", str(cluster.folder / "check"))
        assert status == 0, report
        assert "FAULT" not in report
        assert "refuses a client without a token" in report
        assert "on 2 nodes" in report
        spaces = [f"{cluster.folder.name}-{node}" for node in (0, 1)]
        processes = [int(pid) for space in spaces for pid in printed("ip", "netns", "pids", space).split()]
        assert len(processes) > 8
    assert not cluster.folder.exists()
    assert cluster.folder.name not in printed("ip", "netns", "list")
    assert not [pid for pid in processes if Path(f"/proc/{pid}/exe").exists()]
    assert "no test bed at" in cluster.script("status", check=False)
