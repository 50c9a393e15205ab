"""The article's cnn, split by patient.

command:   ray job submit --working-dir . -- python jobs/train_cnn_by_patient.py DATASET RUN
hardware:  one worker with all CPUs of a node, or its GPU
time:      ??
result:    test accuracy ?? (published by patient, other models: 95.9 %)
"""

import sys

from malaria_ray.stages import train

dataset, run = sys.argv[1:]
train.run(train.Config(dataset=dataset, run=run, model="cnn", split_by="patient", seed=42))
