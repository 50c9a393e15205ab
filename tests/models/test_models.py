from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from malaria_ray.errors import TrainingError
from malaria_ray.models import DTYPE_POLICY
from malaria_ray.models.augmentation import N_DRAWS, augment, augmentation_draws
from malaria_ray.models.building import build_backbone, build_trainable, whole_network
from malaria_ray.models.training import (
    Examples,
    _callbacks,
    _run_epoch,
    _steps,
    _val_metrics,
    ahead,
    batches,
    epoch_order,
    epoch_views,
    train_worker,
)
from malaria_ray.models.vgg19 import with_head


def n_weights(weights) -> int:
    return sum(int(np.prod(weight.shape)) for weight in weights)


def test_parameters_are_the_articles():
    cnn = build_trainable("cnn", image_size=125)
    assert (cnn.count_params(), n_weights(cnn.trainable_weights)) == (15_102_529, 15_102_529)
    head = build_trainable("vgg19-frozen", image_size=125, n_features=4_608)
    assert n_weights(head.trainable_weights) == 2_622_977
    frozen = whole_network(head, image_size=125, weights=None)
    assert (frozen.count_params(), n_weights(frozen.trainable_weights)) == (22_647_361, 2_622_977)
    finetuned = build_trainable("vgg19-finetuned", image_size=125)
    assert (finetuned.count_params(), n_weights(finetuned.trainable_weights)) == (22_647_361, 20_321_793)


def test_the_whole_network_scores_as_its_head_on_its_features():
    head = build_trainable("vgg19-frozen", image_size=48, n_features=512)
    backbone = build_backbone(image_size=48, weights=None)
    model = with_head(backbone, head)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 48, 48, 3), np.uint8)
    features = np.asarray(backbone(pixels)).astype(np.float16)
    np.testing.assert_allclose(np.asarray(model(pixels)), np.asarray(head(features)), atol=1e-3)


def test_preprocessing_inside_the_model_is_keras_own():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    backbone = build_backbone(image_size=32, weights=None)
    preprocess = keras.Model(backbone.input, backbone.get_layer("preprocess").output)
    expected = keras.applications.vgg19.preprocess_input(pixels.astype(np.float32))
    np.testing.assert_allclose(np.asarray(preprocess(pixels)), expected, atol=1e-3)


def test_blocks_1_to_3_never_get_a_gradient():
    model = build_trainable("vgg19-finetuned", image_size=32)
    trained = {layer.name for layer in model.layers if layer.trainable_weights}
    assert not {name for name in trained if name.startswith(("block1", "block2", "block3"))}
    assert {name for name in trained if name.startswith("block")} == {
        f"block{block}_conv{conv}" for block in (4, 5) for conv in (1, 2, 3, 4)
    }


def test_augmentation_changes_images_and_keeps_their_kind():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 48, 48, 3), np.uint8)
    draws = augmentation_draws(3, 1, 4)
    changed = np.asarray(augment(pixels, draws))
    assert changed.shape == pixels.shape
    assert changed.dtype == np.uint8
    assert not np.array_equal(changed, pixels)
    np.testing.assert_array_equal(np.asarray(augment(pixels, draws)), changed)
    assert not np.array_equal(np.asarray(augment(pixels, augmentation_draws(3, 2, 4))), changed), "each epoch is new"


def test_augmentation_in_the_middle_of_its_range_is_no_change_and_flips_and_turns_are_numpys():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 48, 48, 3), np.uint8)
    draws = np.full((5, N_DRAWS), 0.5, np.float32)
    draws[:, 0] = [0, 0, 0, 0.25, 0]  # of a full turn
    draws[:, 5:7] = [[0, 0], [0.9, 0], [0, 0.9], [0, 0], [0.9, 0.9]]
    changed = np.asarray(augment(pixels, draws)).astype(int)
    wanted = [lambda x: x, np.fliplr, np.flipud, lambda x: np.rot90(x, 1), lambda x: np.rot90(x, 2)]
    for image, result, change in zip(pixels, changed, wanted, strict=True):
        np.testing.assert_allclose(result, change(image), atol=1)


