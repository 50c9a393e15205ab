"""All side-by-side measurements: make bench."""

from tests.benchmarks import ingest, listing, queries

ingest.main()
listing.main()
queries.main()
