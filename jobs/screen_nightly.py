"""What lies under a prefix → results in a folder of the day (UTC). Run twice on a day it does nothing.

command:   ray job submit --working-dir . -- python jobs/screen_nightly.py INCOMING RESULTS_PREFIX RUN
hardware:  any CPU workers, one scoring actor a CPU
time:      as jobs/screen.py
result:    RESULTS_PREFIX/2026-01-31/_SUCCESS.json
"""

import datetime
import sys

from malaria_ray.stages import screen

incoming, prefix, model = sys.argv[1:]
results = f"{prefix.rstrip('/')}/{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
screen.run(screen.Config(source=incoming, results=results, model=model))
