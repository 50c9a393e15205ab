"""What a command says while it works."""

from __future__ import annotations

import pytest

from malaria_ray.runtime import terminal


def test_time_left_is_told_by_the_pace_since_the_first_images_not_by_the_start(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """A screening takes 3 s or more to start, in which no image is done."""
    caplog.set_level("INFO")
    clock = iter([0.0, 12.0, 23.0, 34.0])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(terminal.sys.stderr, "isatty", lambda: False)
    with terminal.progress("screen", 4200) as report:
        for n in (1000, 1100, 2100):
            report(n)
    assert [record.getMessage() for record in caplog.records] == [
        "screen: 1,000 of 4,200 images, 83/s, 38 s left",
        "screen: 2,100 of 4,200 images, 91/s, 21 s left",
        "screen: 4,200 of 4,200 images, 124/s in 34.0 s",
    ]
