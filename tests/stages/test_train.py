from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import onnxruntime
import pandas as pd
import psutil
import pyarrow.parquet as pq
import pytest
import ray
import ray.train
from stages.conftest import IMAGE_SIZE, Line, content
from stages.killing import run_and_kill
from upath import UPath

from malaria_ray.cells.crops import crop_pixels
from malaria_ray.cells.splits import assign_splits
from malaria_ray.errors import ConfigError, DatasetError, DirectoryError, ModelError, NotCompleteError, TrainingError
from malaria_ray.runtime import outputs, storage
from malaria_ray.runtime.session import cpus_for_each_of, room_for
from malaria_ray.schema import HISTORY, SPLITS
from malaria_ray.stages import ingest, train
from malaria_ray.statistics.novelty import Novelty
from malaria_ray.statistics.validation import Validation


def train_of(dataset: Path, run: Path, **flags) -> pd.DataFrame:
    settings = {"model": "cnn", "epochs": 3, "batch_size": 16, **flags}
    train.run(train.Config(dataset=str(dataset), run=str(run), **settings))
    return pq.read_table(run / "history.parquet").to_pandas()


def test_a_run_has_every_epoch_and_the_weights_of_the_best(line: Line):
    history = pq.read_table(line.run / "history.parquet")
    assert history.schema.names == HISTORY.names
    assert history["epoch"].to_pylist() == [1, 2, 3]
    success = storage.read_json(storage.locate(str(line.run / "_SUCCESS.json")))
    assert success["best"]["val_loss"] == min(history["val_loss"].to_pylist())
    assert success["onnx_max_difference"] <= 1e-4
    assert (line.run / "learning_curves.png").read_bytes().startswith(b"\x89PNG")


def test_rays_controller_ends_without_a_wait(line: Line):
    """Its helper that asks the dashboard, which is not there, would be waited for at the end of each training."""
    logs = Path(ray._private.worker._global_node.get_logs_dir_path()) / "train"
    told = "".join(log.read_text() for log in logs.glob("*sys-controller*"))
    assert "Worker group shutdown successful" in told
    assert "PlacementGroupCleaner" not in told


def test_the_saved_model_gives_the_validation_loss_of_the_best_epoch(line: Line):
    splits = pq.read_table(line.run / "splits.parquet").to_pandas().set_index("image_id")
    crops = storage.read_table(storage.locate(str(line.dataset / "crops")))
    is_val = (splits.loc[crops["image_id"].to_pylist(), "split"] == "val").to_numpy()
    pixels = crop_pixels(crops["image"], image_size=IMAGE_SIZE)[is_val]
    label = crops["label"].to_numpy()[is_val]
    session = onnxruntime.InferenceSession(line.run / "model.onnx", providers=["CPUExecutionProvider"])
    score = session.run(None, {"image": pixels})[0].reshape(-1).astype(np.float64)
    loss = -np.mean(np.where(label == 1, np.log(score), np.log(1 - score)))
    best = storage.read_json(storage.locate(str(line.run / "_SUCCESS.json")))["best"]
    assert loss == pytest.approx(best["val_loss"], abs=1e-4)


def test_no_patient_is_in_two_splits(line: Line):
    splits = pq.read_table(line.run / "splits.parquet")
    assert splits.schema.names == SPLITS.names
    assert (splits.to_pandas().groupby("patient_id")["split"].nunique() == 1).all()


def test_a_second_run_changes_nothing_and_says_so(line: Line, copy_of, caplog: pytest.LogCaptureFixture):
    run = copy_of(line.run)
    before = content(run)
    train_of(line.dataset, run)
    assert content(run) == before
    assert "nothing to do" in caplog.text


FLAGS = ["--model", "cnn", "--epochs", "3", "--batch-size", "16"]
SNAPSHOT = "checkpoints/checkpoint_manager_snapshot.json"


