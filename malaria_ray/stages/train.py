"""train: a dataset becomes a run. Split by patient → Ray Train → the best epoch's weights as model.keras and
model.onnx.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import ray
import ray.train
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tyro.conf import Positional
from upath import UPath

from malaria_ray.cells.copies import is_copy
from malaria_ray.cells.crops import crop_pixels
from malaria_ray.cells.images import Pixels
from malaria_ray.cells.splits import SplitBy, assign_splits
from malaria_ray.cells.synthetic import has_synthetic
from malaria_ray.errors import ConfigError, DatasetError, MalariaRayError, TrainingError
from malaria_ray.models import MIN_VGG19_SIZE, RECIPES, ModelName, Precision
from malaria_ray.models.engines import Scores, read_run_file
from malaria_ray.models.export import export
from malaria_ray.models.features import FLIPS, feature_parts, read_features
from malaria_ray.models.training import Examples, TrainingPlan, train_worker
from malaria_ray.models.validating import Validated, validate
from malaria_ray.models.weights import load_weights
from malaria_ray.runtime import outputs, storage
from malaria_ray.runtime.quiet import stderr_silenced
from malaria_ray.runtime.seeds import check_seed
from malaria_ray.runtime.session import cpus_for_each_of, is_room_made, may_grow, n_cpus, ray_session, room_for
from malaria_ray.schema import HISTORY, SPLITS, Label, Split
from malaria_ray.stages.pictures import augmented_figure, learning_curves_figure
from malaria_ray.statistics.calibration import check_specificity
from malaria_ray.statistics.validation import Validation, learn_from_validation

log = logging.getLogger("malaria_ray")

_WAIT_FOR_NODES_S = 600  # a machine of a cloud with a GPU takes minutes to start
_POLL_S = "0.5"  # how often Ray takes one report of an epoch from each worker; by default no epoch could end within 2 s
_N_PROBE = 64  # real crops on which model.keras and model.onnx are compared


@dataclass(frozen=True, kw_only=True)
class Config:
    """Trains a model on a dataset and writes a run: weights, splits, history and learning curves."""

    dataset: Positional[str]
    """Dataset made by 'malaria-ray ingest'."""
    run: Positional[str]
    """Directory to write, made if missing."""
    model: ModelName
    """cnn: from scratch; vgg19-frozen: a head on VGG-19's features; vgg19-finetuned: its blocks 4 and 5 too."""
    split_by: SplitBy = "patient"
    """Keep each patient's cells in one split, or split image by image as the article does, which leaks patients."""
    epochs: int = 25
    """Epochs at most. A run of fewer, the rest being the same, goes on from its last one."""
    patience: int = 5
    """Stop after so many epochs without a lower validation loss; 0 never stops."""
    batch_size: int = 64
    """Images a step, over all workers together."""
    learning_rate: float | None = None
    """By default the article's: 1e-3 (Adam) for cnn, 1e-4 and 1e-5 (RMSprop) for vgg19-frozen and vgg19-finetuned.
    Halved after two epochs without a lower validation loss."""
    weights: str | None = None
    """VGG-19 weights: imagenet (the default), a path or a URL, if wanted with '#sha256=…'; with --init-from that
    run's."""
    init_from: str | None = None
    """Run of vgg19-frozen on the same split whose weights vgg19-finetuned starts from, head and all."""
    augment: Literal["default", "on", "off"] = "default"
    """Change the training images at random (turned, flipped, shifted, zoomed, sheared, recoloured), each epoch anew; by
    default as the article: vgg19-finetuned only. vgg19-frozen, which sees features, gets those of the image and of its
    three mirrorings, made once in four times the time."""
    precision: Precision = "float32"
    """bf16: layers compute in bfloat16, about twice as fast on hardware for it; weights and loss stay float32."""
    xla: bool = False
    """Compile the training step by XLA."""
    folds: int | None = None
    """Cross-validation: the test split is one of so many folds instead of 30 %; goes with --fold."""
    fold: int | None = None
    """Which of the --folds is the test split, 1 the first."""
    num_workers: int | str = 1
    """Training processes, over the nodes of the cluster; 1-4: as many of them as the cluster has room for."""
    cpus_per_worker: int | None = None
    """CPUs and threads of each; by default as many as the nodes can give every worker."""
    gpus_per_worker: int = 0
    """GPUs of each."""
    max_failures: int = 3
    """How often lost workers are started again from the last checkpoint before training stops."""
    specificity: float | None = None
    """Set the threshold for this specificity on the validation cells, 0.99 say; else it is 0.5."""
    seed: int = 42
    """Seed of the split, the weights and the order of the images."""
    overwrite: bool = False
    """Delete the run first if it is there."""

    def __post_init__(self) -> None:
        for name, value, low in (
            ("--epochs", self.epochs, 1),
            ("--patience", self.patience, 0),
            ("--batch-size", self.batch_size, 1),
            ("--num-workers", self.workers[0], 1),
            ("--gpus-per-worker", self.gpus_per_worker, 0),
            ("--cpus-per-worker", self.cpus_per_worker, 1),
            ("--max-failures", self.max_failures, 0),
        ):
            if value is not None and value < low:
                raise ConfigError(f"{name} {value}: must be at least {low}")
        check_seed(self.seed)
        if (self.folds is None) != (self.fold is None) or (
            self.folds is not None and self.fold is not None and not (self.folds >= 2 and 1 <= self.fold <= self.folds)
        ):
            raise ConfigError(
                f"--folds {self.folds or 'not given'}, --fold {self.fold or 'not given'}: both are needed, at least 2 "
                "folds, and a fold of 1 to that"
            )
        if self.workers[1] > self.batch_size:
            raise ConfigError(
                f"--num-workers {self.num_workers}: each needs an image of the batch of {self.batch_size}"
            )
        if self.init_from is not None and self.model != "vgg19-finetuned":
            raise ConfigError(f"--init-from goes with --model vgg19-finetuned, not with {self.model}")
        if self.weights is not None and not RECIPES[self.model].needs_weights:
            raise ConfigError(f"--weights goes with a VGG-19, not with --model {self.model}, which starts from none")
        if self.weights is not None and self.init_from is not None:
            raise ConfigError("--weights and --init-from: that run has all weights already; leave --weights out")
        if self.learning_rate is not None and not 0 < self.learning_rate <= 1:
            raise ConfigError(f"--learning-rate {self.learning_rate}: allowed are numbers above 0 and up to 1")

    @property
    def workers(self) -> tuple[int, int]:
        """The least and the greatest number of workers. Raises: `ConfigError`."""
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", str(self.num_workers))
        least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= least <= most:
            raise ConfigError(f"--num-workers {self.num_workers}: must be at least 1, or a range such as 1-4")
        return least, most


