"""VGG-19 with its blocks 4 and 5 trained too, split by patient, from the head of the frozen run of the same split.

command:   ray job submit --working-dir . -- python jobs/train_vgg19_finetuned_by_patient.py DATASET RUN WEIGHTS FROZEN
hardware:  one worker with all CPUs of a node, or its GPU
time:      ??
result:    test accuracy ?? (published by patient, other models: 95.9 %)
"""

import sys

from malaria_ray.stages import train

dataset, run, weights, frozen = sys.argv[1:]
train.run(
    train.Config(
        dataset=dataset,
        run=run,
        model="vgg19-finetuned",
        weights=weights,
        init_from=frozen,
        split_by="patient",
        seed=42,
    )
)
