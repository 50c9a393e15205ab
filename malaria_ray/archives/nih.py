"""The official NIH/NLM download as an archive: fetched once into a cache, resumed when cut, its size checked.

Rajaraman et al. 2018, PeerJ 6:e4568: 27,558 cell crops of 200 patients.
"""

from __future__ import annotations

import os

from malaria_ray.archives.zips import ZipArchive
from malaria_ray.runtime import storage
from malaria_ray.runtime.download import cache_folder, download

NIH_URL = "https://data.lhncbc.nlm.nih.gov/public/Malaria/cell_images.zip"


def nih_archive() -> ZipArchive:
    """The downloaded `cell_images.zip`; a mirror's URL may stand in MALARIA_RAY_NIH_URL. Raises: `ArchiveError`."""
    url = os.environ.get("MALARIA_RAY_NIH_URL") or NIH_URL
    return ZipArchive(storage.locate(str(download(url, cache_folder() / "cell_images.zip"))))
