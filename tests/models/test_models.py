from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from malaria_ray.models import build_model
from malaria_ray.models.training import Examples, batches, epoch_order


@pytest.mark.parametrize(("name", "total", "trainable"), [("cnn", 15_102_529, 15_102_529)])
def test_parameters_are_the_articles(name, total: int, trainable: int):
    model = build_model(name, 125)
    assert model.count_params() == total
    assert sum(int(np.prod(weight.shape)) for weight in model.trainable_weights) == trainable


def test_a_model_takes_raw_pixels_and_scales_them_itself():
    model = build_model("cnn", 32)
    assert model.inputs[0].dtype == "uint8"
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    scores = np.asarray(model(pixels))
    assert scores.shape == (3, 1)
    assert scores.dtype == np.float32
    assert ((scores > 0) & (scores < 1)).all()


class InPlace:
    """Stands for an object reference in a test of pure arithmetic: `ray.get` is replaced by reading it."""

    def __init__(self, array: np.ndarray):
        self.array = array


def small_examples(patch: pytest.MonkeyPatch, n: int) -> Examples:
    """`n` one-pixel images whose value is their index, in three parts."""
    patch.setattr("malaria_ray.models.training.ray.get", lambda reference: reference.array)
    ids = np.arange(n, dtype=np.uint8)
    parts = [InPlace(piece.reshape(-1, 1, 1, 1)) for piece in np.array_split(ids, 3)]
    part = np.concatenate([np.full(len(p.array), i) for i, p in enumerate(parts)]).astype(np.int32)
    row = np.concatenate([np.arange(len(p.array)) for p in parts]).astype(np.int32)
    return Examples(parts=parts, part=part, row=row, label=(ids % 2).astype(np.float32))


@given(n=st.integers(1, 60), batch_size=st.integers(1, 20), n_workers=st.integers(1, 5), seed=st.integers(0, 3))
def test_n_workers_take_the_same_global_batches_as_one(n: int, batch_size: int, n_workers: int, seed: int):
    with pytest.MonkeyPatch.context() as patch:
        data = small_examples(patch, n)
        order = epoch_order(seed, 1, n)
        workers = [
            list(batches(data, order, batch_size=batch_size, rank=rank, n_workers=n_workers))
            for rank in range(n_workers)
        ]
    assert len({len(worker) for worker in workers}) == 1, "a worker with fewer steps would leave the others waiting"
    for step, parts in enumerate(zip(*workers, strict=True)):
        wanted = order[step * batch_size : (step + 1) * batch_size]
        seen = np.concatenate([part.images.reshape(-1)[part.weights == 1] for part in parts])
        assert sorted(seen.tolist()) == sorted(wanted.tolist()), "every example of the batch exactly once"
        assert {part.n_global for part in parts} == {len(wanted)}
        assert {part.images.shape for part in parts} == {(-(-batch_size // n_workers), 1, 1, 1)}
        for part in parts:
            labels = part.images.reshape(-1)[part.weights == 1] % 2
            np.testing.assert_array_equal(part.labels[part.weights == 1], labels)


def test_the_order_of_an_epoch_has_an_address():
    np.testing.assert_array_equal(epoch_order(7, 2, 50), epoch_order(7, 2, 50))
    assert not np.array_equal(epoch_order(7, 2, 50), epoch_order(7, 3, 50))
    assert sorted(epoch_order(7, 2, 50)) == list(range(50))
