"""Pure functions on tables of scores: metrics, their intervals, what a patient's counts say. No I/O, no Ray."""