@outputs.one_writer()
def run(config: Config) -> None:
    """Makes the run; does nothing where it is finished; goes on from the last checkpoint where an earlier run
    stopped.
    """
    begun = time.monotonic()
    path, dataset = storage.locate(config.run), storage.locate(config.dataset)
    success = outputs.check_complete(dataset, "ingest")
    image_size = outputs.read_config(dataset, "ingest")["identity"]["image_size"]
    recipe = RECIPES[config.model]
    if recipe.needs_weights and image_size < MIN_VGG19_SIZE:
        raise ConfigError(
            f"{dataset} has crops of {image_size} × {image_size} pixels; {config.model} takes {MIN_VGG19_SIZE} × "
            f"{MIN_VGG19_SIZE} or larger: ingest the archive with a larger --image-size"
        )
    learning_rate = config.learning_rate or recipe.learning_rate
    is_augmented = recipe.is_augmented if config.augment == "default" else config.augment == "on"
    same_split = {
        "dataset_digest": success["dataset_digest"],
        "split_by": config.split_by,
        "seed": config.seed,
        "fold": f"{config.fold} of {config.folds}" if config.folds else None,
    }
    weights, weights_digest, initial_run, initial_model = None, None, None, None
    if config.init_from is not None:
        initial_run, weights_digest, initial_model = _initial_run(config.init_from, same_split)
    elif recipe.needs_weights:
        weights = load_weights(config.weights or "imagenet")
        weights_digest = weights.sha256
    identity = {
        **same_split,
        "image_size": image_size,
        "learning_rate": learning_rate,
        "weights": weights_digest,
        "init_from": initial_run,
        "augment": is_augmented,
        **{
            name: getattr(config, name)
            for name in ("model", "epochs", "patience", "batch_size", "precision", "xla", "specificity")
        },
    }
    crops = outputs.files_in(dataset, success, "crops")
    cells = _cells(crops)
    splits = assign_splits(cells, by=config.split_by, seed=config.seed, n_folds=config.folds, fold=config.fold)
    if config.specificity is not None:
        uninfected = cells[(splits == Split.val) & (cells["label"] == Label.uninfected)]
        check_specificity(config.specificity, int((~is_copy(uninfected)).sum()))
    claim = outputs.claim(
        path,
        stage="train",
        config=config,
        identity=identity,
        overwrite=config.overwrite,
        inputs=[
            config.dataset,
            *([] if config.weights in (None, "imagenet") else [config.weights]),
            *([] if config.init_from is None else [config.init_from]),
        ],
        may_grow="epochs",
        may_change="specificity",  # it is looked at after the last epoch
    )
    if claim is None:
        log.info("%s is finished; nothing to do (--overwrite trains anew)", path)
        return
    log.info(
        "%s images of %s patients: %s",
        f"{len(cells):,}",
        cells["patient_id"].nunique(),
        ", ".join(f"{split} {int((splits == split).sum()):,}" for split in Split),
    )
    if n_copies := int(is_copy(cells).sum()):
        log.info(
            "%s images are copies of others, byte for byte%s",
            f"{n_copies:,}",
            "; copies are in one split" if config.split_by == "image" else "",
        )
    with ray_session():
        least, most = config.workers
        _check_resources(least, config.cpus_per_worker or 1, config.gpus_per_worker)
        # Only now: of a cluster at rest no node is there yet.
        n_threads = config.cpus_per_worker or cpus_for_each_of(most, gpus=config.gpus_per_worker)
        claim.begin()
        files = outputs.write_table(path, "splits.parquet", _splits_table(cells, splits), stage="train")
        pixels = _load(_load_pixels, [(storage.as_url(part), digest, image_size) for part, digest in crops])
        inputs, n_views = pixels, 1
        if config.model == "vgg19-frozen":
            assert weights is not None
            folder = dataset / "features" / f"vgg19-{weights.sha256[:12]}-{success['dataset_digest']}"
            n_views = len(FLIPS) if is_augmented else 1
            of_parts = feature_parts(
                crops,
                folder,
                weights=weights.content,
                image_size=image_size,
                n_actors=n_cpus(),
                flips=FLIPS[:n_views],
            )
            inputs = _load(read_features, [(storage.as_url(part),) for part in of_parts])
        prepared = time.monotonic()
        is_val = splits == Split.val
        plan = TrainingPlan(
            model=config.model,
            image_size=image_size,
            epochs=config.epochs,
            batch_size=config.batch_size,
            learning_rate=learning_rate,
            patience=config.patience,
            seed=config.seed,
            n_threads=n_threads,
            precision=config.precision,
            is_augmented=is_augmented and config.model != "vgg19-frozen",
            is_xla=config.xla,
            train=_examples(cells, splits == Split.train, inputs, n_views=n_views),
            val=_examples(cells, is_val, inputs[: len(pixels)]),
            weights=ray.put(weights.content) if weights else None,
            initial_model=ray.put(initial_model) if initial_model else None,
            news=_queue(),
            faults=_queue(),
            tensorboard=storage.as_url(path / "tensorboard"),
        )
        with _news(plan.news):
            result = _fit(plan, path, config)
        trained = time.monotonic()
        history, best, best_epoch = _history(result)
        log.info("epoch %d is the best; writing its model and scoring the validation images", best_epoch)
        of_val = _examples(cells, is_val, pixels)
        exported = _export(best, plan, of_val)
        validated = _validate(exported["onnx"], plan, train=_examples(cells, splits == Split.train, pixels), val=of_val)
        if plan.is_augmented:
            samples = _augmented_samples(plan)
            storage.write_bytes(path / "augmented_samples.png", augmented_figure(*samples, "Training images, changed"))
            files["augmented_samples.png"] = storage.record_of(path / "augmented_samples.png")

    outputs.check_held(path)
    validation = _learn(cells, splits, validated.scores, specificity=config.specificity)
    storage.write_json(path / "validation.json", validation.to_dict())
    storage.write_bytes(path / "novelty.npz", validated.novelty.to_bytes())
    for name in ("validation.json", "novelty.npz"):
        files[name] = storage.record_of(path / name)
    for name in ("keras", "onnx"):
        storage.write_bytes(path / f"model.{name}", exported[name])
        files[f"model.{name}"] = storage.record_of(path / f"model.{name}")
    table = pa.Table.from_pandas(history, schema=HISTORY.arrow_schema(), preserve_index=False)
    files |= outputs.write_table(path, "history.parquet", table, stage="train")
    best_row = history[history["epoch"] == best_epoch].iloc[0]
    run_id = f"{config.model}-{hashlib.sha256(exported['onnx']).hexdigest()[:12]}"
    heading = f"{run_id}, split by {config.split_by}"
    if has_synthetic(pa.array(cells["image_id"])):
        heading += " · SYNTHETIC"
    figure = learning_curves_figure(history, best_epoch=int(best_row["epoch"]), heading=heading)
    storage.write_bytes(path / "learning_curves.png", figure)
    files["learning_curves.png"] = storage.record_of(path / "learning_curves.png")
    outputs.finish(
        path,
        counts={"n_epochs": len(history), **{f"n_{split}": int((splits == split).sum()) for split in Split}},
        files=files,
        run_id=run_id,
        model=config.model,
        image_size=image_size,
        threshold=validation.threshold,
        parameters=exported["parameters"],
        layers=exported["layers"],
        onnx_max_difference=exported["max_difference"],
        best=best_row.to_dict(),
        timings={
            "preparation_s": round(prepared - begun, 1),
            "training_s": round(trained - prepared, 1),
            "total_s": round(time.monotonic() - begun, 1),
        },
    )
    log.info(
        "best epoch %d of %d: val_accuracy %.4f, val_loss %.4f, val_roc_auc %.4f",
        best_row["epoch"],
        len(history),
        best_row["val_accuracy"],
        best_row["val_loss"],
        best_row["val_roc_auc"],
    )
    log.info("called parasitized from a calibrated score of %.4g", validation.threshold)
    log.info(
        "%s parameters, %s of them trained",
        f"{exported['parameters']['total']:,}",
        f"{exported['parameters']['trainable']:,}",
    )
    for layer in exported["layers"]:
        log.info("%s: %s parameters, %s trained", layer["layer"], f"{layer['parameters']:,}", f"{layer['trainable']:,}")
    log.info("run: %s", path)


