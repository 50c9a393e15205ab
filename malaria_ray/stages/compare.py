"""compare: results directories side by side, on the images that they share; or runs (run_comparison.py)."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from tyro.conf import Positional

from malaria_ray.errors import ConfigError
from malaria_ray.runtime import outputs, storage
from malaria_ray.runtime.seeds import check_seed
from malaria_ray.runtime.terminal import console
from malaria_ray.schema import RESEARCH_ONLY
from malaria_ray.stages.comparison import Pair, check_labels, metrics_table, page, pair_of
from malaria_ray.stages.run_comparison import compare_runs
from malaria_ray.stages.views import check_cells, open_results, reading

log = logging.getLogger("malaria_ray")

_THUMBNAILS, _MAX_THUMBNAILS = 24, 100


@dataclass(frozen=True, kw_only=True)
class Config:
    """Compares each results directory with the first: differences of metrics with paired intervals, disagreements."""

    results: Positional[tuple[str, ...]]
    """Two or more directories made by 'malaria-ray screen', the one to compare with first; or runs made by
    'malaria-ray train', with results of theirs if there are, for their test data."""
    report: str | None = None
    """Of results: file or URL to write the comparison to as one HTML page, with pictures."""
    thumbnails: int | None = None
    """Of the page: cells that each gallery shows at most, by default 24."""
    n_resamples: int = 1000
    """Resamples of the bootstrap over patients."""
    seed: int = 42
    """Seed of the bootstrap."""
    figure: str | None = None
    """Of runs: file or URL to write their curves to, as PNG."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if len(self.results) < 2:
            raise ConfigError(f"{len(self.results)} results directories were given; give two or more")
        if self.n_resamples < 100:
            raise ConfigError(f"--n-resamples {self.n_resamples}: at least 100 are needed for a 95 % interval")
        if self.thumbnails is not None and self.report is None:
            raise ConfigError(f"--thumbnails {self.thumbnails} is of the page; give --report FILE.html too")
        if self.thumbnails is not None and not 0 <= self.thumbnails <= _MAX_THUMBNAILS:
            raise ConfigError(f"--thumbnails {self.thumbnails}: allowed are 0 to {_MAX_THUMBNAILS}")


def run(config: Config) -> None:
    """Prints one table for each directory but the first, and writes the page where one is asked; or tells of runs.

    Raises: `ConfigError` where a flag is of the other comparison.
    """
    if "train" in {outputs.stage_of(storage.locate(url)) for url in config.results}:
        if config.report is not None:
            raise ConfigError(
                f"--report {config.report}: runs have no page; leave it out (--figure is theirs) or give results alone"
            )
        figure = compare_runs(config.results, n_resamples=config.n_resamples, seed=config.seed)
        if config.figure is not None:
            storage.write_bytes(storage.locate(config.figure), figure)
            log.info("figure: %s", config.figure)
        else:
            console().print("--figure FILE.png writes their curves")
        console().print(RESEARCH_ONLY)
        return
    if config.figure is not None:
        raise ConfigError(
            f"--figure {config.figure}: results have no such figure; leave it out (--report is theirs) or give runs"
        )
    if config.report is not None and storage.locate(config.report).is_dir():
        raise ConfigError(f"--report {config.report} is a directory; give the page's file, as PAGE.html")
    first, *others = opened = open_results(config.results)
    check_cells(opened)
    thumbnails = _THUMBNAILS if config.thumbnails is None else config.thumbnails
    with reading(opened) as connection:
        check_labels(connection)
        pairs = [
            pair_of(connection, first, other, n_resamples=config.n_resamples, seed=config.seed) for other in others
        ]
        html = page(connection, pairs, thumbnails=thumbnails) if config.report is not None else None
    for pair in pairs:
        _print_pair(pair)
    if config.report is not None and html is not None:
        target = storage.locate(config.report)
        storage.write_bytes(target, html.encode())
        console().print(f"{target}  open it in a browser", soft_wrap=True)
    else:
        console().print("--report FILE.html writes this as a page, with the curves and pictures")
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
        soft_wrap=True,
    )
