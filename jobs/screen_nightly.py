"""What lies under a prefix → results in a folder of the day (UTC). Run twice on a day it does nothing.

command:   ray job submit --working-dir . -- python jobs/screen_nightly.py INCOMING RESULTS_PREFIX RUN [FLAGS]
hardware:  as jobs/screen.py
time:      as jobs/screen.py
result:    RESULTS_PREFIX/2026-01-31/_SUCCESS.json
"""

import datetime
import sys

from malaria_ray import cli

if len(sys.argv) <= 3:
    sys.exit(__doc__)
incoming, prefix, model, *flags = sys.argv[1:]
results = f"{prefix.rstrip('/')}/{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
sys.exit(cli.main(["screen", incoming, results, "--model", model, *flags]))
