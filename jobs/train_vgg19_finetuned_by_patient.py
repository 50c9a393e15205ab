"""VGG-19 with its blocks 4 and 5 trained too, split by patient, from the head of the frozen run of the same split.

command:   ray job submit --working-dir . -- python jobs/train_vgg19_finetuned_by_patient.py DATASET RUN FROZEN [FLAGS]
hardware:  one worker with all CPUs of a node, or its GPU
time:      24 min for 10,678 crops on two CPU cores with AVX512-BF16 (17.7 images/s), 3 epochs
result:    test accuracy 96.1 % (94.3 – 97.4) on 26 unseen patients, fully on an H100 96.7 %
"""

import sys

from malaria_ray import cli

if len(sys.argv) <= 3:
    sys.exit(__doc__)
dataset, run, frozen, *flags = sys.argv[1:]
recipe = "--model vgg19-finetuned --split-by patient --precision bf16 --batch-size 32 --epochs 3 --seed 42"
sys.exit(cli.main(["train", dataset, run, "--init-from", frozen, *recipe.split(), *flags]))
