"""Fetching one large file over HTTP into a cache, once."""

from __future__ import annotations

import http.client
import os
import time
import urllib.error
import urllib.request
from pathlib import Path

from malaria_ray.errors import ArchiveError
from malaria_ray.runtime.terminal import progress

_CHUNK = 1024**2
_ATTEMPTS = 5


def cache_folder() -> Path:
    """Where downloads are kept: MALARIA_RAY_CACHE, else `malaria_ray` in XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("MALARIA_RAY_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "malaria_ray"


def download(url: str, target: Path, *, attempts: int = _ATTEMPTS, wait_s: float = 1.0) -> Path:
    """Fetches `url` to `target`, unless it is there; a part that an earlier process left is continued.

    The size must be the one that the server announces; only then does `target` appear.
    Raises: `ArchiveError` after `attempts` tries without progress, `wait_s` seconds apart and doubling.
    """
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArchiveError(
            f"{target.parent} cannot be made: {error}; set MALARIA_RAY_CACHE to another folder"
        ) from error
    part = target.with_name(target.name + ".part")
    failures, before = 0, -1
    while True:
        try:
            _continue(url, part)
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: no URL at all
            size = part.stat().st_size if part.exists() else 0
            failures = 1 if size > before else failures + 1
            before = size
            permanent = isinstance(error, ValueError) or (
                isinstance(error, urllib.error.HTTPError) and error.code in (401, 403, 404, 410)
            )
            if permanent or failures >= attempts:
                kept = f"; {size:,} bytes are kept in {part} and the next run goes on from there" if size else ""
                raise ArchiveError(
                    f"{url} could not be downloaded: {error}{kept}. Without a network, fetch the file elsewhere "
                    f"and put it at {target}"
                ) from error
            time.sleep(wait_s * 2 ** (failures - 1))
        else:
            part.replace(target)
            return target


def _continue(url: str, part: Path) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have and _announced_total(error.headers.get("Content-Range", "")) == have:
            return  # nothing is left to fetch
        if error.code == 416:
            part.unlink()  # longer than the file: it is not a piece of it
        raise
    with response:
        if response.status != 206:
            have = 0  # the server sent the whole file again
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise OSError(f"the server sent {response.headers.get('Content-Range')} where bytes {have}- were asked for")
        total = have + int(response.headers.get("Content-Length", -1 - have))
        with (
            part.open("ab" if have else "wb") as file,
            progress(f"download {part.stem}", max(total, 0), "bytes") as report,
        ):
            report(have)
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                report(len(chunk))
    size = part.stat().st_size
    if total >= 0 and size != total:
        raise OSError(f"connection ended after {size:,} of {total:,} bytes")


def _announced_total(content_range: str) -> int:
    total = content_range.rpartition("/")[2]
    return int(total) if total.isdigit() else -1