def check_same_curve(found: pd.DataFrame, line: Line) -> None:
    undisturbed = pq.read_table(line.run / "history.parquet").to_pandas()
    columns = ["epoch", "train_loss", "val_loss", "val_accuracy", "learning_rate"]
    pd.testing.assert_frame_equal(found[columns], undisturbed[columns], rtol=1e-2, atol=1e-2)


def test_killed_after_an_epoch_it_goes_on_to_the_curve_of_an_undisturbed_run(line: Line, tmp_path: Path):
    run = tmp_path / "killed"
    run_and_kill(["train", str(line.dataset), str(run), *FLAGS], when=run / SNAPSHOT)
    assert not (run / "_SUCCESS.json").exists()
    check_same_curve(train_of(line.dataset, run), line)


def test_a_worker_killed_in_mid_epoch_is_replaced_and_the_curve_is_that_of_an_undisturbed_run(
    line: Line, tmp_path: Path
):
    run, killed = tmp_path / "run", []

    def kill() -> None:
        while not (run / SNAPSHOT).exists():
            time.sleep(0.02)
        for process in psutil.Process().children(recursive=True):  # of this test's own Ray
            if "RayTrainWorker" in process.name() + "".join(process.cmdline()):
                killed.append(process.pid)
                process.kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    history = train_of(line.dataset, run, max_failures=1)
    assert len(killed) == 1
    check_same_curve(history, line)
    kept = [one for one in (run / "checkpoints").iterdir() if one.name.startswith("checkpoint_2")]
    assert len(kept) <= 2, "the best and the last"
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))


def test_ctrl_c_leaves_a_run_that_goes_on(line: Line, tmp_path: Path):
    run = tmp_path / "run"
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, "-m", "malaria_ray", "train", str(line.dataset), str(run), *FLAGS],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (run / SNAPSHOT).exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert "stopped; run the same command again to go on" in process.communicate(timeout=120)[1]
    assert process.returncode == 130
    check_same_curve(train_of(line.dataset, run), line)


def test_a_run_in_bf16_with_xla_and_augmentation_exports_an_ordinary_float32_model(line: Line, tmp_path: Path):
    history = train_of(line.dataset, tmp_path / "run", epochs=1, precision="bf16", xla=True, augment="on")
    assert np.isfinite(history["val_loss"]).all()
    assert (tmp_path / "run/augmented_samples.png").read_bytes().startswith(b"\x89PNG")
    with zipfile.ZipFile(tmp_path / "run/model.keras") as saved:
        assert b"bfloat16" not in saved.read("config.json")
    path = storage.locate(str(tmp_path / "run"))
    identity = storage.read_json(path / "config.json")["identity"]
    assert (identity["precision"], identity["xla"], identity["augment"]) == ("bf16", True, True)
    assert storage.read_json(path / "_SUCCESS.json")["onnx_max_difference"] <= 1e-4
    with pytest.raises(DirectoryError, match="precision was 'bf16', is now 'float32'"):
        train_of(line.dataset, tmp_path / "run", epochs=1, xla=True, augment="on")


def test_a_finished_run_goes_on_to_more_epochs_as_if_it_had_never_ended(line: Line, tmp_path: Path):
    run = tmp_path / "run"
    assert len(train_of(line.dataset, run, epochs=1)) == 1
    check_same_curve(train_of(line.dataset, run, epochs=3), line)
    assert storage.read_json(storage.locate(str(run / "config.json")))["identity"]["epochs"] == 3
    with pytest.raises(DirectoryError, match="epochs was 3, is now 2"):
        train_of(line.dataset, run, epochs=2)
    with pytest.raises(DirectoryError, match="batch_size was 16, is now 8"):
        train_of(line.dataset, run, epochs=4, batch_size=8)