def _cells(crops: list[tuple[UPath, str]]) -> pd.DataFrame:
    """One row per crop: image_id, label, patient_id, content_digest, and where it lies, `part` (index) and `row`."""
    columns = ["image_id", "label", "patient_id", "content_digest"]
    tables = []
    for index, (part, digest) in enumerate(crops):
        cells = storage.read_table(part, columns, sha256=digest).to_pandas()
        tables.append(cells.assign(part=index, row=np.arange(len(cells))))
    empty = pd.DataFrame(columns=[*columns, "part", "row"])
    return pd.concat(tables, ignore_index=True) if tables else empty


def _splits_table(cells: pd.DataFrame, splits: pd.Series) -> pa.Table:
    table = cells.assign(split=splits)[SPLITS.names].sort_values("image_id")
    return pa.Table.from_pandas(table, schema=SPLITS.arrow_schema(), preserve_index=False)


def _learn(cells: pd.DataFrame, splits: pd.Series, scores: Scores, *, specificity: float | None) -> Validation:
    """Temperature, threshold and rates of error from the validation cells and their `scores`, in order of image_id;
    copies of a cell count once.
    """
    of_val = cells[splits == Split.val].sort_values("image_id").assign(split=Split.val, score=scores)
    try:
        return learn_from_validation(of_val[~is_copy(of_val)], specificity=specificity)
    except DatasetError as error:
        if specificity is None:
            raise
        raise DatasetError(
            f"{error}. The epochs are kept: the same command with a lower --specificity, or without, needs no others"
        ) from error


