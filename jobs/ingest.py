"""Archive → dataset of crops at 125 × 125.

command:   ray job submit --working-dir . -- python jobs/ingest.py ARCHIVE DATASET
hardware:  any CPU workers, one task a CPU
time:      19 s for 10,678 crops on two CPU cores, Ray's start included
result:    10,678 files, each in the manifest once; none in quarantine
"""

import sys

from malaria_ray.stages import ingest

archive, dataset = sys.argv[1:]
ingest.run(ingest.Config(archive=archive, dataset=dataset))