def only(line: Line, tmp_path: Path, keep) -> Path:
    """A dataset of those files of the line's archive whose name `keep` maps to a new name."""
    with zipfile.ZipFile(line.archive) as original, zipfile.ZipFile(tmp_path / "some.zip", "w") as some:
        for name in original.namelist():
            if new := keep(name):
                some.writestr(new, original.read(name))
    ingest.run(ingest.Config(archive=str(tmp_path / "some.zip"), dataset=str(tmp_path / "some"), image_size=IMAGE_SIZE))
    return tmp_path / "some"


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (lambda name: name if "Parasitized" in name else None, "has parasitized only"),
        (lambda name: name.replace("Parasitized", "folder"), "have no label"),
        (lambda name: name.replace("/C", "/x"), "have no patient"),
        (lambda name: name if any(f"P{i}Thin" in name for i in (1, 2, 3)) else None, "3 patients cannot be divided"),
    ],
    ids=["one class", "no labels", "no patients", "few patients"],
)
def test_a_dataset_that_cannot_be_trained_on_is_refused_before_anything_is_written(
    line: Line, tmp_path: Path, keep, message: str
):
    with pytest.raises(DatasetError, match=message):
        train_of(only(line, tmp_path, keep), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_of_another_network_are_refused_in_one_line(line: Line, tmp_path: Path, copy_of):
    other = tmp_path / "other.weights.h5"
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).save_weights(other)
    with pytest.raises(ModelError, match="--weights holds no weights for"):
        train_of(copy_of(line.dataset), tmp_path / "run", model="vgg19-frozen", weights=str(other))
    assert not (tmp_path / "run" / "_SUCCESS.json").exists()


def test_an_unfinished_dataset_is_refused(line: Line, copy_of, tmp_path: Path):
    dataset = copy_of(line.dataset)
    (dataset / "_SUCCESS.json").unlink()
    with pytest.raises(NotCompleteError, match="no _SUCCESS.json; run 'malaria-ray ingest' again"):
        train_of(dataset, tmp_path / "run")


def test_more_workers_than_the_cluster_has_are_refused(line: Line, tmp_path: Path):
    with pytest.raises(TrainingError, match="room for 2 workers of 1 CPUs, 3 are asked for; lower --num-workers"):
        train_of(line.dataset, tmp_path / "run", num_workers=3)
    with pytest.raises(TrainingError, match="room for 0 workers of 3 CPUs, 1 are asked for"):
        train_of(line.dataset, tmp_path / "run", cpus_per_worker=3)
    with pytest.raises(TrainingError, match="room for 0 workers of 1 CPUs and 2 GPUs, 1 are asked for"):
        train_of(line.dataset, tmp_path / "run", gpus_per_worker=2)


@pytest.mark.parametrize(
    "flags",
    [
        {"num_workers": 3, "epochs": 4},
        {"num_workers": 3, "overwrite": True},
        {"model": "vgg19-finetuned", "init_from": ""},
    ],
    ids=["more epochs", "overwrite", "init_from of an empty variable"],
)
def test_a_refused_training_leaves_a_finished_run_as_it_was(line: Line, copy_of, flags: dict):
    run = copy_of(line.run)
    before = content(run)
    with pytest.raises((TrainingError, ConfigError)):
        train_of(line.dataset, run, **flags)
    assert content(run) == before


@pytest.mark.parametrize("below", ["", "head"])
def test_overwrite_does_not_delete_what_the_training_starts_from(line: Line, copy_of, below: str):
    run = copy_of(line.run)
    if below:
        shutil.copytree(run, run / below)
    success = json.loads((run / below / "_SUCCESS.json").read_text())
    storage.write_json(UPath(run / below / "_SUCCESS.json"), success | {"model": "vgg19-frozen"})
    before = content(run)
    with pytest.raises(ConfigError, match="lies in .*, which --overwrite would delete"):
        train_of(line.dataset, run, model="vgg19-finetuned", init_from=str(run / below), overwrite=True)
    assert content(run) == before


