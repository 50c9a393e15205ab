"""Both networks on VGG-19, on the small line: with ImageNet's weights where ../shared/data has them, else random."""

from __future__ import annotations

import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
from stages.conftest import IMAGE_SIZE, Line
from stages.test_nih import DATA
from stages.test_screen import screen_of
from stages.test_train import train_of

from malaria_ray.cells.crops import crop_pixels
from malaria_ray.errors import ConfigError, ModelError
from malaria_ray.models.features import FLIPS, flipped, read_features
from malaria_ray.models.vgg19 import build_backbone
from malaria_ray.runtime import storage
from malaria_ray.stages import train, verify


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    of_imagenet = DATA / "vgg19_imagenet_notop.h5"
    if of_imagenet.exists():
        return of_imagenet
    random = tmp_path_factory.mktemp("weights") / "random.h5"
    keras.applications.VGG19(include_top=False, weights=None).save(random)  # in the format of ImageNet's file
    return random


@pytest.fixture(scope="module")
def frozen(line: Line, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("frozen") / "run"
    train_of(line.dataset, run, model="vgg19-frozen", weights=str(weights))
    return run


def feature_files(dataset: Path, flip: str = "") -> dict[Path, int]:
    """When each was written, in nanoseconds."""
    [folder] = (dataset / "features").iterdir()
    return {file: file.stat().st_mtime_ns for file in sorted((folder / flip).glob("part-*.parquet"))}


def weights_of(run: Path) -> list[tuple[str, np.ndarray]]:
    return [(weight.path, weight.numpy()) for weight in keras.saving.load_model(run / "model.keras").weights]


def test_a_frozen_run_is_the_whole_network_image_in_score_out(line: Line, frozen: Path, tmp_path: Path):
    success = storage.read_json(storage.locate(str(frozen / "_SUCCESS.json")))
    backbone, head = 20_024_384, 512 * 512 + 512 + 512 * 512 + 512 + 513
    assert success["parameters"] == {"total": backbone + head, "trainable": head}
    scores = screen_of(line.dataset, tmp_path / "onnx", frozen)["raw_score"]
    of_keras = screen_of(line.dataset, tmp_path / "keras", frozen, engine="keras")["raw_score"]
    np.testing.assert_allclose(of_keras, scores, atol=1e-4, rtol=0)
    assert scores.nunique() > len(scores) / 2
    verify.run(verify.Config(directory=str(frozen)))


def test_features_are_made_once_what_is_lost_again_and_for_augmentation_those_of_mirrored_images(
    line: Line, frozen: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def trained(*_: object) -> None:
        raise KeyboardInterrupt  # what follows is as in `frozen`

    monkeypatch.setattr(train, "_export", trained)
    before = feature_files(line.dataset)
    lost = next(iter(before))
    content = lost.read_bytes()
    lost.unlink()
    with pytest.raises(KeyboardInterrupt):
        train_of(line.dataset, tmp_path / "run", model="vgg19-frozen", weights=str(weights), augment="on", seed=7)
    after = feature_files(line.dataset)
    assert lost.read_bytes() == content
    assert {file: when for file, when in after.items() if file != lost}.items() <= before.items()
    assert after.keys() == before.keys()
    backbone = build_backbone(IMAGE_SIZE, str(weights))
    crops = storage.read_table(storage.locate(str(line.dataset / "crops/part-00000.parquet")))
    pixels = crop_pixels(crops["image"], image_size=IMAGE_SIZE)
    np.testing.assert_array_equal(flipped(pixels, "flipped_x"), pixels[:, :, ::-1])
    np.testing.assert_array_equal(flipped(pixels, "flipped_y"), pixels[:, ::-1])
    np.testing.assert_array_equal(flipped(pixels, "flipped_xy"), pixels[:, ::-1, ::-1])
    for flip in FLIPS:
        found = read_features(str(next(iter(feature_files(line.dataset, flip)))))
        wanted = backbone.predict(flipped(pixels, flip), verbose=0)
        np.testing.assert_allclose(found, wanted, atol=0.01 * wanted.max())


def test_fine_tuning_starts_from_the_frozen_head_and_leaves_blocks_1_to_3(line: Line, frozen: Path, tmp_path: Path):
    flags = {"model": "vgg19-finetuned", "init_from": str(frozen)}
    with pytest.raises(ConfigError, match="was trained with seed 42, this run has 43"):
        train_of(line.dataset, tmp_path / "other", seed=43, **flags)
    replaced = shutil.copytree(frozen, tmp_path / "replaced")
    shutil.copy(line.run / "model.keras", replaced)
    with pytest.raises(ModelError, match=r"model.keras is not the file that training wrote"):
        train_of(line.dataset, tmp_path / "other", **flags | {"init_from": str(replaced)})
    assert not (tmp_path / "other").exists()
    train_of(line.dataset, tmp_path / "run", epochs=1, learning_rate=1e-6, **flags)
    identities = [
        storage.read_json(storage.locate(run / "config.json"))["identity"] for run in (frozen, tmp_path / "run")
    ]
    assert identities[0]["weights"] == identities[1]["weights"] is not None
    for (name, before), (_, after) in zip(weights_of(frozen), weights_of(tmp_path / "run"), strict=True):
        is_frozen = name.startswith(("block1", "block2", "block3"))
        np.testing.assert_allclose(after, before, atol=0 if is_frozen else 1e-3, rtol=0, err_msg=name)
        assert is_frozen or not np.array_equal(after, before), name
    assert (tmp_path / "run" / "augmented_samples.png").exists()
