"""All side-by-side measurements: make bench."""

from tests.benchmarks import ingest, listing

ingest.main()
listing.main()