def test_vgg19_takes_no_images_that_it_would_halve_to_nothing(line: Line, tmp_path: Path):
    ingest.run(ingest.Config(archive=str(line.archive), dataset=str(tmp_path / "small"), image_size=31))
    with pytest.raises(ConfigError, match="crops of 31 × 31 pixels; vgg19-frozen takes 32 × 32 or larger"):
        train_of(tmp_path / "small", tmp_path / "run", model="vgg19-frozen")


def test_a_worker_of_a_cluster_at_rest_gets_the_cpus_of_the_node_that_comes(line: Line, tmp_path: Path, monkeypatch):
    """As on KubeRay: a head without CPUs, and a node of 8 that comes when it is asked for."""
    nodes = [{"Alive": True, "Resources": {"node:head": 1.0}}]
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    asked = []

    def comes(n: int, *, cpus: int, gpus: int, within_s: float) -> bool:
        asked.append((n, cpus, gpus))
        nodes.append({"Alive": True, "Resources": {"CPU": 8.0}})
        return True

    def stop(*args, n_threads: int, **kwargs):
        raise RuntimeError(f"{n_threads} threads")

    monkeypatch.setattr(train, "is_room_made", comes)
    monkeypatch.setattr(train, "TrainingPlan", stop)
    with pytest.raises(RuntimeError, match="8 threads"):
        train_of(line.dataset, tmp_path / "run")
    assert asked == [(1, 1, 0)]


def test_on_a_cluster_nodes_are_waited_for_but_not_for_ever(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
):
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    monkeypatch.setattr(train, "_WAIT_FOR_NODES_S", 2)
    with pytest.raises(TrainingError, match="room for 2 workers of 1 CPUs, 3 are asked for; lower --num-workers"):
        train_of(line.dataset, tmp_path / "run", num_workers=3)
    assert "waiting up to 2 s for nodes: there is room for 2 workers of 1 CPUs, 3 are asked for" in caplog.text


