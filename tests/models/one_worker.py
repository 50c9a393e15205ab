"""One of N training processes as Ray Train starts them, without Ray: some steps on a small network, weights to a file.

python one_worker.py OUT.npz RANK PORT [PORT …]: one port on this machine for each worker.
"""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace

import numpy as np

out, rank, *ports = sys.argv[1:]
n_workers = len(ports)
os.environ["TF_CONFIG"] = json.dumps(
    {
        "cluster": {"worker": [f"127.0.0.1:{port}" for port in ports]},
        "task": {"type": "worker", "index": int(rank)},
    }
)
os.environ.pop("TF_USE_LEGACY_KERAS", None)

import keras  # noqa: E402
import tensorflow as tf  # noqa: E402

from malaria_ray.models import training  # noqa: E402

N_EXAMPLES, BATCH_SIZE, N_EPOCHS = 37, 10, 2  # 37 = 3 × 10 + 7: the last batch is uneven for every number of workers

training.ray = SimpleNamespace(get=lambda reference: reference)  # the arrays are in this process already
rng = np.random.default_rng(5)
pixels = rng.integers(0, 256, (N_EXAMPLES, 8, 8, 3), np.uint8)
examples = training.Examples(
    parts=[pixels],
    part=np.zeros(N_EXAMPLES, np.int32),
    row=np.arange(N_EXAMPLES, dtype=np.int32),
    label=rng.integers(0, 2, N_EXAMPLES).astype(np.float32),
)
keras.utils.set_random_seed(1)
strategy = tf.distribute.MultiWorkerMirroredStrategy()
with strategy.scope():
    inputs = keras.Input((8, 8, 3), dtype="uint8")
    hidden = keras.layers.Conv2D(4, 3, activation="relu")(keras.layers.Rescaling(1 / 255)(inputs))
    score = keras.layers.Dense(1, activation="sigmoid")(keras.layers.Flatten()(hidden))  # no dropout: its masks differ
    model = keras.Model(inputs, score)
    model.compile(optimizer=keras.optimizers.Adam(1e-2), loss="binary_crossentropy")
    model.optimizer.build(model.trainable_variables)
train_step, score_step = training._steps(tf, keras, model, strategy)
sums = []
for epoch in range(1, N_EPOCHS + 1):
    order = training.epoch_order(3, epoch, N_EXAMPLES)
    share = training.batches(examples, order, batch_size=BATCH_SIZE, rank=int(rank), n_workers=n_workers)
    plan = SimpleNamespace(train=examples, batch_size=BATCH_SIZE, epochs=N_EPOCHS)
    local = training._run_epoch(tf, train_step, share, plan=plan, epoch=epoch, is_speaker=False)
    sums.append(strategy.reduce("SUM", training._per_replica(tf, strategy, local), axis=None).numpy())
scores = training._score_all(
    tf, strategy, score_step, examples, rank=int(rank), n_workers=n_workers, batch_size=BATCH_SIZE
)
np.savez(out, *model.get_weights(), sums=np.array(sums), scores=scores)
