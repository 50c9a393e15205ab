"""How much of an archive may be unusable: `--max-bad-fraction`, the same in all stages that read one."""

from __future__ import annotations

from collections.abc import Mapping

from malaria_ray.errors import ConfigError, TooManyBadImagesError
from malaria_ray.runtime.terminal import counted


def check_fraction(allowed: float) -> None:
    """Raises: `ConfigError` for what is no fraction."""
    if not 0 <= allowed <= 1:
        raise ConfigError(f"--max-bad-fraction {allowed}: allowed are 0 to 1")


def check_few_refused(
    reasons: Mapping[str, int], n_files: int, *, allowed: float, what_to_do: str, cannot: str = "be used"
) -> None:
    """`reasons`: how many files were refused for each. Raises: `TooManyBadImagesError` where they are too many."""
    n_refused = sum(reasons.values())
    if n_refused / n_files > allowed:  # 0.29 of 100 is 28.999… in floating point
        raise TooManyBadImagesError(
            f"{n_refused:,} of {n_files:,} files cannot {cannot} ({counted(reasons)}), more than --max-bad-fraction "
            f"{allowed}; {what_to_do}"
        )
