"""Results with labels → metrics and patients, intervals by bootstrap over patients.

command:   ray job submit --working-dir . -- python jobs/evaluate.py RESULTS [FLAGS]
hardware:  one CPU
time:      3 s for 10,678 crops of 81 patients
result:    metrics/ and patients/ beside the predictions
"""

import sys

from malaria_ray import cli

if len(sys.argv) <= 1 or sys.argv[1] in ("-h", "--help"):
    sys.exit(__doc__)
results, *flags = sys.argv[1:]
sys.exit(cli.main(["evaluate", results, *flags]))
