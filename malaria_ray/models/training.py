"""The training loop of one Ray Train worker: N workers with a global batch B take the same steps as one worker with B.

Keras 3's `fit` cannot run under `MultiWorkerMirroredStrategy` (keras-team/keras#20585), so the step is our own: each
worker takes its
slice of every global batch, sums its weighted loss over the global number of images, and the optimizer adds the
gradients up.
"""

from __future__ import annotations

import json
import os
import queue
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import ray.train

from malaria_ray.errors import MalariaRayError, TrainingError
from malaria_ray.models import DTYPE_POLICY, RECIPES, ModelName, Precision
from malaria_ray.models.building import build_trainable
from malaria_ray.runtime import storage

_LOG_EVERY_S = 15.0
_N_AHEAD = 2  # batches made while a step runs
_EPSILON = 1e-7  # scores count as this far from 0 and 1 in losses, as in Keras's own
_CHECK_EVERY_STEPS = 20  # how often the loss is looked at: every look waits for the device


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Where the examples lie: `parts` are object references of uint8 arrays (n_i, size, size, 3); example k is row
    `row[k]` of
    part `part[k]`, with `label[k]` 0 or 1. Workers on a node share one copy of the parts. With `n_views` above 1 the
    parts of the other views of the same examples follow, view by view; an epoch sees one view of each."""

    parts: list[Any]
    part: npt.NDArray[np.int32]
    row: npt.NDArray[np.int32]
    label: npt.NDArray[np.float32]
    n_views: int = 1

    def __len__(self) -> int:
        return len(self.label)

    def take(self, chosen: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """The inputs of the chosen examples, (n, …)."""
        parts = [ray.get(part) for part in self.parts]
        return np.stack([parts[self.part[i]][self.row[i]] for i in chosen])


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Everything a worker needs to know. Sizes in examples, rates per step."""

    model: ModelName
    image_size: int
    epochs: int
    batch_size: int
    learning_rate: float
    patience: int
    seed: int
    n_threads: int
    precision: Precision = "float32"
    is_augmented: bool = False
    is_xla: bool = False
    train: Examples
    val: Examples
    weights: Any = None
    """Object reference of the bytes of VGG-19's weights file, for the models that start from one."""
    initial_model: Any = None
    """Object reference of the bytes of the `model.keras` that fine-tuning starts from."""
    news: Any
    """`ray.util.queue.Queue` that takes lines for the user, from rank 0."""
    faults: Any
    """`ray.util.queue.Queue` that takes the errors after which a restart is no use."""
    tensorboard: str
    """URL of the folder for TensorBoard's event files."""


@dataclass(frozen=True)
class Batch:
    """A worker's slice of a global batch, padded to the same length on every worker; padding has weight 0."""

    images: npt.NDArray[Any]
    labels: npt.NDArray[np.float32]
    weights: npt.NDArray[np.float32]
    draws: npt.NDArray[np.float32]
    """What augmentation changes, (n, k); k is 0 where nothing is changed."""
    n_global: int


