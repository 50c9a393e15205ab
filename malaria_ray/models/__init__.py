"""Keras builders, the training step and the engines that score. Keras and TensorFlow are imported only below here."""
