"""Cross-validation of the augmented cnn, five folds: each patient is in the test split of one of them.

command:   ray job submit --working-dir . -- python jobs/cross_validate_cnn.py DATASET RUNS RESULTS
hardware:  one worker with all CPUs of a node, or its GPU; fold after fold
time:      8 min a fold of 10,678 crops on two CPU cores
result:    test accuracy 92.8, 94.3, 91.6, 95.9, 96.3 %; pooled by 'malaria-ray compare' 94.2 % (90.8 – 96.4)
"""

import sys

from malaria_ray import cli

N_FOLDS = 5

if len(sys.argv) != 4:
    sys.exit(__doc__)
dataset, runs, results = sys.argv[1:]
recipe = f"--model cnn --augment on --epochs 8 --patience 0 --folds {N_FOLDS} --seed 42"
for fold in range(1, N_FOLDS + 1):
    run, scores = f"{runs}/fold-{fold}", f"{results}/fold-{fold}"
    for command in (
        ["train", dataset, run, *recipe.split(), "--fold", str(fold)],
        ["screen", dataset, scores, "--model", run, "--split", "test"],
        ["evaluate", scores],
    ):
        if status := cli.main(command):
            sys.exit(status)
