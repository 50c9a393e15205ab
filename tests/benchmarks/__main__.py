"""All side-by-side measurements: make bench."""

from tests.benchmarks import ingest, listing, queries, training

ingest.main()
listing.main()
queries.main()
training.main()
