"""One large file over HTTP, once, whatever the line does."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
import pytest
import samples
from servers import Site, closed_url, serve

from malaria_ray.archives import open_archive
from malaria_ray.archives.listing import list_archive
from malaria_ray.archives.nih import cache_folder
from malaria_ray.archives.reading import read_files
from malaria_ray.errors import ArchiveError
from malaria_ray.runtime.download import download

BODY = np.random.default_rng([1]).bytes(3_000_000)


def fetch(site: Site, target: Path, attempts: int = 3) -> bytes:
    return download(f"{site.url}/cells.zip", target, attempts=attempts, wait_s=0.01).read_bytes()


def part_of(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def test_whole_file_is_fetched_into_a_folder_that_is_made(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "deep" / "cells.zip"
    with serve(Site({"/cells.zip": BODY})) as site:
        assert fetch(site, target) == BODY
    assert site.gets() == [None]
    assert [file.name for file in target.parent.iterdir()] == ["cells.zip"]  # no part is left


def test_target_that_is_there_needs_no_request(tmp_path: Path) -> None:
    (tmp_path / "cells.zip").write_bytes(b"fetched before")
    with serve(Site({"/cells.zip": BODY})) as site:
        assert fetch(site, tmp_path / "cells.zip") == b"fetched before"
    assert site.requests == []


def test_cut_connection_is_resumed_where_it_ended(tmp_path: Path) -> None:
    with serve(Site({"/cells.zip": BODY}, cuts=[1_500_000, 700_000])) as site:
        assert fetch(site, tmp_path / "cells.zip") == BODY
    assert site.gets() == [None, "bytes=1500000-", "bytes=2200000-"]


def test_many_cuts_are_no_failure_while_bytes_come(tmp_path: Path) -> None:
    with serve(Site({"/cells.zip": BODY}, cuts=[200_000] * 14)) as site:
        assert fetch(site, tmp_path / "cells.zip", attempts=2) == BODY
    assert len(site.gets()) == 15


def test_part_of_an_earlier_process_is_continued(tmp_path: Path) -> None:
    part_of(tmp_path / "cells.zip").write_bytes(BODY[:1_000_000])
    with serve(Site({"/cells.zip": BODY})) as site:
        assert fetch(site, tmp_path / "cells.zip") == BODY
    assert site.gets() == ["bytes=1000000-"]


def test_whole_part_needs_nothing_more(tmp_path: Path) -> None:
    """Killed after the last byte and before the rename."""
    part_of(tmp_path / "cells.zip").write_bytes(BODY)
    with serve(Site({"/cells.zip": BODY})) as site:
        assert fetch(site, tmp_path / "cells.zip") == BODY
    assert site.gets() == ["bytes=3000000-"]


def test_part_longer_than_the_file_is_thrown_away(tmp_path: Path) -> None:
    part_of(tmp_path / "cells.zip").write_bytes(BODY + b"more")
    with serve(Site({"/cells.zip": BODY})) as site:
        assert fetch(site, tmp_path / "cells.zip") == BODY
    assert site.gets() == ["bytes=3000004-", None]


@pytest.mark.parametrize("behaviour", ["ignored", "refused"])
def test_server_without_ranges_sends_all_again(tmp_path: Path, behaviour: str) -> None:
    part_of(tmp_path / "cells.zip").write_bytes(b"x" * 1000)
    with serve(Site({"/cells.zip": BODY}, ranges=behaviour, cuts=[2_000_000])) as site:
        assert fetch(site, tmp_path / "cells.zip") == BODY


def test_server_without_ranges_that_always_cuts_is_given_up(tmp_path: Path) -> None:
    with serve(Site({"/cells.zip": BODY}, ranges="ignored", cuts=[2_000_000] * 20)) as site:
        with pytest.raises(
            ArchiveError, match=r"ended after 2,000,000 of 3,000,000 bytes; 2,000,000 bytes are kept in"
        ):
            fetch(site, tmp_path / "cells.zip")
        assert len(site.gets()) == 3
    assert not (tmp_path / "cells.zip").exists()


def test_file_of_unknown_length_is_fetched_and_its_progress_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "malaria_ray"), serve(Site({"/cells.zip": BODY}, says_length=False)) as site:
        assert fetch(site, tmp_path / "cells.zip") == BODY
    assert len(caplog.records) <= 1  # not one line a megabyte


def test_cut_chunk_is_resumed(tmp_path: Path) -> None:
    """What http.client raises of it is no OSError."""
    with serve(Site({"/cells.zip": BODY}, is_chunked=True, cuts=[1_500_000])) as site:
        assert fetch(site, tmp_path / "cells.zip") == BODY
    assert site.gets() == [None, "bytes=1048576-"]


def test_empty_file_is_fetched(tmp_path: Path) -> None:
    with serve(Site({"/cells.zip": b""})) as site:
        assert fetch(site, tmp_path / "cells.zip") == b""


def test_not_found_is_final_at_once(tmp_path: Path) -> None:
    begun = time.monotonic()
    with serve(Site({})) as site, pytest.raises(ArchiveError) as caught:
        download(f"{site.url}/cells.zip", tmp_path / "cells.zip")  # as it is called in earnest: 5 tries, seconds apart
    assert time.monotonic() - begun < 0.9
    assert len(site.gets()) == 1
    assert "HTTP Error 404: Not Found. Without a network, fetch the file elsewhere and put it at" in str(caught.value)
    assert str(tmp_path / "cells.zip") in str(caught.value)


@pytest.mark.parametrize("status", [500, 503, 429])
def test_passing_fault_of_the_server_is_tried_again(tmp_path: Path, status: int) -> None:
    with serve(Site({"/cells.zip": BODY}, statuses=[status])) as site:
        assert fetch(site, tmp_path / "cells.zip") == BODY


def test_lasting_fault_of_the_server_is_given_up(tmp_path: Path) -> None:
    with serve(Site({"/cells.zip": BODY}, statuses=[503] * 20)) as site:
        with pytest.raises(ArchiveError, match="HTTP Error 503"):
            fetch(site, tmp_path / "cells.zip")
        assert len(site.gets()) == 3


def test_server_that_is_down_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="Connection refused"):
        download(f"{closed_url()}/cells.zip", tmp_path / "cells.zip", attempts=2, wait_s=0.01)


@pytest.mark.parametrize("url", ["/data/cell_images.zip", "no url", "http://127.0.0.1:1/a b", "gopher://x/y"])
def test_what_is_no_http_url_is_refused_at_once(tmp_path: Path, url: str) -> None:
    with pytest.raises(ArchiveError, match="could not be downloaded"):
        download(url, tmp_path / "cells.zip", attempts=1)


def test_cache_that_cannot_be_made_is_told_with_its_variable(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ArchiveError, match="file/cache cannot be made: .*; set MALARIA_RAY_CACHE to another folder"):
        download("http://127.0.0.1:1/x", tmp_path / "file" / "cache" / "cells.zip")


# --- the archive `nih` -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"MALARIA_RAY_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/h"}, "/b/malaria_ray"),
        ({"HOME": "/h"}, "/h/.cache/malaria_ray"),
        ({"HOME": "/h", "MALARIA_RAY_CACHE": "", "XDG_CACHE_HOME": ""}, "/h/.cache/malaria_ray"),  # empty is unset
        ({"HOME": "/h", "MALARIA_RAY_CACHE": "~/c"}, "/h/c"),  # quoted in a shell
    ],
)
def test_cache_folder(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], folder: str) -> None:
    for name in ("MALARIA_RAY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(folder)


def test_nih_is_fetched_once_into_the_cache_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"cell_images/Uninfected/C1_thinF_{i}.png": samples.noise(i) for i in range(20)}
    body = samples.zip_of({"cell_images/": b"", **files})
    with serve(Site({"/mirror/cell_images.zip": body}, cuts=[len(body) // 2])) as site:
        monkeypatch.setenv("MALARIA_RAY_NIH_URL", f"{site.url}/mirror/cell_images.zip")
        monkeypatch.setenv("MALARIA_RAY_CACHE", str(tmp_path / "cache"))
        for _ in range(2):
            listing = list_archive(open_archive("nih"))
            assert dict(zip(listing["image_id"].to_pylist(), read_files(listing), strict=True)) == files
        assert len(site.gets()) == 2  # cut once; the second time none
    assert (tmp_path / "cache" / "cell_images.zip").read_bytes() == body


def test_nih_that_cannot_be_fetched_tells_where_to_put_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(Site({})) as site:
        monkeypatch.setenv("MALARIA_RAY_NIH_URL", f"{site.url}/cell_images.zip")
        monkeypatch.setenv("MALARIA_RAY_CACHE", str(tmp_path))
        with pytest.raises(ArchiveError, match=f"404.*put it at {tmp_path}/cell_images.zip"):
            open_archive("nih")
