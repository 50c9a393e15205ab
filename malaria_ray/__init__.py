"""malaria_ray: train on, screen and report archives of red-blood-cell images with Ray.

A research tool, not a diagnosis. ARCHITECTURE.md beside this file is the one-page map.
"""

__version__ = "0.1.0"
