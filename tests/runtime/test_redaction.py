"""No password or signature of a URL stands in what is written or said."""

from __future__ import annotations

import pytest

from malaria_ray.errors import ConfigError
from malaria_ray.runtime import storage
from malaria_ray.runtime.redaction import without_secrets, without_secrets_in


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("https://host/a/cells.zip?X-Amz-Signature=abc&X-Amz-Expires=9", "https://host/a/cells.zip"),
        ("https://host/cells.zip?versionId=7&X-Amz-Signature=abc", "https://host/cells.zip?versionId=7"),
        ("https://host/cells.zip?generation=1&sig=a%2Fb%3D", "https://host/cells.zip?generation=1"),
        ("HTTPS://me:pass@host:8080/cells.zip", "HTTPS://host:8080/cells.zip"),
        ("https://token@host/vgg19.h5?t=1#sha256=00", "https://host/vgg19.h5#sha256=00"),
        ("sftp://me:pass@host/cells", "sftp://me@host/cells"),
        ("abfs://container@account/cells?.png", "abfs://container@account/cells?.png"),
        ("s3://bucket/day 1/what?/a@b:c.png", "s3://bucket/day 1/what?/a@b:c.png"),
        ("/data/what?/a@b.png", "/data/what?/a@b.png"),
        ("zip://images::https://me:pass@host/a.zip?sig=x", "zip://images::https://host/a.zip"),
        (
            "403, message='Forbidden', url='https://h/a.zip?sig=x' of https://h/b.zip?sig=y is not there",
            "403, message='Forbidden', url='https://h/a.zip' of https://h/b.zip is not there",
        ),
    ],
)
def test_what_is_told_of_a_url(text: str, told: str):
    assert without_secrets(text) == told


def test_all_strings_of_a_config_are_told_so():
    config = {"archive": "https://h/a.zip?sig=x", "patients": ["https://h/p.csv?sig=x"], "seed": 1, "split": None}
    told = {"archive": "https://h/a.zip", "patients": ["https://h/p.csv"], "seed": 1, "split": None}
    assert without_secrets_in(config) == told


@pytest.mark.parametrize(
    "url",
    [
        "https://host/my cells/a.zip?X-Amz-Signature=SECRET",
        "https://me:it's-SECRET@host/a.zip",
        "https://host/a.zip?sig=ab'SECRET",
        "zip://images::https://host/my cells/a.zip?sig=SECRET",
    ],
)
def test_an_address_whose_secret_could_not_be_told_from_the_rest_is_refused(url: str):
    with pytest.raises(ConfigError, match="percent-encode it") as refusal:
        storage.locate(url)
    assert "SECRET" not in str(refusal.value)
    storage.locate("https://host/my cells/a.zip")
    storage.locate("/data/what's this?/a@b.png")
