"""Training side by side in one run: python -m tests.benchmarks.training [N_IMAGES [IMAGE_SIZE]].

The article's cnn on random images: the bare compiled step on arrays in memory, Keras' fit, and our worker through Ray
Train with all that feeds it, one worker with two threads; then at a global batch of 256 one worker with two threads
against two workers with one each. Last an epoch of the frozen head against one that runs the backbone too.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from typing import Any

import numpy as np
import ray
from ray.util.queue import Queue
from upath import UPath

from malaria_ray.models.training import Examples, TrainingPlan
from malaria_ray.stages import train

N_THREADS, BATCH_SIZE, LARGE_BATCH_SIZE = 2, 64, 256


def images_of(n: int, size: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (n, size, size, 3), np.uint8), rng.integers(0, 2, n).astype(np.float32)


@ray.remote(num_cpus=N_THREADS)
def bare_rates(n: int, size: int) -> tuple[float, float]:
    """Images per second of the bare compiled step and of Keras' fit, first steps left out."""
    os.environ.pop("TF_USE_LEGACY_KERAS", None)
    import keras
    import tensorflow as tf

    from malaria_ray.models.building import build_trainable

    tf.config.threading.set_intra_op_parallelism_threads(N_THREADS)
    tf.config.threading.set_inter_op_parallelism_threads(N_THREADS)
    images, labels = images_of(BATCH_SIZE, size)
    model = build_trainable("cnn", image_size=size)
    optimizer = keras.optimizers.Adam(1e-3)
    optimizer.build(model.trainable_variables)

    @tf.function
    def step(batch: Any, truth: Any) -> Any:
        with tf.GradientTape() as tape:
            scores = model(batch, training=True)
            loss = tf.reduce_mean(keras.losses.binary_crossentropy(truth[:, None], scores))
        optimizer.apply_gradients(
            zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True)
        )
        return loss

    batch, truth = tf.constant(images), tf.constant(labels)
    step(batch, truth).numpy()
    n_steps = -(-n // BATCH_SIZE)
    begun = time.monotonic()
    for _ in range(n_steps):
        loss = step(batch, truth)
    loss.numpy()
    bare = n_steps * BATCH_SIZE / (time.monotonic() - begun)

    images, labels = images_of(n, size)
    model.compile(optimizer=keras.optimizers.Adam(1e-3), loss="binary_crossentropy")
    model.fit(images[:BATCH_SIZE], labels[:BATCH_SIZE], batch_size=BATCH_SIZE, verbose=0)
    begun = time.monotonic()
    model.fit(images, labels, batch_size=BATCH_SIZE, verbose=0)
    return bare, n / (time.monotonic() - begun)


@ray.remote(num_cpus=N_THREADS)
def backbone_rate(size: int) -> float:
    """Images per second of VGG-19's forward pass alone, compiled."""
    os.environ.pop("TF_USE_LEGACY_KERAS", None)
    import tensorflow as tf

    from malaria_ray.models.building import build_backbone

    tf.config.threading.set_intra_op_parallelism_threads(N_THREADS)
    forward = tf.function(build_backbone(image_size=size, weights=None))
    batch = tf.constant(images_of(BATCH_SIZE, size)[0])
    forward(batch)
    begun = time.monotonic()
    for _ in range(3):
        forward(batch).numpy()
    return 3 * BATCH_SIZE / (time.monotonic() - begun)


def our_rate(model: Any, inputs: Any, labels: Any, *, size: int, batch_size: int, n_workers: int) -> float:
    """Images per second of the second epoch by Ray Train, which no start and no compilation is in."""
    n = len(labels)
    everything = Examples(
        parts=[ray.put(inputs)], part=np.zeros(n, np.int32), row=np.arange(n, dtype=np.int32), label=labels
    )
    few = Examples(
        parts=everything.parts, part=everything.part[:32], row=everything.row[:32], label=np.arange(32.0) % 2
    )
    config = train.Config(dataset="", run="", model=model, batch_size=batch_size, num_workers=n_workers, max_failures=0)
    with tempfile.TemporaryDirectory() as folder:
        plan = TrainingPlan(
            model=model,
            image_size=size,
            epochs=2,
            batch_size=batch_size,
            learning_rate=1e-5,
            patience=0,
            seed=0,
            n_threads=N_THREADS // n_workers,
            train=everything,
            val=few,
            news=Queue(actor_options={"num_cpus": 0}),
            faults=Queue(actor_options={"num_cpus": 0}),
            tensorboard=f"{folder}/tensorboard",
        )
        history, _ = train._history(train._fit(plan, UPath(folder), config))
    return float(history["images_per_second"].iloc[1])


def main() -> None:
    n, size = (int(sys.argv[i]) if len(sys.argv) > i else default for i, default in ((1, 4096), (2, 125)))
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    ray.init(
        address="local", num_cpus=N_THREADS, include_dashboard=False, log_to_driver=False, logging_level="CRITICAL"
    )
    images, labels = images_of(n, size)
    bare, keras_fit = ray.get(bare_rates.remote(n, size))
    one = our_rate("cnn", images, labels, size=size, batch_size=BATCH_SIZE, n_workers=1)
    print(f"batch {BATCH_SIZE}: bare step {bare:.1f}, Keras fit {keras_fit:.1f}, ours {one:.1f} images/s;", end=" ")
    print(f"ours / bare {one / bare:.2f}")
    large = [our_rate("cnn", images, labels, size=size, batch_size=LARGE_BATCH_SIZE, n_workers=k) for k in (1, 2)]
    print(f"batch {LARGE_BATCH_SIZE}: one worker × 2 threads {large[0]:.1f}, two × 1 {large[1]:.1f} images/s;", end=" ")
    print(f"ratio {large[1] / large[0]:.2f}")
    features = np.random.default_rng(1).random((n, 512 * (size // 32) ** 2)).astype(np.float16)
    head = our_rate("vgg19-frozen", features, labels, size=size, batch_size=BATCH_SIZE, n_workers=1)
    backbone = ray.get(backbone_rate.remote(size))
    whole = 1 / (1 / head + 1 / backbone)  # of an epoch that runs both
    print(f"frozen VGG-19: head {head:.0f}, with the backbone {whole:.1f} images/s; an epoch is 1/{head / whole:.0f}")
    ray.shutdown()


if __name__ == "__main__":
    main()
