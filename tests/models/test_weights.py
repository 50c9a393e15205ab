"""Files of VGG-19 weights that are not the ones wanted: one clear line, before anything is trained."""

from __future__ import annotations

import hashlib
from pathlib import Path

import keras
import pytest

from malaria_ray.errors import ConfigError, ModelError
from malaria_ray.models.vgg19 import build_backbone
from malaria_ray.models.weights import load_weights


def test_a_digest_is_checked_and_names_the_file(tmp_path: Path):
    (tmp_path / "vgg.h5").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    for fragment in ("", f"#sha256={digest}", f"#sha256={digest.upper()}"):
        assert load_weights(f"{tmp_path}/vgg.h5{fragment}").sha256 == digest
    with pytest.raises(ModelError, match=f"has the SHA-256 {digest}, not 00"):
        load_weights(f"{tmp_path}/vgg.h5#sha256={'0' * 64}")


@pytest.mark.parametrize("fragment", ["sha256=", "sha256=abc", "md5=d41d8cd98f00b204e9800998ecf8427e", "x"])
def test_a_digest_that_is_none_is_refused_and_not_passed_over(tmp_path: Path, fragment: str):
    (tmp_path / "vgg.h5").write_bytes(b"weights")
    with pytest.raises(ConfigError, match="allowed after '#' is sha256= and its 64 hex digits"):
        load_weights(f"{tmp_path}/vgg.h5#{fragment}")


def test_a_file_that_is_not_there_names_the_ways_out(tmp_path: Path):
    with pytest.raises(ModelError, match="cannot be read.*give --weights PATH or --weights URL"):
        load_weights(str(tmp_path / "gone.h5"))


def test_weights_of_another_shape_are_refused(tmp_path: Path):
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).save_weights(tmp_path / "other.weights.h5")
    with pytest.raises(ModelError, match="holds no weights for keras.applications.VGG19"):
        build_backbone(32, str(tmp_path / "other.weights.h5"))
    (tmp_path / "text.h5").write_text("no HDF5")
    with pytest.raises(ModelError, match="holds no weights for keras.applications.VGG19"):
        build_backbone(32, str(tmp_path / "text.h5"))
