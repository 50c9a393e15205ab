"""The numbers that seed what is drawn at random."""

from __future__ import annotations

from malaria_ray.errors import ConfigError

MAX_SEED = 2**32 - 1  # Keras takes no larger one


def check_seed(seed: int) -> None:
    """Raises: `ConfigError` where numpy or Keras would refuse the seed, which may be after hours."""
    if not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"--seed {seed}: allowed are 0 to {MAX_SEED:,}")
