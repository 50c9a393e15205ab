from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest
from stages.conftest import Line

from malaria_ray.archives import open_archive
from malaria_ray.archives.listing import list_archive
from malaria_ray.errors import ConfigError, ModelError, NotCompleteError
from malaria_ray.stages import ingest, plan


def plan_of(source: Path, line: Line, capsys: pytest.CaptureFixture[str], **flags) -> dict:
    plan.run(plan.Config(source=str(source), model=str(line.run), json=True, **{"sample": 40, **flags}))
    return json.loads(capsys.readouterr().out)


def test_plan_says_what_would_be_read_and_writes_nothing(
    line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copy(line.archive, tmp_path / "cells.zip")
    with zipfile.ZipFile(tmp_path / "cells.zip", "a", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("other/README", b"bzip2")
    found = plan_of(tmp_path / "cells.zip", line, capsys)
    assert (found["n_files"], found["n_patients"], found["n_without_patient"]) == (241, 24, 1)
    assert found["endings"] == {".png": 240, "none": 1}
    assert (found["read_as"], found["not_readable"]) == ({"stored": 240}, {"zip method 12": 1})
    assert sum(found["labels"].values()) == 241
    assert found["labels"]["unlabelled"] == 1
    assert (found["sample"]["n"], found["sample"]["n_usable"]) == (40, 40)
    assert found["bottleneck"] in ("read", "decode", "forward")
    assert [file.name for file in tmp_path.iterdir()] == ["cells.zip"]


def test_time_falls_with_actors_and_memory_grows(line: Line, capsys: pytest.CaptureFixture[str]):
    one, ten = (plan_of(line.archive, line, capsys, num_actors=n) for n in (1, 10))
    assert ten["n_actors"] == 10
    assert ten["memory"]["all_bytes"] > one["memory"]["all_bytes"]


def test_estimate_is_start_and_images_over_rate():
    measured = {"read_s": 0.001, "decode_s": 0.002, "forward_s": 0.007, "grown_bytes": 10**8}
    found = plan.estimate({"n_files": 1_000_000}, measured, n_actors=20, listing_bytes=10**8)
    assert found["bottleneck"] == "forward"
    assert found["ceiling_images_per_second"] == 2000
    assert found["images_per_second"] == pytest.approx(2000 * plan._EFFICIENCY)
    assert found["estimated_s"] == pytest.approx(plan._START_S + 1_000_000 / (2000 * plan._EFFICIENCY), rel=1e-3)


@pytest.mark.parametrize("engine", ["ncnn", "onnx", "keras"])
@pytest.mark.parametrize("content", [None, b"x"])
def test_a_run_without_its_model_file_is_told_in_one_line(line: Line, copy_of, engine: str, content: bytes | None):
    run = copy_of(line.run)
    file = run / ("model.keras" if engine == "keras" else "model.onnx")
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ModelError, match=f"{file} is (missing|not the file that training wrote)"):
        plan.run(plan.Config(source=str(line.archive), model=str(run), engine=engine))


def test_dataset_costs_no_decoding(line: Line, capsys: pytest.CaptureFixture[str]):
    found = plan_of(line.dataset, line, capsys)
    assert found["read_as"] == {"crops": 240}
    assert found["sample"]["decode_s"] == 0
    assert found["n_bytes"] == sum(part.stat().st_size for part in (line.dataset / "crops").iterdir())


def test_sample_is_spread_and_the_same_for_a_seed(line: Line):
    listing = list_archive(open_archive(str(line.archive)))
    chosen = plan.choose(listing, 96, seed=1)
    assert chosen.num_rows == 96
    assert chosen.equals(plan.choose(listing, 96, seed=1))
    assert len(set(chosen["key"].to_pylist())) == 96
    assert max(chosen["key"].to_pylist()) > 160
    assert plan.choose(listing, 1000, seed=1).equals(listing)


def test_tables_for_people(line: Line, capsys: pytest.CaptureFixture[str]):
    plan.run(plan.Config(source=str(line.archive), model=str(line.run), sample=20, num_actors=4))
    out = capsys.readouterr().out
    for said in ("240", "forward", "4 actors: about", "of memory an actor", "bottleneck:"):
        assert said in out


def test_what_cannot_be_planned_is_refused(line: Line, tmp_path: Path):
    ingest.run(ingest.Config(archive=str(line.archive), dataset=str(tmp_path / "other"), image_size=40))
    with pytest.raises(ModelError, match="40 × 40 pixels, the model takes 32 × 32"):
        plan.run(plan.Config(source=str(tmp_path / "other"), model=str(line.run)))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_text("no image")
    with pytest.raises(ConfigError, match=r"none of the 1 sampled files can be used \({'not_an_image': 1}\)"):
        plan.run(plan.Config(source=str(tmp_path / "bad"), model=str(line.run)))
    with pytest.raises(NotCompleteError, match="it is made by 'malaria-ray train'"):
        plan.run(plan.Config(source=str(line.archive), model=str(tmp_path / "none")))
