"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("patient", deadline=None)  # two busy cores are no fault of an example
settings.load_profile("patient")


@pytest.fixture(scope="session", autouse=True)
def _no_proxy() -> Iterator[None]:
    """All servers of the tests are on this machine; a proxy of the user's could not reach them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("NO_PROXY", "no_proxy"):
            patch.setenv(name, "127.0.0.1,localhost")
        yield


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer  # 2 s to import, so only for the tests that need it

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(_s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A boto3 client of an S3 server on this machine, where the empty bucket `cells-bucket` is; s3fs finds it too."""
    import boto3
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", _s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    client = boto3.client("s3")
    client.create_bucket(Bucket="cells-bucket")
    yield client
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="cells-bucket"):
        for item in page.get("Contents", []):
            client.delete_object(Bucket="cells-bucket", Key=item["Key"])
    client.delete_bucket(Bucket="cells-bucket")
    s3fs.S3FileSystem.clear_instance_cache()
