"""compare: results directories side by side, on the images that they share; or runs (run_comparison.py)."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from tyro.conf import Positional

from malaria_ray.errors import ConfigError, QueryError
from malaria_ray.runtime import outputs, storage
from malaria_ray.runtime.terminal import console
from malaria_ray.schema import RESEARCH_ONLY
from malaria_ray.stages.comparison import Pair, metrics_table, page, pair_of
from malaria_ray.stages.run_comparison import compare_runs
from malaria_ray.stages.views import absent_views, connect, open_results

log = logging.getLogger("malaria_ray")

_MAX_THUMBNAILS = 100


@dataclass(frozen=True, kw_only=True)
class Config:
    """Compares each results directory with the first: differences of metrics with paired intervals, disagreements."""

    results: Positional[tuple[str, ...]]
    """Two or more directories made by 'malaria-ray screen', the one to compare with first; or runs made by
    'malaria-ray train', with results of theirs if there are, for their test data."""
    report: str | None = None
    """File or URL to write the comparison to as one HTML page, with pictures."""
    thumbnails: int = 24
    """Cells that each gallery of the page shows at most."""
    n_resamples: int = 1000
    """Resamples of the bootstrap over patients."""
    seed: int = 42
    """Seed of the bootstrap."""
    figure: str = "comparison.png"
    """Where the figure of runs is written."""

    def __post_init__(self) -> None:
        if len(self.results) < 2:
            raise ConfigError(f"{len(self.results)} results directories were given; give two or more")
        if self.n_resamples < 100:
            raise ConfigError(f"--n-resamples {self.n_resamples}: at least 100 are needed for a 95 % interval")
        if not 0 <= self.thumbnails <= _MAX_THUMBNAILS:
            raise ConfigError(f"--thumbnails {self.thumbnails}: allowed are 0 to {_MAX_THUMBNAILS}")


def run(config: Config) -> None:
    """Prints one table for each directory but the first, and writes the page where one is asked; or tells of runs."""
    if "train" in {outputs.stage_of(storage.locate(url)) for url in config.results}:
        storage.write_bytes(storage.locate(config.figure), compare_runs(config.results))
        log.info("figure: %s", config.figure)
        return
    first, *others = opened = open_results(config.results)
    if (line := absent_views(opened).get("splits") or absent_views(opened).get("predictions")) is not None:
        raise QueryError(line)
    connection = connect(opened)
    pairs = []
    for other in others:
        pairs.append(pair_of(connection, first, other, n_resamples=config.n_resamples, seed=config.seed))
        _print_pair(pairs[-1])
    if config.report is not None:
        target = storage.locate(config.report)
        storage.write_bytes(target, page(connection, pairs, thumbnails=config.thumbnails).encode())
        console().print(f"{target}  open it in a browser", markup=False, soft_wrap=True)
    else:
        console().print("--report FILE.html writes this as a page, with the curves and pictures", markup=False)
    console().print(RESEARCH_ONLY)


def _print_pair(pair: Pair) -> None:
    out = console()
    shared = pair.shared
    if pair.metrics is not None:
        out.print(metrics_table(pair))
    else:
        out.print("No shared image has a label, so there are no metrics to compare.")
    out.print(
        f"{(shared['called'] != shared['other_called']).sum():,} of {len(shared):,} shared images are called "
        f"differently; the scores differ by {(shared['other_score'] - shared['score']).mean():+.4f} on average.",
        soft_wrap=True,
    )
    out.print(
        f"malaria-ray query {pair.first.path} {pair.other.path} --example model-disagreement lists them.",
        markup=False,
        soft_wrap=True,
    )
