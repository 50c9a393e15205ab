"""ImageNet weights of VGG-19: from a file, a URL or Keras' own, each checked, fetched once by the driver."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from urllib.parse import urldefrag

from malaria_ray.errors import ArchiveError, ConfigError, ModelError
from malaria_ray.runtime import storage
from malaria_ray.runtime.download import cache_folder, download

IMAGENET_URL = (
    "https://storage.googleapis.com/tensorflow/keras-applications/vgg19/"
    "vgg19_weights_tf_dim_ordering_tf_kernels_notop.h5"
)
_IMAGENET_MD5 = "253f8cb515780f3b799900260a226db6"  # as keras.applications has it; Keras publishes no SHA-256
_WAYS_OUT = (
    "give --weights PATH or --weights URL#sha256=… of a file for keras.applications.VGG19(include_top=False), for "
    "example one "
    "fetched elsewhere"
)


@dataclass(frozen=True)
class Weights:
    """The content of a weights file and its SHA-256, which names it in every fingerprint."""

    content: bytes
    sha256: str


def load_weights(spec: str) -> Weights:
    """`imagenet`, a path, or a URL, the last two with `#sha256=…` if their content is to be checked.

    Raises: `ModelError` where the file is not there, cannot be fetched, or is not the one whose digest was given,
    `ConfigError` for a digest that is none.
    """
    url, fragment = urldefrag(spec)
    if fragment and not re.fullmatch(r"sha256=[0-9a-fA-F]{64}", fragment):
        raise ConfigError(f"--weights …#{fragment}: allowed after '#' is sha256= and its 64 hex digits")
    expected = fragment.removeprefix("sha256=").lower()
    if spec == "imagenet":
        content = _imagenet()
    else:
        try:
            content = storage.locate(url).read_bytes()
        except OSError as error:
            raise ModelError(f"--weights {url} cannot be read: {error}; {_WAYS_OUT}") from error
    digest = hashlib.sha256(content).hexdigest()
    if expected and digest != expected:
        raise ModelError(
            f"--weights {url} has the SHA-256 {digest}, not {expected}; it is another file: fetch it again"
        )
    return Weights(content, digest)


def _imagenet() -> bytes:
    file = cache_folder() / IMAGENET_URL.rpartition("/")[2]
    try:
        download(IMAGENET_URL, file, attempts=2)
    except ArchiveError as error:
        raise ModelError(f"the ImageNet weights could not be fetched: {error}; {_WAYS_OUT}") from error
    content = file.read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != _IMAGENET_MD5:
        raise ModelError(
            f"{file} is not the file that Keras publishes (MD5 {_IMAGENET_MD5}); delete it, or {_WAYS_OUT}"
        )
    return content