def _check_resources(num_workers: int, cpus: int, gpus: int) -> None:
    """Waits for the nodes of a cluster. Raises: `TrainingError` where there is no room for the workers, nor comes."""
    room = room_for(cpus=cpus, gpus=gpus)
    if room >= num_workers:
        return
    each = f"{cpus} CPUs and {gpus} GPUs" if gpus else f"{cpus} CPUs"
    if may_grow():  # nothing in Ray tells whether an autoscaler is there (ray-project/ray#63012): ask, and see
        log.info(
            "waiting up to %d s for nodes: there is room for %d workers of %s, %d are asked for",
            *(_WAIT_FOR_NODES_S, room, each, num_workers),
        )
        if is_room_made(num_workers, cpus=cpus, gpus=gpus, within_s=_WAIT_FOR_NODES_S):
            return
        room = room_for(cpus=cpus, gpus=gpus)
    raise TrainingError(
        f"the cluster's nodes have room for {room} workers of {each}, {num_workers} are asked for; "
        "lower --num-workers, --cpus-per-worker or --gpus-per-worker, or add nodes"
    )


def _initial_run(url: str, same_split: dict[str, Any]) -> tuple[str, str, bytes]:
    """(run id of `--init-from`, SHA-256 of its VGG-19 weights, its Keras model). Raises: `ConfigError` where its
    training saw what this one must not; `ModelError` where the model is not the one that it wrote.

    A head that was trained on another split knows patients of this one's test split.
    """
    path = storage.locate(url)
    success = outputs.check_complete(path, "train")
    was = outputs.read_config(path, "train")["identity"]
    if success["model"] != "vgg19-frozen":
        raise ConfigError(
            f"--init-from {url} is a run of {success['model']}; fine-tuning starts from one of vgg19-frozen"
        )
    for name, value in same_split.items():
        if was.get(name) != value:
            raise ConfigError(
                f"--init-from {url} was trained with {name} {was.get(name)!r}, this run has {value!r}: its head would "
                f"know test "
                "images; train vgg19-frozen on the same dataset, --split-by and --seed"
            )
    model = read_run_file(path / "model.keras", sha256=success["files"]["model.keras"]["sha256"])
    return str(success["run_id"]), str(was["weights"]), model


