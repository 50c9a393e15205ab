"""A stage run as a user runs it, by the command in a process group of its own, and killed with SIGKILL."""

from __future__ import annotations

import glob
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def run_and_kill(arguments: list[str], *, when: Path, timeout_s: float = 240) -> None:
    """Starts `malaria-ray` and kills it and its Ray, all of them, as soon as a file matches `when`."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, "-m", "malaria_ray", *arguments],
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    deadline = time.monotonic() + timeout_s
    while not glob.glob(str(when)):  # noqa: PTH207 - stars in folders too
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"ended too early: {process.communicate(timeout=10)[0].decode()[-2000:]}")
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)  # the driver first: nothing of it can tidy up
    process.wait()
    time.sleep(1)
