"""N workers with a global batch B take the steps of one with B: real processes, a real all-reduce over loopback."""

from __future__ import annotations

import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).with_name("one_worker.py")


def free_ports(n: int) -> list[str]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [str(one.getsockname()[1]) for one in sockets]


def trained_by(n_workers: int, folder: Path) -> list[dict[str, np.ndarray]]:
    ports = free_ports(n_workers)
    outs = [folder / f"{n_workers}-{rank}.npz" for rank in range(n_workers)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(out), str(rank), *ports],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, out in enumerate(outs)
    ]
    for process in processes:
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0, printed[-3000:]
    return [dict(np.load(out)) for out in outs]


@pytest.fixture(scope="module")
def by_one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return trained_by(1, tmp_path_factory.mktemp("one"))[0]


@pytest.mark.parametrize("n_workers", [2, 3])
def test_weights_loss_and_scores_are_those_of_one_worker(n_workers: int, by_one: dict[str, np.ndarray], tmp_path: Path):
    workers = trained_by(n_workers, tmp_path)
    for worker in workers:
        assert worker.keys() == by_one.keys()
        for name, expected in by_one.items():
            np.testing.assert_allclose(worker[name], expected, atol=1e-4, rtol=1e-4, err_msg=name)


def test_training_moved_the_weights(by_one: dict[str, np.ndarray]):
    losses = by_one["sums"][:, 0]
    assert losses[1] < losses[0]