def test_a_worker_gets_the_cpus_of_one_node_and_no_more(monkeypatch: pytest.MonkeyPatch):
    """As on three nodes of one CPU, where a worker of three could never start."""
    nodes = [{"Alive": True, "Resources": {"CPU": cpus, "GPU": 1}} for cpus in (4.0, 3.0, 8.0)]
    dead = {"Alive": False, "Resources": {"CPU": 64.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, dead, {"Alive": True, "Resources": {}}])
    assert [cpus_for_each_of(n) for n in (1, 2, 3, 4, 15, 16)] == [8, 4, 4, 3, 1, 1]
    assert [cpus_for_each_of(n, gpus=1) for n in (1, 3, 4)] == [8, 3, 1]
    assert room_for(cpus=4) == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"epochs": 0}, "--epochs 0: must be at least 1"),
        ({"seed": -1}, "--seed -1: allowed are 0 to 4,294,967,295"),
        ({"seed": 2**32}, "--seed 4294967296: allowed are 0 to 4,294,967,295"),
        ({"cpus_per_worker": 0}, "--cpus-per-worker 0: must be at least 1"),
        ({"num_workers": "1-"}, "--num-workers 1-: must be at least 1, or a range such as 1-4"),
        ({"init_from": ""}, "--init-from goes with --model vgg19-finetuned, not with cnn"),
        ({"learning_rate": 0.0}, "--learning-rate 0.0: allowed are numbers above 0"),
        ({"num_workers": "4-2"}, "--num-workers 4-2: must be at least 1, or a range such as 1-4"),
        ({"folds": 5}, "--folds 5, --fold not given: both are needed"),
        ({"folds": 5, "fold": 6}, "--folds 5, --fold 6"),
        ({"num_workers": 65, "batch_size": 64}, "--num-workers 65"),
        ({"weights": "w.h5"}, "--weights goes with a VGG-19, not with --model cnn"),
        ({"weights": "imagenet"}, "--weights goes with a VGG-19, not with --model cnn"),
        ({"model": "vgg19-finetuned", "weights": "w.h5", "init_from": "r"}, "leave --weights out"),
    ],
)
def test_flags_are_checked_at_birth(flags: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        train.Config(**{"dataset": "d", "run": "r", "model": "cnn", **flags})


def test_a_run_keeps_what_it_learnt_from_validation_cells(line: Line):
    success = json.loads((line.run / "_SUCCESS.json").read_text())
    validation = Validation.from_dict(json.loads((line.run / "validation.json").read_text()))
    assert validation.calibration.n == success["counts"]["n_val"]
    assert success["threshold"] == validation.threshold
    novelty = Novelty.from_bytes((line.run / "novelty.npz").read_bytes())
    assert novelty.means.shape == (2, 512)
    assert novelty.threshold > 0


def test_labels_of_test_cells_cannot_reach_the_fit(line: Line):
    dataset = UPath(line.dataset)
    cells = train._cells(outputs.files_in(dataset, storage.read_json(dataset / "_SUCCESS.json"), "crops"))
    splits = assign_splits(cells, by="patient", seed=42)
    scores = np.random.default_rng(0).uniform(0.01, 0.99, int((splits == "val").sum())).astype(np.float32)
    learnt = train._learn(cells, splits, scores, specificity=None)
    flipped = cells.assign(label=cells["label"].where(splits == "val", 1 - cells["label"]))
    assert train._learn(flipped, splits, scores, specificity=None) == learnt
    seen = cells.assign(label=cells["label"].where(splits != "val", 1 - cells["label"]))
    assert train._learn(seen, splits, scores, specificity=None) != learnt, "and those of validation cells do"


def test_a_specificity_that_few_cells_cannot_carry_is_refused_before_training(line: Line, tmp_path: Path):
    with pytest.raises(DatasetError, match="uninfected validation cells cannot carry a specificity of 0.999"):
        train.run(train.Config(dataset=str(line.dataset), run=str(tmp_path / "run"), model="cnn", specificity=0.999))
    assert not (tmp_path / "run").exists()


def test_an_end_without_a_threshold_keeps_the_epochs_for_another_specificity(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def saturated(*args, **kwargs):
        found = validate(*args, **kwargs)
        return dataclasses.replace(found, scores=np.ones_like(found.scores))

    validate = train._validate
    monkeypatch.setattr(train, "_validate", saturated)  # what a network that is far too sure of itself gives
    run = tmp_path / "run"
    with pytest.raises(DatasetError, match=r"have a score of 1.* the same command with a lower --specificity"):
        train_of(line.dataset, run, specificity=0.8)
    monkeypatch.undo()
    begun = time.time()
    history = train_of(line.dataset, run, specificity=0.7)
    check_same_curve(history, line)
    assert len(list((run / "checkpoints").glob("checkpoint_2*"))) <= 2
    assert all(folder.stat().st_mtime < begun for folder in (run / "checkpoints").glob("checkpoint_2*")), "none anew"
    assert json.loads((run / "config.json").read_text())["identity"]["specificity"] == 0.7
    assert json.loads((run / "validation.json").read_text())["calibration"]["specificity"] == 0.7
    with pytest.raises(DirectoryError, match=r"finished with another config: specificity was 0.7, is now 0.6"):
        train_of(line.dataset, run, specificity=0.6)


def test_of_epochs_with_the_same_loss_the_one_that_was_kept_is_the_best(tmp_path: Path):
    """Ray keeps the latest of them, whose weights are exported."""
    rows = [{"epoch": epoch, "val_loss": loss} for epoch, loss in ((1, 0.5), (2, 0.1), (3, 0.1), (4, 0.1))]
    (tmp_path / "history.json").write_text(json.dumps(rows))
    kept = ray.train.Checkpoint.from_directory(str(tmp_path))
    _, best, epoch = train._history(SimpleNamespace(checkpoint=kept, best_checkpoints=[(kept, rows[3])]))
    assert (best, epoch) == (kept, 4)