def epoch_order(seed: int, epoch: int, n: int) -> npt.NDArray[np.int64]:
    """The order in which an epoch sees the training examples; the same for any number of workers."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def epoch_views(seed: int, epoch: int, examples: Examples) -> npt.NDArray[np.int64]:
    """Which view of each example an epoch sees, 0 to n_views - 1; the same for any number of workers."""
    return np.random.default_rng([seed, epoch, 2]).integers(examples.n_views, size=len(examples))


def batches(
    examples: Examples,
    order: npt.NDArray[np.int64],
    *,
    batch_size: int,
    rank: int,
    n_workers: int,
    views: npt.NDArray[np.int64] | None = None,
    draws: npt.NDArray[np.float32] | None = None,
) -> Iterator[Batch]:
    """The slices that worker `rank` of `n_workers` takes of the global batches of `order`: every example exactly once
    over all workers, the same number of batches on each. `views`: which view of each example, else the first; `draws`:
    a row of numbers for each example.
    """
    n_parts = len(examples.parts) // examples.n_views
    part_of = examples.part if views is None else examples.part + n_parts * views
    draws = np.empty((len(examples), 0), np.float32) if draws is None else draws
    parts = [ray.get(part) for part in examples.parts]
    shape = parts[0].shape[1:]
    batch_size = max(1, min(batch_size, len(order)))  # no step of more than there are
    n_local = -(-batch_size // n_workers)
    for start in range(0, len(order), batch_size):
        in_batch = order[start : start + batch_size]
        mine = in_batch[rank::n_workers]
        images = np.zeros((n_local, *shape), parts[0].dtype)
        labels, weights = np.zeros(n_local, np.float32), np.zeros(n_local, np.float32)
        part, row = part_of[mine], examples.row[mine]
        for one in np.unique(part):
            places = np.flatnonzero(part == one)
            images[places] = parts[one][row[places]]
        labels[: len(mine)] = examples.label[mine]
        weights[: len(mine)] = 1
        changes = np.zeros((n_local, draws.shape[1]), np.float32)
        changes[: len(mine)] = draws[mine]
        yield Batch(images, labels, weights, changes, len(in_batch))


def ahead(items: Iterator[Batch]) -> Iterator[Batch]:
    """The same items, made by a thread while the earlier ones are used."""
    ready: queue.Queue[Any] = queue.Queue(_N_AHEAD)

    def make() -> None:
        try:
            for item in items:
                ready.put(item)
            ready.put(None)
        except BaseException as error:  # raised again where the item is wanted
            ready.put(error)

    threading.Thread(target=make, name="batches", daemon=True).start()
    while (item := ready.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        yield item


def train_worker(plan: TrainingPlan) -> None:
    """Trains to the last epoch or until patience ends, from the newest checkpoint if there is one; reports every epoch.

    Raises: `TrainingError` where the loss is no finite number, naming epoch and step. The error is put into
    `plan.faults` too: after a restart the workers find it there and end, since it would only come again.
    """
    if not plan.faults.empty():
        return
    try:
        _train(plan)
    except MalariaRayError as error:
        plan.faults.put(error)
        raise


def _train(plan: TrainingPlan) -> None:
    os.environ.pop("TF_USE_LEGACY_KERAS", None)  # set by Ray Train; the models are Keras 3
    import tensorflow as tf  # noqa: I001 - keras must be imported before tf.keras is first touched
    import keras

    from malaria_ray.models.augmentation import augmentation_draws

    tf.config.threading.set_intra_op_parallelism_threads(plan.n_threads)
    tf.config.threading.set_inter_op_parallelism_threads(max(1, plan.n_threads))
    keras.utils.set_random_seed(plan.seed)
    keras.config.set_dtype_policy(DTYPE_POLICY[plan.precision])
    context = ray.train.get_context()
    rank, n_workers = context.get_world_rank(), context.get_world_size()
    strategy = tf.distribute.MultiWorkerMirroredStrategy()

    history: list[dict[str, Any]] = []
    checkpoint = ray.train.get_checkpoint()
    with strategy.scope():
        if checkpoint is None:
            recipe = RECIPES[plan.model]
            model = build_trainable(
                plan.model,
                image_size=plan.image_size,
                n_features=_features_of(plan.train),
                weights=ray.get(plan.weights) if plan.weights else None,
                initial_model=ray.get(plan.initial_model) if plan.initial_model else None,
            )
            optimizer_class = getattr(keras.optimizers, recipe.optimizer)
            model.compile(optimizer=optimizer_class(plan.learning_rate), loss="binary_crossentropy")
        else:
            with checkpoint.as_directory() as folder:
                model = keras.saving.load_model(Path(folder) / "model.keras")
                history = json.loads((Path(folder) / "history.json").read_text())
        optimizer = model.optimizer
        optimizer.build(model.trainable_variables)
    callbacks = _callbacks(keras, plan, model, history)

    train_step, score_step = _steps(tf, keras, model, strategy, is_augmented=plan.is_augmented, is_xla=plan.is_xla)

    events = _Events(tf, plan.tensorboard) if rank == 0 else None
    for epoch in range(len(history) + 1, plan.epochs + 1):
        if model.stop_training:
            break
        begun = time.monotonic()
        learning_rate = float(optimizer.learning_rate.numpy())
        order = epoch_order(plan.seed, epoch, len(plan.train))
        share = batches(
            plan.train,
            order,
            batch_size=plan.batch_size,
            rank=rank,
            n_workers=n_workers,
            views=epoch_views(plan.seed, epoch, plan.train),
            draws=augmentation_draws(plan.seed, epoch, len(plan.train)) if plan.is_augmented else None,
        )
        _reseed_dropout(model, [plan.seed, epoch, rank])
        sums = _run_epoch(tf, train_step, ahead(share), plan=plan, epoch=epoch, is_speaker=rank == 0)
        trained = time.monotonic()
        loss, n_correct = (
            float(x) for x in strategy.reduce("SUM", _per_replica(tf, strategy, sums), axis=None).numpy()
        )
        scores = _score_all(
            tf, strategy, score_step, plan.val, rank=rank, n_workers=n_workers, batch_size=plan.batch_size
        )
        row = {
            "epoch": epoch,
            "train_loss": loss / len(plan.train),
            "train_accuracy": n_correct / len(plan.train),
            **_val_metrics(plan.val.label, scores),
            "learning_rate": learning_rate,
            "seconds": time.monotonic() - begun,
            "images_per_second": len(plan.train) / (trained - begun),
        }
        history.append(row)
        callbacks.on_epoch_end(epoch - 1, dict(row))
        if events is not None:
            events.write(row)
            plan.news.put(
                f"epoch {epoch}/{plan.epochs}: loss {row['train_loss']:.4f}, accuracy {row['train_accuracy']:.4f}, "
                f"val_loss {row['val_loss']:.4f}, val_accuracy {row['val_accuracy']:.4f}, val_roc_auc "
                f"{row['val_roc_auc']:.4f}, "
                f"{row['images_per_second']:.1f} images/s, {row['seconds']:.0f} s"
            )
        _report(model, row, history, is_saver=rank == 0)


class _Events:
    """TensorBoard's event file of one worker: written here, copied to the run's storage after every epoch."""

    def __init__(self, tf: Any, url: str):
        self._tf, self._url = tf, url
        self._folder = tempfile.TemporaryDirectory(prefix="malaria_ray-events-")
        self._writer = tf.summary.create_file_writer(self._folder.name)
        # What tf.summary.scalar writes, which itself needs the package tensorboard.
        scalars = tf.compat.v1.SummaryMetadata.PluginData(plugin_name="scalars")
        self._metadata = tf.compat.v1.SummaryMetadata(plugin_data=scalars)

    def write(self, row: dict[str, Any]) -> None:
        with self._writer.as_default(step=row["epoch"]):
            for name, value in row.items():
                if name != "epoch":
                    self._tf.summary.write(name, self._tf.constant(value, "float32"), metadata=self._metadata)
        self._writer.flush()
        for file in Path(self._folder.name).iterdir():
            storage.write_bytes(storage.locate(self._url) / file.name, file.read_bytes())


def _features_of(examples: Examples) -> int | None:
    """Length of a feature vector; None where the examples are images."""
    shape = ray.get(examples.parts[0]).shape
    return int(shape[1]) if len(shape) == 2 else None


def _callbacks(keras: Any, plan: TrainingPlan, model: Any, history: list[dict[str, Any]]) -> Any:
    """The article's ReduceLROnPlateau, and early stopping where patience is set, as they are after the epochs of
    `history`.
    """
    callbacks = [keras.callbacks.ReduceLROnPlateau(monitor="val_loss", factor=0.5, patience=2, min_lr=1e-6)]
    if plan.patience:
        callbacks.append(keras.callbacks.EarlyStopping(monitor="val_loss", patience=plan.patience))
    found = keras.callbacks.CallbackList(callbacks, model=model)
    found.on_train_begin()
    learning_rate = model.optimizer.learning_rate
    now = float(learning_rate.numpy())
    learning_rate.assign(plan.learning_rate)  # at the least rate a counter is not set back: begin where the run began
    for row in history:
        found.on_epoch_end(row["epoch"] - 1, dict(row))
    learning_rate.assign(now)
    return found


def _reseed_dropout(model: Any, address: list[int]) -> None:
    """Gives what dropout draws an address, so that an epoch that is done again after a resumption draws the same."""
    generators = [layer.seed_generator for layer in model.layers if hasattr(layer, "seed_generator")]
    for i, generator in enumerate(generators):
        key = np.random.SeedSequence([*address, i]).generate_state(1, np.uint32)[0]
        generator.state.assign(np.array([key, 0], np.uint32))


def _steps(
    tf: Any, keras: Any, model: Any, strategy: Any, *, is_augmented: bool = False, is_xla: bool = False
) -> tuple[Any, Any]:
    """The compiled training step, (images, labels, weights, draws, n_global) -> [summed loss, n correct] of this
    worker, and the scoring step, images -> scores.

    XLA compiles what lies between images and gradients: it knows neither the all-reduce of the workers nor the
    resampling of augmentation.
    """

    def gradients_of(images: Any, labels: Any, weights: Any, n_global: Any) -> tuple[Any, Any]:
        with tf.GradientTape() as tape:
            scores = tf.squeeze(model(images, training=True), -1)
            losses = keras.losses.binary_crossentropy(labels[:, None], scores[:, None]) * weights
            loss = tf.reduce_sum(losses) / n_global
        correct = tf.cast((scores >= 0.5) == (labels >= 0.5), tf.float32) * weights
        gradients = tape.gradient(loss, model.trainable_variables)
        return gradients, tf.stack([tf.reduce_sum(losses), tf.reduce_sum(correct)])

    def scores_of(images: Any) -> Any:
        return tf.squeeze(model(images, training=False), -1)

    if is_xla:
        gradients_of, scores_of = (tf.function(one, jit_compile=True) for one in (gradients_of, scores_of))

    def local_train_step(images: Any, labels: Any, weights: Any, draws: Any, n_global: Any) -> Any:
        if is_augmented:
            from malaria_ray.models.augmentation import augment

            images = augment(images, draws)
        gradients, sums = gradients_of(images, labels, weights, n_global)
        model.optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return sums

    def train_step(*batch: Any) -> Any:
        return strategy.run(local_train_step, args=batch)

    return tf.function(train_step), tf.function(scores_of)


def _run_epoch(
    tf: Any, train_step: Any, share: Iterator[Batch], *, plan: TrainingPlan, epoch: int, is_speaker: bool
) -> npt.NDArray[np.float64]:
    """One epoch on this worker: [summed loss, n correct] over its examples."""
    n_steps = -(-len(plan.train) // plan.batch_size)
    begun = spoken = time.monotonic()
    sums = np.zeros(2)
    pending: list[Any] = []
    n_done = 0
    for step, batch in enumerate(share, start=1):
        pending.append(
            train_step(
                tf.convert_to_tensor(batch.images),
                tf.convert_to_tensor(batch.labels),
                tf.convert_to_tensor(batch.weights),
                tf.convert_to_tensor(batch.draws),
                tf.constant(batch.n_global, tf.float32),
            )
        )
        n_done += batch.n_global
        if len(pending) == _CHECK_EVERY_STEPS or step == n_steps:
            results = np.array([result.numpy() for result in pending], np.float64)
            if not np.isfinite(results).all():
                bad = step - len(pending) + 1 + int(np.flatnonzero(~np.isfinite(results).all(axis=1))[0])
                raise TrainingError(
                    f"the loss is not a finite number at step {bad} of epoch {epoch}; the checkpoints of earlier "
                    f"epochs are kept. "
                    "Try a lower --learning-rate in a new run directory"
                )
            sums += results.sum(axis=0)
            pending.clear()
        if is_speaker and time.monotonic() - spoken > _LOG_EVERY_S:
            spoken = time.monotonic()
            rate = n_done / (spoken - begun)
            left = (len(plan.train) - n_done) / rate
            plan.news.put(
                f"epoch {epoch}/{plan.epochs} step {step}/{n_steps}: {rate:.1f} images/s, {left:.0f} s left in the "
                f"epoch"
            )
    return sums


def _score_all(
    tf: Any, strategy: Any, score_step: Any, examples: Examples, *, rank: int, n_workers: int, batch_size: int
) -> npt.NDArray[np.float32]:
    """The scores of all examples, float32 (n,), in their order, computed by all workers together."""
    order = np.arange(len(examples))
    mine = [
        score_step(batch.images).numpy()
        for batch in ahead(batches(examples, order, batch_size=batch_size, rank=rank, n_workers=n_workers))
    ]
    if n_workers == 1:
        return np.concatenate(mine)[: len(examples)]
    # Worker r holds at place i of batch b the example b * batch_size + i * n_workers + r.
    gathered = strategy.gather(_per_replica(tf, strategy, np.stack(mine)[None]), axis=0).numpy()
    scores = np.full(len(examples), np.nan, np.float32)
    for r in range(n_workers):
        for b in range(gathered.shape[1]):
            places = order[b * batch_size : (b + 1) * batch_size][r::n_workers]
            scores[places] = gathered[r, b, : len(places)]
    return scores


def _per_replica(tf: Any, strategy: Any, value: Any) -> Any:
    """This worker's `value` as its part of a distributed value, which reductions and gathers take."""
    return strategy.run(lambda: tf.convert_to_tensor(value))


def _val_metrics(label: npt.NDArray[np.float32], scores: npt.NDArray[np.float32]) -> dict[str, float]:
    from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

    if not np.isfinite(scores).all():
        raise TrainingError("the model scores validation images with NaN; the checkpoints of earlier epochs are kept")
    truth = label.astype(int)
    return {
        "val_loss": float(log_loss(truth, scores.astype(np.float64).clip(_EPSILON, 1 - _EPSILON), labels=[0, 1])),
        "val_accuracy": float(accuracy_score(truth, scores >= 0.5)),
        "val_roc_auc": float(roc_auc_score(truth, scores)),
    }


def _report(model: Any, row: dict[str, Any], history: list[dict[str, Any]], *, is_saver: bool) -> None:
    """Reports an epoch; rank 0 with the whole model, optimizer state and history so far."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if is_saver:
            model.save(Path(folder) / "model.keras")
            (Path(folder) / "history.json").write_text(json.dumps(history))
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report(row, checkpoint=checkpoint)