def _load(read: Callable[..., Any], parts: list[tuple[Any, ...]]) -> list[Any]:
    """Every part as an array in Ray's object store, read in parallel; one copy a node. `parts`: arguments of `read`,
    whose errors are raised here and not in each worker.
    """

    def loaded(*part: Any) -> tuple[Any, None]:
        return read(*part), None

    task = ray.remote(loaded).options(num_returns=2)
    arrays, is_done = zip(*(task.remote(*part) for part in parts), strict=True)
    ray.get(list(is_done))
    return list(arrays)


def _load_pixels(url: str, sha256: str, image_size: int) -> Pixels:
    """One crops part as uint8 (n, size, size, 3). Raises: `DirectoryError` where it is another by now."""
    crops = storage.read_table(storage.locate(url), ["image"], sha256=sha256)
    return crop_pixels(crops["image"], image_size=image_size)


def _examples(cells: pd.DataFrame, chosen: pd.Series, parts: list[Any], *, n_views: int = 1) -> Examples:
    rows = cells[chosen].sort_values("image_id")
    return Examples(
        parts=parts,
        part=rows["part"].to_numpy(np.int32),
        row=rows["row"].to_numpy(np.int32),
        label=rows["label"].to_numpy(np.float32),
        n_views=n_views,
    )


def _fit(plan: TrainingPlan, path: UPath, config: Config) -> ray.train.Result:
    """Trains. Raises: `TrainingError`, or the error that the workers met themselves; `KeyboardInterrupt`."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", _POLL_S)
    with stderr_silenced():  # Ray's package loads TensorFlow in the driver, whose greetings no log level stops
        from ray.train.tensorflow import TensorflowTrainer

    class Trainer(TensorflowTrainer):  # type: ignore[misc]  # Ray gives no types
        """Without the actor that frees the workers' CPUs should Ray's controller die: the end of this job does that. It
        asks Ray's dashboard, and where there is none every training waits 12 s for its end.
        """

        def _create_default_callbacks(self) -> list[Any]:
            made = super()._create_default_callbacks()
            return [one for one in made if type(one).__name__ != "PlacementGroupCleanerCallback"]

    filesystem, root = storage.arrow_filesystem(path)
    trainer = Trainer(
        train_worker,
        train_loop_config=plan,
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.workers[0] if len(set(config.workers)) == 1 else config.workers,
            use_gpu=config.gpus_per_worker > 0,
            resources_per_worker={"CPU": plan.n_threads}
            | ({"GPU": config.gpus_per_worker} if config.gpus_per_worker else {}),
        ),
        run_config=ray.train.RunConfig(
            name="checkpoints",
            storage_path=root,
            storage_filesystem=filesystem,
            # Ray Train keeps the best ones and always the newest.
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute="val_loss", checkpoint_score_order="min"
            ),
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
        ),
    )
    is_main = threading.current_thread() is threading.main_thread()
    on_interrupt = signal.getsignal(signal.SIGINT) if is_main else None
    try:
        result = trainer.fit()
    except SystemExit:  # how Ray Train's own handler of Ctrl-C ends, with status 0
        raise KeyboardInterrupt from None
    except ray.train.TrainingFailedError as error:
        if not plan.faults.empty():
            raise plan.faults.get() from error
        causes = list(getattr(error, "worker_failures", {}).values())
        cause = next((c for c in causes if isinstance(_cause(c), MalariaRayError)), causes[0] if causes else error)
        raise TrainingError(
            f"training stopped: {_cause(cause)}; run the same command again to go on from the last checkpoint"
        ) from error
    finally:
        if is_main:
            signal.signal(signal.SIGINT, on_interrupt)
    if not plan.faults.empty():  # the workers ended by themselves when they were started again after it
        raise plan.faults.get()
    return result


def _queue() -> Queue:
    """A queue on the driver's own node: on another it would be lost with that."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})


