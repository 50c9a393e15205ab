"""The article's cnn, split by image, as the article does: cells of one patient on both sides.

command:   ray job submit --working-dir . -- python jobs/train_cnn_by_image.py DATASET RUN
hardware:  one worker with all CPUs of a node, or its GPU
time:      ??
result:    test accuracy ?? (the article: 94.97 %)
"""

import sys

from malaria_ray.stages import train

dataset, run = sys.argv[1:]
train.run(train.Config(dataset=dataset, run=run, model="cnn", split_by="image", seed=42))
