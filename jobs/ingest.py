"""Archive → dataset of crops at 125 × 125.

command:   ray job submit --working-dir . -- python jobs/ingest.py ARCHIVE DATASET [FLAGS]
hardware:  any CPU workers, one task a CPU
time:      19 s for 10,678 crops on two CPU cores, Ray's start included
result:    10,678 files, each in the manifest once; none in quarantine
"""

import sys

from malaria_ray import cli

if len(sys.argv) <= 2:
    sys.exit(__doc__)
archive, dataset, *flags = sys.argv[1:]
sys.exit(cli.main(["ingest", archive, dataset, *flags]))
