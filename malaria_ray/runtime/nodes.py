"""Asks every node of the cluster for its facts."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Any, cast

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from malaria_ray.errors import ClusterError
from malaria_ray.runtime import facts, outputs, storage
from malaria_ray.runtime.facts import NodeFacts

_TIMEOUT_S = 180.0
_N_CLOCK_READINGS = 3


def gather(*, packages: list[str], storage_url: str | None, model: str | None) -> list[NodeFacts]:
    """The facts of every living node, in order of their addresses.

    Raises: `ClusterError` where a node does not answer.
    """
    ray.cloudpickle.register_pickle_by_value(facts)
    alive = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeManagerAddress"])
    names = {node["NodeID"]: f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})" for node in alive}
    software = _on_each(names, facts.software, packages)
    hardware = _on_each(names, facts.hardware)
    stored = _storage_errors(names, storage_url)
    models = _model_errors(names, model)
    found: list[NodeFacts] = []
    for node in alive:
        id_, resources = node["NodeID"], node["Resources"]
        offset, doubt = _clock_of(id_, names[id_])
        facts_of_node = {
            "node": names[id_],
            **software[id_],
            **hardware[id_],
            "n_cpus_declared": resources.get("CPU", 0.0),
            "n_gpus_declared": resources.get("GPU", 0.0),
            "object_store": int(resources.get("object_store_memory", 0)),
            "clock_offset_s": offset,
            "clock_doubt_s": doubt,
            "storage_error": stored[id_],
            "model_error": models[id_],
        }
        found.append(cast("NodeFacts", facts_of_node))
    return found


def _storage_errors(names: dict[str, str], url: str | None) -> dict[str, str | None]:
    """Each node writes a file, then each reads those of all: a folder of the same name on each node is found out."""
    if url is None:
        return dict.fromkeys(names)
    folder = storage.as_url(storage.locate(url) / f".doctor-{secrets.token_hex(8)}")
    marks = {id_: f"{id_[:12]}.txt" for id_ in names}
    try:
        written = {id_: _on_each({id_: name}, facts.write_mark, folder, marks[id_])[id_] for id_, name in names.items()}
        read = _on_each(names, facts.read_marks, folder, [marks[id_] for id_ in names if written[id_] is None])
    finally:
        for id_, name in names.items():  # one after the other: the first removes a folder that they share
            _on_each({id_: name}, facts.remove_marks, folder)
    return {
        id_: f"cannot write: {written[id_]}" if written[id_] else f"cannot read: {read[id_]}" if read[id_] else None
        for id_ in names
    }


def _model_errors(names: dict[str, str], model: str | None) -> dict[str, str | None]:
    if model is None:
        return dict.fromkeys(names)
    run = storage.locate(model)
    files = outputs.check_complete(run, "train")["files"]
    return _on_each(names, facts.read_model, storage.as_url(run / "model.onnx"), files["model.onnx"]["sha256"])


def _clock_of(node_id: str, name: str) -> tuple[float, float]:
    """(seconds that the node's clock is ahead of ours, half the time that asking took), the surest of some readings."""
    readings = []
    for _ in range(_N_CLOCK_READINGS):
        asked = time.time()
        then = _on_each({node_id: name}, facts.clock)[node_id]
        answered = time.time()
        readings.append((then - (asked + answered) / 2, (answered - asked) / 2))
    return min(readings, key=lambda reading: reading[1])


def _on_each(names: dict[str, str], function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """What the function returns on each node. It takes no CPU, so that it also runs on a busy node and on the head."""
    task = ray.remote(num_cpus=0, max_retries=0)(function)
    asked = {
        id_: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(id_, soft=False)).remote(*arguments)
        for id_ in names
    }
    answers = {}
    for id_, answer in asked.items():
        try:
            answers[id_] = ray.get(answer, timeout=_TIMEOUT_S)
        except (ray.exceptions.RayError, TimeoutError) as error:
            raise ClusterError(
                f"node {names[id_]} does not answer ({type(error).__name__}: {str(error).splitlines()[0]}); look at "
                "its log, restart it or take it out of the cluster"
            ) from error
    return answers
