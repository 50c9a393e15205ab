"""The official NIH/NLM download as an archive: fetched once into a cache, resumed when cut, its size checked.

Rajaraman et al. 2018, PeerJ 6:e4568: 27,558 cell crops of 200 patients.
"""

from __future__ import annotations

import os
from pathlib import Path

from malaria_ray.archives.zips import ZipArchive
from malaria_ray.runtime import storage
from malaria_ray.runtime.download import download

NIH_URL = "https://data.lhncbc.nlm.nih.gov/public/Malaria/cell_images.zip"


def cache_folder() -> Path:
    """Where downloads are kept: MALARIA_RAY_CACHE, else `malaria_ray` in XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("MALARIA_RAY_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "malaria_ray"


def nih_archive() -> ZipArchive:
    """The downloaded `cell_images.zip`; a mirror's URL may stand in MALARIA_RAY_NIH_URL. Raises: `ArchiveError`."""
    url = os.environ.get("MALARIA_RAY_NIH_URL") or NIH_URL
    return ZipArchive(storage.locate(str(download(url, cache_folder() / "cell_images.zip"))))
