"""Archive and run → one score per image, ONNX Runtime on CPUs.

command:   ray job submit --working-dir . -- python jobs/screen.py ARCHIVE RESULTS RUN
hardware:  any CPU workers, one scoring actor a CPU
time:      38 s for 10,678 crops with the cnn on two CPU cores, Ray's start included
result:    rows found = predictions + quarantine, by 'malaria-ray verify RESULTS'
"""

import sys

from malaria_ray.stages import screen

source, results, model = sys.argv[1:]
screen.run(screen.Config(source=source, results=results, model=model))
