"""`vgg19-finetuned` on a machine with a GPU, Keras and JAX, but without TensorFlow, Ray or the archive.

    python -m tests.benchmarks.finetuning_on_jax pack DATASET FROZEN FOLDER       # here: what the machine needs
    python -m tests.benchmarks.finetuning_on_jax train FOLDER WEIGHTS OUT [--…]   # there: KERAS_BACKEND=jax
    python -m tests.benchmarks.finetuning_on_jax adopt DATASET FROZEN OUT RUN     # here: a run as `train` makes it

The network, the augmentation and its draws, the order of the images, the optimizer and the callbacks are those of
`malaria-ray train DATASET RUN --model vgg19-finetuned --init-from FROZEN`; the step alone is written anew, for JAX.
What comes back is small: the best epoch's trained weights as their float16 differences from those they started from,
of which the largest was 0.0054, so that their sums were exact to 3e-6, and the scores of every epoch. `adopt` gives
them to the very code that ends a training: export, calibration, novelty, learning curves.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from tyro.conf import Positional

_PART_VALUES = 7_000_000  # float16, of a file that comes back: 14 MB
_PART_IMAGES = 4_000
_SCORED_AT_ONCE = 256


def pack(dataset: Positional[str], frozen: Positional[str], folder: Positional[Path]) -> None:
    """Writes the images (lossless WebP, 4,000 a file) and, of the run FROZEN, its splits and its head's weights."""
    from malaria_ray.runtime import storage

    crops = storage.read_table(storage.locate(dataset) / "crops", ["image_id", "label", "image"]).sort_by("image_id")
    splits = storage.read_table(storage.locate(frozen) / "splits.parquet", ["image_id", "split"]).sort_by("image_id")
    assert crops["image_id"].equals(splits["image_id"])
    size = int((crops.schema.field("image").type.byte_width // 3) ** 0.5)
    images = [np.frombuffer(image, np.uint8).reshape(size, size, 3) for image in crops["image"].to_pylist()]
    packed = [cv2.imencode(".webp", image, [cv2.IMWRITE_WEBP_QUALITY, 101])[1].tobytes() for image in images]
    assert all(np.array_equal(_unpacked(one), image) for one, image in zip(packed[::100], images[::100], strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(packed), _PART_IMAGES):
        table = pa.table({"image": packed[start : start + _PART_IMAGES]})
        pq.write_table(table, folder / f"images-{start // _PART_IMAGES}.parquet", compression="none")
    np.savez_compressed(
        folder / f"{Path(frozen).name}.npz",
        label=crops["label"].to_numpy().astype(np.float32),
        split=np.array(splits["split"].to_pylist()),
        **{f"head_{i}": value for i, value in enumerate(_head_of(frozen))},
    )


def train(
    folder: Positional[Path],
    weights: Positional[Path],
    out: Positional[Path],
    *,
    frozen: str = "frozen",
    epochs: int = 25,
    patience: int = 5,
    batch_size: int = 64,
    learning_rate: float = 1e-5,
    seed: int = 42,
    only_head: bool = False,
) -> None:
    """Trains on what `pack` wrote to FOLDER, from the head of the run FROZEN, and writes what `adopt` takes to OUT.

    With `only_head` the backbone stays as it is and the head begins anew: a `vgg19-frozen` that sees other images in
    every epoch, which the product's, whose features are made once, cannot.
    """
    import jax
    import keras
    from jax import numpy as jnp

    from malaria_ray.models import vgg19
    from malaria_ray.models.augmentation import augment, augmentation_draws

    of_run = np.load(folder / f"{frozen}.npz")
    parts = sorted(folder.glob("images-*.parquet"), key=lambda path: int(path.stem.split("-")[1]))
    packed = [image for part in parts for image in pq.read_table(part)["image"].to_pylist()]
    images = jnp.asarray(np.stack([_unpacked(image) for image in packed]))
    label, split = of_run["label"], of_run["split"]
    of_train, of_val = np.flatnonzero(split == "train"), np.flatnonzero(split == "val")
    assert len(images) == len(label)

    keras.utils.set_random_seed(seed)
    model = vgg19.build_finetuned(images.shape[1], str(weights))
    if only_head:
        for layer in model.layers:
            layer.trainable = layer.trainable and not layer.name.startswith("block")
    else:
        _set_head(model, [of_run[f"head_{i}"] for i in range(6)])
    model.compile(optimizer=keras.optimizers.RMSprop(learning_rate), loss="binary_crossentropy")
    optimizer = model.optimizer
    optimizer.build(model.trainable_variables)
    callbacks = keras.callbacks.CallbackList(
        [
            keras.callbacks.ReduceLROnPlateau(monitor="val_loss", factor=0.5, patience=2, min_lr=1e-6),
            *([keras.callbacks.EarlyStopping(monitor="val_loss", patience=patience)] if patience else []),
        ],
        model=model,
    )
    callbacks.on_train_begin()

    @jax.jit
    def step(images: Any, state: Any, chosen: Any, labels: Any, draws: Any) -> Any:
        changed = augment(images[chosen], draws)

        def loss_of(trainable: Any, others: Any) -> Any:
            scores, others = model.stateless_call(trainable, others, changed, training=True)
            losses = keras.losses.binary_crossentropy(labels[:, None], scores)
            n_correct = jnp.sum((scores[:, 0] >= 0.5) == (labels >= 0.5))
            return jnp.mean(losses), (others, jnp.stack([jnp.sum(losses), n_correct.astype("float32")]))

        trainable, others, of_optimizer = state
        (_, (others, sums)), gradients = jax.value_and_grad(loss_of, has_aux=True)(trainable, others)
        trainable, of_optimizer = optimizer.stateless_apply(of_optimizer, gradients, trainable)
        return (trainable, others, of_optimizer), sums

    @jax.jit
    def scores_of(images: Any, trainable: Any, others: Any, chosen: Any) -> Any:
        return model.stateless_call(trainable, others, images[chosen], training=False)[0][:, 0]

    def score(chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        trainable, others = ([v.value for v in vs] for vs in (model.trainable_variables, model.non_trainable_variables))
        starts = range(0, len(chosen), _SCORED_AT_ONCE)
        return np.concatenate([scores_of(images, trainable, others, chosen[s : s + _SCORED_AT_ONCE]) for s in starts])

    begun_with = [np.asarray(v.value) for v in model.trainable_variables]
    best, best_loss = begun_with, np.inf
    history, of_epochs = [], []
    for epoch in range(1, epochs + 1):
        if model.stop_training:
            break
        begun = time.monotonic()
        rate = float(optimizer.learning_rate.value)
        order = np.random.default_rng([seed, epoch]).permutation(len(of_train))
        draws = augmentation_draws(seed, epoch, len(of_train))
        variables = (model.trainable_variables, model.non_trainable_variables, optimizer.variables)
        state = tuple([v.value for v in some] for some in variables)
        sums = []
        for start in range(0, len(order), batch_size):
            mine = order[start : start + batch_size]
            state, of_step = step(images, state, of_train[mine], label[of_train[mine]], draws[mine])
            sums.append(of_step)
        loss, n_correct = np.sum(np.asarray(jnp.stack(sums), np.float64), axis=0)
        trained = time.monotonic()
        for some, values in zip(variables, state, strict=True):
            for variable, value in zip(some, values, strict=True):
                variable.assign(value)
        scores = score(of_val)
        of_epochs.append(scores)
        clipped = scores.astype(np.float64).clip(1e-7, 1 - 1e-7)
        truth = label[of_val]
        val_loss = float(-np.mean(truth * np.log(clipped) + (1 - truth) * np.log(1 - clipped)))
        history.append(
            {
                "epoch": epoch,
                "train_loss": loss / len(of_train),
                "train_accuracy": n_correct / len(of_train),
                "learning_rate": rate,
                "seconds": time.monotonic() - begun,
                "images_per_second": len(of_train) / (trained - begun),
            }
        )
        accuracy = float(np.mean((scores >= 0.5) == (truth >= 0.5)))
        print(f"{history[-1]} val_loss {val_loss:.4f} val_accuracy {accuracy:.4f}", flush=True)
        if val_loss < best_loss:
            best, best_loss = [np.asarray(v.value) for v in model.trainable_variables], val_loss
        callbacks.on_epoch_end(epoch - 1, {"val_loss": val_loss})

    changes = np.concatenate([(b - a).ravel() for a, b in zip(begun_with, best, strict=True)]).astype(np.float16)
    _apply_changes(model, begun_with, changes)
    all_scores = score(np.arange(len(label)))
    is_right = (all_scores >= 0.5) == (label >= 0.5)
    print({name: float(is_right[split == name].mean()) for name in ("train", "val", "test")})
    out.mkdir(parents=True, exist_ok=True)
    if not only_head:
        for start in range(0, len(changes), _PART_VALUES):
            np.save(out / f"changes-{start // _PART_VALUES}.npy", changes[start : start + _PART_VALUES])
    np.savez_compressed(out / "scores.npz", all=all_scores, val=np.stack(of_epochs))
    device = jax.devices()[0].device_kind
    facts = {
        "device": device,
        "jax": jax.__version__,
        "keras": keras.__version__,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "patience": patience,
        "seed": seed,
        "max_epochs": epochs,
        "history": history,
    }
    (out / "history.json").write_text(json.dumps(facts))


def adopt(
    dataset: Positional[str], frozen: Positional[str], out: Positional[Path], run: Positional[str], *, split_by: str
) -> None:
    """Makes RUN of what `train` left in OUT, by the code that ends `malaria-ray train`, without training a step."""
    import ray.train

    from malaria_ray.models.training import _val_metrics
    from malaria_ray.stages import train as stage

    facts = json.loads((out / "history.json").read_text())
    scores = np.load(out / "scores.npz")
    parts = sorted(out.glob("changes-*.npy"), key=lambda path: int(path.stem.split("-")[1]))
    changes = np.concatenate([np.load(part) for part in parts])

    def checkpoint_of(plan: Any, *_: Any) -> Any:
        labels = plan.val.label
        history = [
            row | _val_metrics(labels, of_epoch) for row, of_epoch in zip(facts["history"], scores["val"], strict=True)
        ]
        best = min(history, key=lambda row: row["val_loss"])
        initial = ray.get(plan.initial_model)
        ray.get(ray.remote(_save).remote(folder, frozen, initial, plan.image_size, changes, history))
        checkpoint = ray.train.Checkpoint.from_directory(folder)
        return SimpleNamespace(checkpoint=checkpoint, best_checkpoints=[(checkpoint, best)])

    config = stage.Config(
        dataset=dataset,
        run=run,
        model="vgg19-finetuned",
        split_by=split_by,  # type: ignore[arg-type]
        init_from=frozen,
        epochs=facts["max_epochs"],
        patience=facts["patience"],
        batch_size=facts["batch_size"],
        learning_rate=facts["learning_rate"],
        seed=facts["seed"],
    )
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(stage, "_fit", checkpoint_of):
        stage.run(config)


def _save(
    folder: str, frozen: str, initial: bytes, image_size: int, changes: npt.NDArray[np.float16], history: list[Any]
) -> None:
    """A checkpoint as a worker's: `model.keras` and `history.json`."""
    os.environ.pop("TF_USE_LEGACY_KERAS", None)
    import keras

    from malaria_ray.models.building import build_trainable

    model = build_trainable("vgg19-finetuned", image_size=image_size, initial_model=initial)
    _set_head(model, _head_of(frozen))
    _apply_changes(model, [v.numpy() for v in model.trainable_variables], changes)
    model.compile(optimizer=keras.optimizers.RMSprop(history[-1]["learning_rate"]), loss="binary_crossentropy")
    model.save(Path(folder) / "model.keras")
    (Path(folder) / "history.json").write_text(json.dumps(history))


def _head_of(frozen: str) -> list[npt.NDArray[np.float16]]:
    """Kernels and biases of the three dense layers, rounded to what travels."""
    import keras

    model = keras.saving.load_model(f"{frozen}/model.keras", compile=False)
    return [value.astype(np.float16) for value in model.get_weights()[-6:]]


def _set_head(model: Any, head: list[npt.NDArray[np.float16]]) -> None:
    layers = [layer for layer in model.layers if layer.weights][-3:]
    for layer, kernel, bias in zip(layers, head[::2], head[1::2], strict=True):
        layer.set_weights([kernel.astype(np.float32), bias.astype(np.float32)])


def _apply_changes(model: Any, begun_with: list[npt.NDArray[np.float32]], changes: npt.NDArray[np.float16]) -> None:
    start = 0
    for variable, value in zip(model.trainable_variables, begun_with, strict=True):
        variable.assign(value + changes[start : start + value.size].astype(np.float32).reshape(value.shape))
        start += value.size
    assert start == len(changes)


def _unpacked(image: bytes) -> npt.NDArray[np.uint8]:
    return cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"pack": pack, "train": train, "adopt": adopt})
