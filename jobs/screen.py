"""Archive and run → one score per image, ncnn on CPUs, ONNX Runtime or Keras on GPUs.

command:   ray job submit --working-dir . -- python jobs/screen.py ARCHIVE RESULTS RUN [FLAGS]
hardware:  the CPU workers that are there, one scoring actor a CPU; --num-actors 1-80 lets an autoscaler add more
time:      38 s for 10,678 crops with the cnn on two CPU cores, Ray's start included
result:    rows found = predictions + quarantine, by 'malaria-ray verify RESULTS'
"""

import sys

from malaria_ray import cli

if len(sys.argv) <= 3:
    sys.exit(__doc__)
source, results, model, *flags = sys.argv[1:]
sys.exit(cli.main(["screen", source, results, "--model", model, *flags]))
