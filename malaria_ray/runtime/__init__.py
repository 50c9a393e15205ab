"""The outside world: the Ray session, storage behind fsspec URLs, the protocol of output directories, provenance."""
