"""All side-by-side measurements: make bench, or python -m tests.benchmarks [--n 500] for a try."""

import sys

from tests.benchmarks import decoding, growth, ingest, listing, queries, screening, start, training

if "--n" in sys.argv:  # a try: also the benchmark of growth, with this number and its double
    n = int(sys.argv[sys.argv.index("--n") + 1])
    growth_arguments = ["--n", str(n), str(2 * n)]
else:
    growth_arguments = []
for benchmark in (decoding, screening, start):
    benchmark.main(sys.argv[1:])
growth.main(growth_arguments)
sys.argv = sys.argv[:1]
ingest.main()
listing.main()
queries.main()
training.main()