def test_a_model_takes_raw_pixels_and_scales_them_itself():
    model = build_trainable("cnn", image_size=32)
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
        shape = (-(-min(batch_size, n) // n_workers), 1, 1, 1)  # one for all steps, of no more than there are
        assert {part.images.shape for part in parts} == {shape}
        for part in parts:
            labels = part.images.reshape(-1)[part.weights == 1] % 2
            np.testing.assert_array_equal(part.labels[part.weights == 1], labels)


def test_the_order_of_an_epoch_has_an_address():
    np.testing.assert_array_equal(epoch_order(7, 2, 50), epoch_order(7, 2, 50))
    assert not np.array_equal(epoch_order(7, 2, 50), epoch_order(7, 3, 50))
    assert sorted(epoch_order(7, 2, 50)) == list(range(50))


def test_an_epoch_sees_one_view_of_each_example_at_an_address():
    with pytest.MonkeyPatch.context() as patch:
        one = small_examples(patch, 60)
        mirrored = [InPlace(part.array + 100) for part in one.parts]
        both = replace(one, parts=[*one.parts, *mirrored], n_views=2)
        views = epoch_views(7, 2, both)
        [batch] = batches(both, np.arange(60), batch_size=60, rank=0, n_workers=1, views=views)
    np.testing.assert_array_equal(batch.images.reshape(-1), np.arange(60) + 100 * views)
    assert 15 < views.sum() < 45
    np.testing.assert_array_equal(views, epoch_views(7, 2, both))
    assert not np.array_equal(views, epoch_views(7, 3, both))
    assert not epoch_views(7, 2, one).any()


def test_a_loss_that_is_no_number_names_its_step():
    tensors = SimpleNamespace(
        convert_to_tensor=np.asarray, constant=lambda value, _: np.float32(value), float32=np.float32
    )
    losses = iter([*[1.0] * 22, float("nan"), *[1.0] * 7])

    def step(*_: object) -> SimpleNamespace:
        value = np.array([next(losses), 0.0])
        return SimpleNamespace(numpy=lambda: value)

    with pytest.MonkeyPatch.context() as patch:
        data = small_examples(patch, 60)
        share = batches(data, epoch_order(0, 1, 60), batch_size=2, rank=0, n_workers=1)
        plan = SimpleNamespace(train=data, batch_size=2, epochs=3)
        with pytest.raises(TrainingError, match="not a finite number at step 23 of epoch 4"):
            _run_epoch(tensors, step, ahead(share), plan=plan, epoch=4, is_speaker=False)


def test_workers_that_are_started_again_after_such_a_fault_end_at_once():
    train_worker(SimpleNamespace(faults=SimpleNamespace(empty=lambda: False)))


def test_a_fault_in_making_batches_is_raised_where_they_are_used():
    def broken():
        yield 1
        raise OSError("gone")

    items = ahead(broken())
    assert next(items) == 1
    with pytest.raises(OSError, match="gone"):
        next(items)


@pytest.mark.parametrize(("precision", "is_xla", "tolerance"), [("bf16", False, 0.05), ("float32", True, 1e-3)])
def test_precision_and_xla_change_the_losses_of_training_by_little(precision, is_xla, tolerance):
    wanted, found = (losses_of_training(*how) for how in (("float32", False), (precision, is_xla)))
    assert wanted[-1] < wanted[0]
    np.testing.assert_allclose(found, wanted, rtol=tolerance)


def losses_of_training(precision: str, is_xla: bool) -> list[float]:
    """The cnn without its dropout, five steps on the same eight images."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (8, 16, 16, 3), np.uint8), np.array([0, 1] * 4, np.float32)
    was = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy(DTYPE_POLICY[precision])
        keras.utils.set_random_seed(1)
        model = build_trainable("cnn", image_size=16)
        for layer in model.layers:
            if isinstance(layer, keras.layers.Dropout):
                layer.rate = 0
        model.compile(optimizer=keras.optimizers.SGD(1e-2))
        model.optimizer.build(model.trainable_variables)
        step, _ = _steps(tf, keras, model, tf.distribute.get_strategy(), is_xla=is_xla)
        batch = [tf.constant(x) for x in (images, labels, np.ones(8, np.float32), np.empty((8, 0), np.float32))]
        return [float(step(*batch, tf.constant(8.0)).numpy()[0]) for _ in range(5)]
    finally:
        keras.config.set_dtype_policy(was)


@pytest.mark.parametrize("n_before", range(1, 12))
def test_a_resumed_run_halves_its_learning_rate_when_an_undisturbed_one_does(n_before: int):
    """Also where the least rate is near: Keras's callback does not set its counter back there."""
    plan = SimpleNamespace(learning_rate=1e-5, patience=0)

    def model() -> keras.Model:
        built = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        built.compile(optimizer=keras.optimizers.RMSprop(plan.learning_rate), loss="mse")
        return built

    def epochs(of: keras.Model, callbacks, n: int) -> list[float]:
        rates = []
        for _ in range(n):
            callbacks.on_epoch_end(0, {"val_loss": 1.0})
            rates.append(float(of.optimizer.learning_rate.numpy()))
        return rates

    one = model()
    undisturbed = epochs(one, _callbacks(keras, plan, one, []), 12)
    assert undisturbed[-1] == pytest.approx(1e-6)
    other = model()
    other.optimizer.learning_rate.assign(undisturbed[n_before - 1])
    history = [{"epoch": epoch + 1, "val_loss": 1.0} for epoch in range(n_before)]
    callbacks = _callbacks(keras, plan, other, history)
    assert epochs(other, callbacks, 12 - n_before) == undisturbed[n_before:]


def test_the_validation_loss_is_kerass_own_also_where_scores_are_0_and_1():
    label = np.array([0, 1, 0, 1], np.float32)
    score = np.array([1, 0, 0.25, 0.75], np.float32)
    expected = float(keras.losses.BinaryCrossentropy()(label, score))
    assert expected > 8
    assert _val_metrics(label, score)["val_loss"] == pytest.approx(expected, rel=1e-2)
