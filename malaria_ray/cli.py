"""The command `malaria-ray`: one sub-command a stage, its flags the fields of the stage's config."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from malaria_ray import __version__
from malaria_ray.errors import ConfigError, MalariaRayError
from malaria_ray.runtime.redaction import without_secrets
from malaria_ray.runtime.terminal import ignore_sigterm, printable, stop_on_sigterm
from malaria_ray.schema import RESEARCH_ONLY

COMMANDS = {
    "demo": "the whole line on a small archive, on this machine",
    "ingest": "archive → dataset: decode and resize every image, one row per file",
    "pack": "archive → few Parquet files of its images as they are, for archives of millions of small files",
    "train": "dataset → run: train a model that tells parasitized from uninfected cells",
    "plan": "what a screening would read and how long it would take, from a sample; writes nothing",
    "screen": "archive or dataset → results: score every image with a run's model",
    "evaluate": "results → metrics and patients, where there are labels",
    "report": "results → report/index.html, one file to read in a browser, and catalog.sql",
    "query": "SQL over the tables of one or several results, by DuckDB",
    "compare": "two or more results side by side, with paired intervals",
    "explain": "results → where the model looked in given images: Grad-CAM as arrays and overlays",
    "audit": "results of one or several runs → likely wrong labels, and the metrics with and without them",
    "verify": "prove the invariants of a dataset or results directory",
    "schema": "print the data dictionary",
    "submit": "any of these as a job on a cluster: malaria-ray submit -- screen …",
    "jobs": "list the jobs of a cluster",
    "doctor": "check a cluster: token, versions, storage, model, memory, clocks, devices",
}

_MODULES = {  # of the commands that are no stage
    "demo": "malaria_ray.demo",
    "submit": "malaria_ray.submit",
    "jobs": "malaria_ray.joblist",
    "doctor": "malaria_ray.doctor",
}


_REFUSED = {  # by the system, to whoever may not write there
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "check that you may write there"),
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
}
_CLIENTS = ("botocore", "aiobotocore", "gcsfs", "google", "aiohttp")  # of object stores and the web


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status: 0 done, 1 failed, 2 wrong usage."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    ours = arguments[: arguments.index("--")] if "--" in arguments else arguments  # what follows is a job's
    debug = "--debug" in ours
    arguments = [argument for argument in ours if argument != "--debug"] + arguments[len(ours) :]
    if not arguments or arguments[0] in ("-h", "--help"):
        _print_help()
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"malaria-ray {__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"malaria-ray: {command!r} is no command; allowed are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    _configure_output(debug)
    stop_on_sigterm()
    try:
        return _run(command, rest)
    except MalariaRayError as error:
        if debug:
            print(without_secrets(traceback.format_exc()), end="", file=sys.stderr)
        print(f"malaria-ray {command}: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        ignore_sigterm()
        print(f"malaria-ray {command}: stopped; run the same command again to go on", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            print(without_secrets(traceback.format_exc()), end="", file=sys.stderr)
        print(f"malaria-ray {command}: {_unexpected(error)}", file=sys.stderr)
        return 1


def parse(command: str, *arguments: str) -> Any:
    """The config of a command. Raises: `ConfigError` where there is no such command; ends the process with 2 where a
    flag is wrong.
    """
    import tyro

    if command not in COMMANDS:
        raise ConfigError(f"{command!r} is no command; allowed are {', '.join(COMMANDS)}")
    return tyro.cli(
        _module(command).Config,
        prog=f"malaria-ray {command}",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName),
    )


def _run(command: str, arguments: list[str]) -> int:
    return _module(command).run(parse(command, *arguments)) or 0


def _module(command: str) -> Any:
    return importlib.import_module(_MODULES.get(command, f"malaria_ray.stages.{command}"))


def _configure_output(debug: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    log = logging.getLogger("malaria_ray")
    log.handlers[:] = [handler]
    log.setLevel(logging.DEBUG if debug else logging.INFO)
    log.propagate = False
    if not debug:
        warnings.simplefilter("ignore")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")  # Ray's workers are processes of their own
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, without_secrets(super().format(record)).splitlines()))


def _unexpected(error: BaseException) -> str:
    """An error that is not ours: Ray puts whole tracebacks into its messages, whose last line is what was raised."""
    cause = getattr(error, "cause", error)  # in a worker: the error that Ray's wraps
    if isinstance(cause, OSError) and cause.errno in _REFUSED:
        where = f"{cause.filename}: " if cause.filename and "\n" not in str(cause.filename) else ""  # a text of Ray's
        what = without_secrets(where) + os.strerror(cause.errno)
        return printable(f"{what}; {_REFUSED[cause.errno]}, or choose another place, then run again")
    lines = [line for line in str(error).splitlines() if line.strip()]
    if not lines:
        return f"{type(error).__name__}; --debug shows where"
    said = without_secrets(" ".join(lines[-1].split()))[:400]
    if any(type(one).__module__.partition(".")[0] in _CLIENTS for one in (cause, cause.__cause__)):
        return printable(
            f"{said}; check the URLs that were given, your credentials and whether the server answers, then run again "
            "(--debug shows where)"
        )
    return printable(f"{type(error).__name__}: {said}; --debug shows where")


def _one_line(error: BaseException) -> str:
    return printable(without_secrets(" ".join(str(error).split())))


def _print_help() -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"malaria-ray {__version__}: red-blood-cell images with Ray. {RESEARCH_ONLY}\n")
    console.print("usage: malaria-ray COMMAND … [--debug]      malaria-ray COMMAND --help\n", markup=False)
    for name, meaning in COMMANDS.items():
        console.print(f"  {name:10} {meaning}")
    console.print(
        "\nExit status: 0 done, 1 failed with one line that says what to do, 2 wrong usage, 130 stopped by Ctrl-C or "
        "SIGTERM."
    )
