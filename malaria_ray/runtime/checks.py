"""What is wrong with a cluster, told from its nodes' facts. Pure: facts in, findings out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from malaria_ray.runtime.facts import NodeFacts


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was checked, what was found and, where it is a fault, what to do."""

    check: str
    found: str
    remedy: str | None = None
    was_checked: bool = True

    @property
    def is_fault(self) -> bool:
        return self.remedy is not None

    @property
    def level(self) -> str:
        return "FAULT" if self.is_fault else "ok" if self.was_checked else "skip"


def check_nodes(
    nodes: Sequence[NodeFacts],
    *,
    storage: str | None,
    model: str | None,
    min_object_store: int,
    max_clock_skew_s: float,
) -> list[Finding]:
    """All findings about the nodes, in the order in which they are printed."""
    return [
        _same(nodes, "Python", lambda node: node["python"], "use one image, or one Python, on all nodes"),
        *_packages(nodes),
        _same(
            nodes,
            "malaria_ray",
            lambda node: node["code_digest"] or "not installed",
            "install the same commit on all nodes, or let 'malaria-ray submit' carry the tree",
        ),
        _none_wrong(
            nodes, "storage", f"{storage} written and read by all", lambda node: node["storage_error"],
            "give storage that all nodes share (s3://, gs://, NFS) and let this account read and write there",
        )
        if storage
        else Finding("storage", "give --storage URL", was_checked=False),
        _none_wrong(
            nodes, "model", f"{model} is the same file on all", lambda node: node["model_error"],
            "put the run on shared storage, or bake the same run into every image",
        )
        if model
        else Finding("model", "give --model RUN", was_checked=False),
        _none_wrong(
            nodes, "object store", f"at least {_size(min_object_store)} on all",
            lambda node: _object_store_error(node, min_object_store),
            "start the node with a larger --object-store-memory (it needs the memory)",
        ),
        _none_wrong(
            nodes, "/dev/shm", "as large as the object store on all", _shm_error,
            "enlarge it (docker --shm-size; Kubernetes: an emptyDir with medium Memory at /dev/shm); else objects go "
            "to the disk",
        ),
        _none_wrong(
            nodes, "clocks", f"less than {max_clock_skew_s:g} s apart",
            lambda node: _clock_error(node, max_clock_skew_s),
            "let chrony or systemd-timesyncd set the clock: object stores and TLS refuse wrong ones",
        ),
        _none_wrong(
            nodes, "devices", _devices(nodes), _gpu_error,
            "start the node with the --num-gpus it has, and install the NVIDIA driver and container toolkit there",
        ),
    ]  # fmt: skip


def _packages(nodes: Sequence[NodeFacts]) -> list[Finding]:
    names = sorted({name for node in nodes for name, version in node["packages"].items() if version})
    findings = [
        _same(nodes, name, lambda node, name=name: node["packages"].get(name) or "missing",  # type: ignore[misc]
              "install requirements.lock on all nodes, or use one image")
        for name in names
    ]  # fmt: skip
    faults = [finding for finding in findings if finding.is_fault]
    return faults or [Finding("packages", f"{len(names)} packages of the same version on all nodes")]


def _same(nodes: Sequence[NodeFacts], check: str, of: Callable[[NodeFacts], str], remedy: str) -> Finding:
    groups: dict[str, list[str]] = {}
    for node in nodes:
        groups.setdefault(of(node), []).append(node["node"])
    if len(groups) == 1:
        return Finding(check, f"{next(iter(groups))} on {len(nodes)} nodes")
    return Finding(check, "; ".join(f"{value} on {', '.join(names)}" for value, names in groups.items()), remedy)


def _none_wrong(
    nodes: Sequence[NodeFacts], check: str, good: str, error_of: Callable[[NodeFacts], str | None], remedy: str
) -> Finding:
    errors = [f"{node['node']}: {error}" for node in nodes if (error := error_of(node))]
    return Finding(check, "; ".join(errors), remedy) if errors else Finding(check, good)


def _object_store_error(node: NodeFacts, minimum: int) -> str | None:
    return f"{_size(node['object_store'])}, {_size(minimum)} are needed" if node["object_store"] < minimum else None


def _shm_error(node: NodeFacts) -> str | None:
    if node["shm_total"] >= node["object_store"]:
        return None
    return f"{_size(node['shm_total'])} for an object store of {_size(node['object_store'])}"


def _clock_error(node: NodeFacts, allowed_s: float) -> str | None:
    """A slow answer is no wrong clock: only what the time of asking cannot explain counts."""
    sure = abs(node["clock_offset_s"]) - node["clock_doubt_s"]
    if sure <= allowed_s:
        return None
    return f"{abs(node['clock_offset_s']):.1f} s {'ahead' if node['clock_offset_s'] > 0 else 'behind'}"


def _gpu_error(node: NodeFacts) -> str | None:
    if node["n_gpus_declared"] <= node["n_gpus_seen"]:
        return None
    return f"{node['n_gpus_declared']:g} GPUs declared, {node['n_gpus_seen']} seen"


def _devices(nodes: Sequence[NodeFacts]) -> str:
    n_cpus, n_gpus = sum(node["n_cpus_declared"] for node in nodes), sum(node["n_gpus_declared"] for node in nodes)
    return f"{n_cpus:g} CPUs and {n_gpus:g} GPUs on {len(nodes)} nodes"


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.2f} GB"