@contextmanager
def _news(queue: Queue) -> Iterator[None]:
    """Logs what the workers say while they train; their own output is left in Ray's logs."""
    is_over = threading.Event()

    def listen() -> None:
        while not is_over.wait(1.0):
            while not queue.empty():
                log.info("%s", queue.get())

    listener = threading.Thread(target=listen, name="news", daemon=True)
    listener.start()
    try:
        yield
    finally:
        is_over.set()
        listener.join()
        while not queue.empty():
            log.info("%s", queue.get())
        queue.shutdown()


def _cause(error: BaseException) -> BaseException:
    return getattr(error, "cause", None) or error.__cause__ or error


def _history(result: ray.train.Result) -> tuple[pd.DataFrame, ray.train.Checkpoint, int]:
    """All epochs, from the newest checkpoint, and the checkpoint of the lowest validation loss with its epoch."""
    best, of_epoch = min(result.best_checkpoints, key=lambda kept: kept[1]["val_loss"])
    with result.checkpoint.as_directory() as folder:
        history = pd.read_json(os.path.join(folder, "history.json"))  # noqa: PTH118
    return history, best, of_epoch["epoch"]


def _export(checkpoint: ray.train.Checkpoint, plan: TrainingPlan, probe: Examples) -> dict[str, Any]:
    """Exports in a process of its own, so that the driver never builds a network; compares the files on `probe`."""

    def task() -> dict[str, Any]:
        chosen = np.linspace(0, len(probe) - 1, min(_N_PROBE, len(probe))).astype(int)
        images = np.stack([ray.get(probe.parts[probe.part[i]])[probe.row[i]] for i in chosen])
        weights = ray.get(plan.weights) if plan.weights else None
        with checkpoint.as_directory() as folder:
            return export(folder, model_name=plan.model, image_size=plan.image_size, weights=weights, probe=images)

    exported: dict[str, Any] = ray.get(ray.remote(task).options(num_cpus=plan.n_threads).remote())
    return exported


def _validate(onnx: bytes, plan: TrainingPlan, *, train: Examples, val: Examples) -> Validated:
    """In a process of its own, as screening will do it."""
    task = ray.remote(validate).options(num_cpus=plan.n_threads)
    validated: Validated = ray.get(task.remote(onnx, train=train, val=val, seed=plan.seed, n_threads=plan.n_threads))
    return validated


def _augmented_samples(plan: TrainingPlan) -> tuple[Pixels, list[Pixels]]:
    """Six training images and what the first three epochs make of them, in a process of its own."""

    def task() -> tuple[Pixels, list[Pixels]]:
        os.environ.pop("TF_USE_LEGACY_KERAS", None)
        from malaria_ray.models.augmentation import augment, augmentation_draws

        train = plan.train
        chosen = np.linspace(0, len(train) - 1, 6).astype(int)
        images = np.stack([ray.get(train.parts[train.part[i]])[train.row[i]] for i in chosen])
        draws = [augmentation_draws(plan.seed, epoch, len(train))[chosen] for epoch in (1, 2, 3)]
        return images, [np.asarray(augment(images, numbers)) for numbers in draws]

    samples: tuple[Pixels, list[Pixels]] = ray.get(ray.remote(task).options(num_cpus=plan.n_threads).remote())
    return samples
