"""The figures of cluster/README.md are what tests/benchmarks/scale.py computes, and a simulation bears them out."""

from __future__ import annotations

import dataclasses

import pytest
from benchmarks import scale


def test_the_tables_of_the_readme_are_computed():
    text = scale.README.read_text()
    assert scale.with_tables(text) == text, "run: python -m tests.benchmarks.scale write"


@pytest.mark.parametrize("model", scale.MEASURED.score)
@pytest.mark.parametrize("fleet", scale.FLEETS[:2], ids=lambda fleet: scale.count(fleet.n_images))
def test_a_simulation_with_late_and_lost_nodes_agrees(fleet: scale.Fleet, model: str):
    made = scale.plan(fleet, model)
    assert scale.mean_simulated(fleet, model) == pytest.approx(made.start_s + made.scoring_s, rel=0.1)


def test_twice_the_nodes_take_half_the_time_only_while_cores_are_the_limit():
    fleet = scale.FLEETS[1]
    twice = dataclasses.replace(fleet, n_workers=2 * fleet.n_workers)
    assert scale.plan(twice, "cnn").compute_s == pytest.approx(scale.plan(fleet, "cnn").compute_s / 2)
    many = dataclasses.replace(fleet, n_workers=100 * fleet.n_workers)
    assert scale.plan(many, "cnn").bottleneck != "cores"
    assert scale.simulate(many, "cnn", seed=3) > 2 * scale.plan(many, "cnn").compute_s


def test_drivers_that_the_head_cannot_hold_are_refused():
    too_many = dataclasses.replace(scale.FLEETS[0], n_images=10**9, run_images=10**9)
    with pytest.raises(ValueError, match="the head has"):
        scale.plan(too_many, "cnn")
