"""The article's cnn under augmentation, split by patient.

command:   ray job submit --working-dir . -- python jobs/train_cnn_by_patient.py DATASET RUN [FLAGS]
hardware:  one worker with all CPUs of a node, or its GPU
time:      20 epochs of 50 s for 10,678 crops on two CPU cores (133 images/s)
result:    test accuracy 96.4 % (95.2 – 97.4) on 26 unseen patients; without augmentation 93.1 % (87.5 – 96.3)
"""

import sys

from malaria_ray import cli

if len(sys.argv) <= 2:
    sys.exit(__doc__)
dataset, run, *flags = sys.argv[1:]
recipe = "--model cnn --augment on --split-by patient --epochs 20 --patience 0 --seed 42"
sys.exit(cli.main(["train", dataset, run, *recipe.split(), *flags]))
