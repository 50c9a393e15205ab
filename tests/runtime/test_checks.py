"""Each fault that `doctor` claims to find, told from facts alone; on real nodes: tests/cluster/test_doctor.py."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator

import pytest
from servers import closed_url

from malaria_ray.doctor import Config, check_token
from malaria_ray.errors import ClusterError, ConfigError
from malaria_ray.runtime.checks import Finding, check_nodes
from malaria_ray.runtime.facts import NodeFacts

GOOD = NodeFacts(
    node="10.0.0.1 (aaaa)", python="3.11.7", packages={"ray": "2.60.0", "numpy": "2.4.6"}, code_digest="0123",
    n_cpus_declared=8.0, n_gpus_declared=0.0, n_gpus_seen=0, shm_total=4 * 10**9, shm_free=4 * 10**9,
    object_store=2 * 10**9, clock_offset_s=0.01, clock_doubt_s=0.005, storage_error=None, model_error=None,
)  # fmt: skip


def findings(**changed: object) -> dict[str, Finding]:
    """Of two nodes, the second one changed."""
    other = NodeFacts(**{**GOOD, "node": "10.0.0.2 (bbbb)", **changed})  # type: ignore[typeddict-item]
    found = check_nodes([GOOD, other], storage="s3://cells", model="/run", min_object_store=10**9, max_clock_skew_s=2.0)
    return {finding.check: finding for finding in found}


def test_a_cluster_of_equal_nodes_has_no_fault():
    assert not [finding for finding in findings().values() if finding.is_fault]


@pytest.mark.parametrize(
    ("changed", "check", "said"),
    [
        ({"python": "3.12.1"}, "Python", "3.11.7 on 10.0.0.1 (aaaa); 3.12.1 on 10.0.0.2 (bbbb)"),
        ({"packages": {"ray": "2.59.0", "numpy": "2.4.6"}}, "ray", "2.60.0 on 10.0.0.1 (aaaa); 2.59.0 on"),
        ({"packages": {"ray": "2.60.0", "numpy": None}}, "numpy", "missing on 10.0.0.2 (bbbb)"),
        ({"code_digest": "4567"}, "malaria_ray", "4567 on 10.0.0.2 (bbbb)"),
        ({"code_digest": None}, "malaria_ray", "not installed on 10.0.0.2 (bbbb)"),
        ({"storage_error": "cannot write: PermissionError"}, "storage", "10.0.0.2 (bbbb): cannot write"),
        ({"model_error": "FileNotFoundError"}, "model", "10.0.0.2 (bbbb): FileNotFoundError"),
        ({"object_store": 10**8}, "object store", "10.0.0.2 (bbbb): 0.10 GB, 1.00 GB are needed"),
        ({"shm_total": 64 * 10**6}, "/dev/shm", "10.0.0.2 (bbbb): 0.06 GB for an object store of 2.00 GB"),
        ({"clock_offset_s": -3.5}, "clocks", "10.0.0.2 (bbbb): 3.5 s behind"),
        ({"n_gpus_declared": 1.0}, "devices", "10.0.0.2 (bbbb): 1 GPUs declared, 0 seen"),
    ],
)
def test_a_node_that_differs_is_named_with_the_remedy(changed: dict[str, object], check: str, said: str):
    found = findings(**changed)
    assert [name for name, finding in found.items() if finding.is_fault] == [check]
    assert said in found[check].found
    assert found[check].remedy


def test_a_slow_answer_is_no_wrong_clock():
    assert not findings(clock_offset_s=5.0, clock_doubt_s=5.0)["clocks"].is_fault


def test_what_was_not_asked_for_is_skipped_and_not_called_ok():
    found = check_nodes([GOOD], storage=None, model=None, min_object_store=1, max_clock_skew_s=2.0)
    assert {finding.check for finding in found if finding.level == "skip"} == {"storage", "model"}


@pytest.fixture(params=[200, 401, 403, 404])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(request.param)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    made = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_address[1]}", request.param
    made.shutdown()
    made.server_close()


def test_an_address_is_good_only_if_it_refuses_who_has_no_token(server: tuple[str, int]):
    url, status = server
    finding = check_token(url)
    assert finding.is_fault == (status not in (401, 403))
    if status == 200:
        assert "lets in a client without a token" in finding.found
        assert "RAY_AUTH_MODE=token" in str(finding.remedy)


def test_an_address_where_nobody_answers_is_named():
    with pytest.raises(ClusterError, match="nobody answers at"):
        check_token(closed_url())


@pytest.mark.parametrize(
    "flags", [{"address": "10.0.0.1:6379"}, {"min_object_store_mb": 0}, {"max_clock_skew_s": 0.0}], ids=str
)
def test_a_flag_that_cannot_work_is_refused(flags: dict):
    with pytest.raises(ConfigError):
        Config(**flags)
