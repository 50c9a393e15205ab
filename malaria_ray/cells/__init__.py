"""Pure functions on images and their names: decoding and resizing, patients, splits, synthetic cells. No I/O, no
Ray.
"""
