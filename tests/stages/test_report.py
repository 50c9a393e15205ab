from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import chromium, open_page, requested_urls
from pages import Page
from results import HOSTILE, cells, write_results
from samples import noise
from stages.conftest import Line, content

from malaria_ray import cli
from malaria_ray.errors import ConfigError, DirectoryError
from malaria_ray.runtime import outputs, storage
from malaria_ray.runtime.terminal import printable
from malaria_ray.schema import PATIENTS, PREDICTIONS, REVIEW
from malaria_ray.stages import evaluate, figures, report, verify
from malaria_ray.stages.views import connect, open_results


def reported(results: Path, *, is_evaluated: bool = True, **flags: Any) -> str:
    """The page of a results directory."""
    if is_evaluated:
        evaluate.run(evaluate.Config(results=str(results), n_resamples=100))
    report.run(report.Config(results=str(results), **flags))
    return page_of(results).read_text(encoding="utf-8")


def page_of(results: Path) -> Path:
    return results / "report" / "index.html"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results with 60 patients and files in quarantine, evaluated and reported."""
    results = write_results(
        tmp_path_factory.mktemp("report") / "made", cells(600, n_patients=60), bad=("bad/a.png", "bad/b.png")
    )
    reported(results)
    return results


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


def find(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def find_all(browser: Any, selector: str) -> list[Any]:
    return browser.find_elements("css selector", selector)


def test_the_report_of_a_real_screening_shows_pictures_of_its_cells(line: Line):
    page = Page(reported(line.results))
    assert "SYNTHETIC DATA" in page.text
    pictures = page.all("img")
    assert pictures
    assert all(picture["src"].startswith("data:image/jpeg;base64,") for picture in pictures)
    assert sum("red where the model looked" in picture["alt"] for picture in pictures) == len(pictures) / 2
    assert (line.results / "catalog.sql").exists()


def test_everything_a_reader_looks_for_is_there(made: Path):
    page = Page(page_of(made).read_text(encoding="utf-8"))
    ids = {attributes.get("id") for _, attributes in page.tags}
    assert {"metrics", "charts", "learning", "patients", "galleries", "quarantine", "data", "provenance"} <= ids
    assert {"false-positives", "false-negatives", "least-certain"} <= ids
    for words in (
        "A research tool, not a diagnosis",
        "It is not parasitaemia",
        "Confusion matrix",
        "ROC curve",
        "Precision and recall",
        "Calibration",
        "Loss by epoch",
        "2 of 602 files could not be used",
        "cnn-1",
    ):
        assert words in page.text
    assert "SYNTHETIC" not in page.text


def test_figures_are_those_of_the_tables(made: Path):
    text = Page(page_of(made).read_text(encoding="utf-8")).text
    metrics = pq.read_table(made / "metrics").to_pandas().query("split == 'test'").set_index(["level", "metric"])
    for name in ("accuracy", "sensitivity", "roc_auc", "expected_calibration_error"):
        row = metrics.loc[("cell", name)]
        assert f"{row['value']:.4f} {row['ci_low']:.3f} – {row['ci_high']:.3f}" in text
    for name in ("n_true_positive", "n_false_negative"):
        assert f"{metrics['value'][('cell', name)]:,.0f} {name[2:].replace('_', ' ')}s" in text
    rows = json.loads(re.search(r'id="patients-rows">(.*?)</script>', page_of(made).read_text())[1])
    patients = pq.read_table(made / "patients").to_pandas().set_index("patient_id")
    assert len(rows) == len(patients)
    columns = ["n_cells", "n_parasitized", "split"]
    for patient, _, n_cells, n_parasitized, _, _, _, split in rows:
        assert (n_cells, n_parasitized, split) == tuple(patients.loc[patient, columns])
    assert f"{(patients['split'] == 'test').sum()} patients by their cells of the test split" in text


def test_a_second_run_changes_nothing_and_says_so(made: Path, caplog: pytest.LogCaptureFixture):
    before = content(made)
    report.run(report.Config(results=str(made)))
    assert content(made) == before
    assert "nothing to do" in caplog.text


def test_a_page_of_other_code_is_made_anew(made: Path, monkeypatch: pytest.MonkeyPatch):
    before = page_of(made).read_text()
    page_of(made).write_text("what that code wrote")
    report.run(report.Config(results=str(made)))
    assert page_of(made).read_text() == "what that code wrote"
    monkeypatch.setattr(report, "code_digest", lambda: "0" * 16)
    report.run(report.Config(results=str(made)))
    assert page_of(made).read_text() == before
    monkeypatch.undo()
    report.run(report.Config(results=str(made)))  # `made` as it was


def test_a_report_written_anew_has_the_same_bytes(made: Path):
    before = content(made)
    report.run(report.Config(results=str(made), overwrite=True))
    assert content(made) == before


def test_evaluating_again_or_losing_the_page_makes_a_new_report(tmp_path: Path):
    results = write_results(tmp_path / "results", cells(60))
    assert "malaria-ray evaluate" in reported(results, is_evaluated=False)
    assert "malaria-ray evaluate" not in reported(results)
    page_of(results).unlink()
    assert "Sensitivity".lower() in reported(results)


def test_copies_of_a_cell_count_once_in_every_figure_of_the_page(tmp_path: Path):
    once = cells(480).assign(content_digest=lambda rows: rows["image_id"])
    wrong = once[(once["score"] >= 0.5) != (once["label"] == 1)]
    more = pd.concat([once, *(wrong.assign(image_id=f"copy {i}/" + wrong["image_id"]) for i in range(3))])
    told = []
    for name, of in (("once", once), ("more", more)):
        reported(write_results(tmp_path / name, of, has_images=False), thumbnails=0)
        text = Page(page_of(tmp_path / name).read_text(encoding="utf-8")).text
        told.append(
            re.findall(r"under the curve [\d.]+|precision [\d.]+;|error [\d.]+|[\d,]+ (?:true|false) \w+", text)
        )
    assert len(told[0]) >= 7
    assert told[0] == told[1]


def test_a_directory_named_like_markup_is_printed_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    results = write_results(tmp_path / "r[/red] [bold]:bug:", cells(60), has_images=False)
    reported(results, thumbnails=0)
    assert f"{page_of(results)}  open it" in capsys.readouterr().out.replace("\n", "")


def test_the_page_is_accessible(made: Path):
    page = Page(page_of(made).read_text(encoding="utf-8"))
    assert page.all("html")[0]["lang"] == "en"
    assert all(picture["alt"] for picture in page.all("img"))
    charts = page.all("svg")
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(set(ids)) == len(ids)
    assert len(charts) == 7
    for chart in charts:
        assert chart["role"] == "img"
        assert set(chart["aria-labelledby"].split()) <= set(ids)
    assert all(heading.get("scope") for heading in page.all("th"))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def hostile_results(folder: Path) -> Path:
    some = cells(len(HOSTILE) * 2)
    some["image_id"] = [f"{HOSTILE[i // 2]}{i}.png" for i in range(len(some))]
    some["patient_id"] = [HOSTILE[i // 2][:40] for i in range(len(some))]
    some["split"] = "test"
    bad = tuple(f"bad{name}.png" for name in HOSTILE)
    return write_results(folder / '<b>it\'s [a] "test"', some, bad=bad)


def test_hostile_names_are_text_and_nothing_else(tmp_path: Path):
    html = reported(hostile_results(tmp_path))
    page = Page(html)
    assert len(page.all("script")) == 2
    assert all(set(picture) <= {"src", "width", "height", "alt"} for picture in page.all("img"))
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "<script>alert(1)<0.png" in page.text
    assert "49" not in re.findall(r"\{\{ (\S+) \}\}", html)
    assert "{{ 7*7 }}{% raw %}" in page.text
    for letter in ("\u202e", "\u202c", "\x1b"):
        assert letter not in html
    assert "\\u202egnp.exe" in page.text


def test_hostile_names_run_nothing_in_a_browser(tmp_path: Path, browser: Any):
    results = hostile_results(tmp_path)
    reported(results)
    open_page(browser, page_of(results))
    assert browser.get_log("browser") == []
    assert find(browser, "h1").text == '<b>it\'s [a] "test"'
    names = [name.get_attribute("textContent") for name in find_all(browser, ".data tbody th")]
    assert sorted(names) == sorted(printable(name[:40]) for name in HOSTILE)
    assert find_all(browser, "body b img, body img[onerror]") == []


def test_the_page_needs_no_network_and_logs_no_error(made: Path, browser: Any):
    open_page(browser, page_of(made))
    assert {url.partition(":")[0] for url in requested_urls(browser)} <= {"file", "data"}
    assert browser.get_log("browser") == []


def test_the_patient_table_sorts_filters_and_turns_pages(made: Path, browser: Any):
    open_page(browser, page_of(made))

    def column(number: int) -> list[str]:
        return [cell.text for cell in find_all(browser, f".data tbody tr > :nth-child({number + 1})")]

    patients = pq.read_table(made / "patients").to_pandas()
    assert column(4) == sorted(column(4), reverse=True)
    assert float(column(4)[0]) == pytest.approx(patients["parasitized_fraction"].max(), abs=1e-4)
    heading = find(browser, ".data th button[data-column='2']")
    heading.send_keys("\n")  # by keyboard
    assert [int(n) for n in column(2)] == sorted(patients["n_cells"])[:25]
    assert heading.find_element("xpath", "..").get_attribute("aria-sort") == "ascending"
    heading.click()
    assert [int(n) for n in column(2)] == sorted(patients["n_cells"], reverse=True)[:25]
    status = find(browser, ".data [role=status]")
    assert status.text == "1–25 of 60"
    find(browser, ".data [data-page='1']").click()
    assert status.text == "26–50 of 60"
    find(browser, ".data input[type=search]").send_keys("c1")
    assert sorted(column(0)) == sorted(p for p in patients["patient_id"] if p.startswith("C1"))
    find(browser, ".data select").send_keys("parasitized")
    assert column(0) == []
    assert status.text == "none (of 60)"
    open_page(browser, page_of(made))
    find_all(browser, ".data select")[1].send_keys("val")
    assert column(7) == ["val"] * (patients["split"] == "val").sum()


def test_galleries_open_step_and_close_by_keyboard(made: Path, browser: Any):
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.wait import WebDriverWait

    open_page(browser, page_of(made))
    first, second = find_all(browser, ".cell")[:2]
    first.send_keys(Keys.ENTER)
    dialog = find(browser, "dialog")
    assert dialog.get_attribute("open") is not None
    shown = find(browser, "dialog bdi").text
    assert shown == first.find_element("xpath", "..").find_element("css selector", "bdi").get_attribute("textContent")
    assert find(browser, "dialog img").size["width"] > 200
    find(browser, "dialog button").send_keys(Keys.ARROW_RIGHT)
    assert find(browser, "dialog bdi").text != shown
    find(browser, "dialog button").send_keys(Keys.ESCAPE)
    assert dialog.get_attribute("open") is None
    WebDriverWait(browser, 20).until(lambda page: page.switch_to.active_element == second)  # a page is told later


def open_at(browser: Any, page: Path, width: int) -> None:
    open_page(browser, page)
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


@pytest.mark.parametrize("width", [360, 800, 1400])
def test_nothing_stands_out_of_the_page(made: Path, browser: Any, width: int):
    open_at(browser, page_of(made), width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_metrics_of_every_split_fit_on_a_phone(made: Path, browser: Any):
    open_at(browser, page_of(made), 390)
    tables = browser.execute_script(
        "return [...document.querySelectorAll('#metrics .scroll')].map(one => one.scrollWidth - one.clientWidth)"
    )
    assert tables
    assert set(tables) == {0}


def test_dark_mode_is_dark_and_print_is_not(made: Path, browser: Any):
    open_page(browser, page_of(made))

    def brightness(media: str, scheme: str) -> int:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
        colour = find(browser, "body").value_of_css_property("background-color")
        return sum(int(part) for part in re.findall(r"\d+", colour)[:3])

    assert brightness("screen", "light") == 765
    assert brightness("screen", "dark") < 150
    assert brightness("print", "dark") == 765
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})


def test_an_archive_that_is_gone_is_told_and_fails_nothing(tmp_path: Path):
    results = write_results(tmp_path / "results", cells(120))
    shutil.rmtree(tmp_path / "results-archive")
    page = Page(reported(results))
    assert page.all("img") == []
    assert "cells have no picture here" in page.text
    assert "FileNotFoundError" in page.text


def test_a_picture_is_never_that_of_other_bytes(tmp_path: Path):
    results = write_results(tmp_path / "results", cells(120))
    for file in (tmp_path / "results-archive").rglob("*.png"):
        file.write_bytes(noise(10_000))
    page = Page(reported(results))
    assert page.all("img") == []
    assert "other bytes under this name now" in page.text


def test_without_labels_there_is_a_screening_report(tmp_path: Path, browser: Any):
    results = write_results(tmp_path / "results", cells(200).assign(label=pd.NA, split=None))
    page = Page(reported(results))
    ids = {attributes.get("id") for _, attributes in page.tags}
    assert {"charts", "patients", "galleries", "parasitized", "least-certain"} <= ids
    assert not {"metrics", "false-positives", "false-negatives"} & ids
    assert "No image has a label" in page.text
    open_page(browser, page_of(results))
    assert browser.get_log("browser") == []


def test_without_patients_there_is_no_patient_table(tmp_path: Path):
    page = Page(reported(write_results(tmp_path / "results", cells(120).assign(patient_id=None))))
    assert "patients" not in {attributes.get("id") for _, attributes in page.tags}
    assert "120 have no patient" in page.text


def test_only_quarantine_gives_a_report_that_says_so(tmp_path: Path, browser: Any):
    results = write_results(tmp_path / "results", cells(4).head(0), bad=("a.png", "b.png"))
    page = Page(reported(results, is_evaluated=False))
    assert "No image could be scored: all 2 files are in quarantine" in page.text
    assert page.all("svg")[:0] == []
    assert "not_an_image" in page.text
    open_page(browser, page_of(results))
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_only_is_reported_with_what_is_defined(tmp_path: Path, label: int):
    page = Page(reported(write_results(tmp_path / "results", cells(80).assign(label=label))))
    assert "undefined" in page.text
    assert "Calibration" in page.text


def test_only_training_cells_are_marked_as_such(tmp_path: Path):
    page = Page(reported(write_results(tmp_path / "results", cells(80).assign(split="train"))))
    assert "The figures are too good for new images" in page.text


SPLITS_SHOWN = {
    "one test cell": ({"test": (1, 0), "unseen": (30, 20)}, "unseen"),
    "more test cells": ({"test": (30, 20), "unseen": (10, 10)}, "test"),
    "as many": ({"test": (10, 10), "unseen": (10, 10)}, "test"),
    "both classes before more cells": ({"test": (3, 2), "unseen": (50, 0)}, "test"),
    "one class each": ({"test": (0, 3), "unseen": (50, 0)}, "unseen"),
    "held out before more": ({"unseen": (0, 1), "val": (20, 20), "train": (50, 50)}, "unseen"),
    "val": ({"val": (2, 2), "train": (50, 50)}, "val"),
    "train": ({"train": (5, 5)}, "train"),
}


@pytest.mark.parametrize(("n_cells", "shown"), SPLITS_SHOWN.values(), ids=SPLITS_SHOWN)
def test_the_report_is_of_the_held_out_split_with_more_labelled_cells(
    tmp_path: Path, n_cells: dict[str, tuple[int, int]], shown: str
):
    of = [(split, label) for split, counts in n_cells.items() for label in (0, 1) for _ in range(counts[label])]
    some = cells(len(of)).assign(
        split=[None if split == "unseen" else split for split, _ in of],
        label=[label for _, label in of],
        patient_id=[f"{split}-{i % 4}" for i, (split, _) in enumerate(of)],
    )
    text = Page(reported(write_results(tmp_path / "results", some, has_images=False))).text
    n_uninfected, n_parasitized = n_cells[shown]
    for words in (
        f"sensitivity, {shown}",
        f"Confusion matrix, {shown} split",
        f"Charts of the {shown} split",
        f"{n_uninfected + n_parasitized} cells in bins of 0.05",
        f"Galleries of the {shown} split",
        f"by their cells of the {shown} split",
    ):
        assert words in text


def test_patients_of_most_cells_are_drawn_where_no_cell_has_a_label(tmp_path: Path):
    some = cells(60).assign(label=pd.NA, split=["test"] + [None] * 59)
    text = Page(reported(write_results(tmp_path / "results", some, has_images=False))).text
    assert "12 patients by their cells of the unseen split" in text


def test_a_missing_table_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    results = write_results(tmp_path / "results", cells(20))
    (results / "predictions" / "part-00000.parquet").unlink()
    with pytest.raises(DirectoryError, match="predictions is missing"):
        report.run(report.Config(results=str(results)))
    assert cli.main(["report", str(results)]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not page_of(results).exists()


def test_the_page_stays_small_however_many_patients_there_are(tmp_path: Path):
    n = 25_000
    many = cells(n).assign(patient_id=[f"patient-{i}" for i in range(n)])
    results = write_results(tmp_path / "results", many, has_images=False)
    html = reported(results)
    assert len(html) < 4_000_000
    assert "the 20,000 with the highest fraction" in html
    n_test = (many["split"] == "test").sum()
    assert f"200 of {n_test:,} patients, evenly chosen, by their cells of the test split" in html


def test_thumbnails_are_bounded(made: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="allowed are 0 to 100"):
        report.Config(results=str(made), thumbnails=101)
    results = write_results(tmp_path / "results", cells(200))
    page = Page(reported(results, thumbnails=3))
    assert len(page.all("img")) <= 9
    assert Page(reported(results, thumbnails=0)).all("img") == []


def test_mlcroissant_accepts_the_data_dictionary_and_reads_the_tables_by_it(made: Path):
    import mlcroissant

    dataset = mlcroissant.Dataset(jsonld=str(made / "croissant.json"))
    assert dataset.metadata.issues.errors == set()
    rows = list(dataset.records(record_set="quarantine"))
    assert sorted(row["quarantine/image_id"].decode() for row in rows) == ["bad/a.png", "bad/b.png"]
    fields = {field.id: field for record_set in dataset.metadata.record_sets for field in record_set.fields}
    assert fields["predictions/score"].description == PREDICTIONS.columns[3].meaning
    assert fields["predictions/width"].description.endswith(", in pixels")


def test_results_on_an_object_store_are_reported_there(made: Path, s3: Any):
    for file in made.rglob("*"):
        if file.is_file() and "report" not in file.parts[-2:]:
            s3.upload_file(str(file), "cells-bucket", f"made/{file.relative_to(made)}")
    report.run(report.Config(results="s3://cells-bucket/made"))
    html = s3.get_object(Bucket="cells-bucket", Key="made/report/index.html")["Body"].read().decode()
    assert len(Page(html).all("img")) == len(Page(page_of(made).read_text(encoding="utf-8")).all("img"))
    script = s3.get_object(Bucket="cells-bucket", Key="made/catalog.sql")["Body"].read().decode()
    assert "'predictions/part-00000.parquet'" in script


def test_a_reported_directory_still_holds(made: Path):
    verify.run(verify.Config(directory=str(made)))


def test_scores_at_the_ends_fall_into_the_end_bins(tmp_path: Path):
    some = cells(40)
    some["score"] = np.tile(np.float32([0, 1]), 20)
    assert "40 cells in bins of 0.05" in reported(write_results(tmp_path / "results", some.assign(split="test")))


def test_the_words_of_the_histogram_count_by_the_threshold_and_not_by_bins(tmp_path: Path):
    some = cells(60).assign(split="test", score=np.float32(0.3))
    some.loc[:9, "score"] = np.nextafter(np.float32(0.3), np.float32(0))
    with connect(open_results([str(write_results(tmp_path / "results", some, has_images=False))])) as connection:
        for threshold, n in ((0.3, 50), (float(np.nextafter(np.float32(0.3), np.float32(1))), 0), (0.29, 60)):
            scores, *_ = figures.of_cells(connection, split="test", threshold=threshold)
            assert scores.caption == (
                f"60 cells in bins of 0.05; {n} have a score of the threshold {threshold:g} or above."
            )


def test_the_review_queue_the_flagged_images_and_the_calls_of_patients_are_shown(tmp_path: Path, browser: Any):
    some = cells(60)
    results = write_results(tmp_path / "results", some)
    evaluate.run(evaluate.Config(results=str(results), n_resamples=100))
    rows = [
        {"image_id": name, "needs_review": i < 9, "rank": i + 1 if i < 9 else None, "value": 1 / (i + 1)}
        | {"reasons": ["uncertain"] if i < 9 else [], "quality_flags": ["blurred"] if i in (2, 40) else []}
        for i, name in enumerate(some["image_id"])
    ]
    patients = pq.read_table(results / "patients").to_pandas().assign(call="undecided")
    marker = storage.locate(results / "metrics" / "_SUCCESS.json")
    said = storage.read_json(marker)
    for table, content_of in ((REVIEW, pa.Table.from_pylist(rows, schema=REVIEW.arrow_schema())),
                              (PATIENTS, pa.Table.from_pandas(patients, schema=PATIENTS.arrow_schema()))):  # fmt: skip
        said["files"] |= outputs.write_table(
            storage.locate(results), f"{table.name}/part-00000.parquet", content_of, stage="screen"
        )
    storage.write_json(marker, said)
    page = Page(reported(results, is_evaluated=False))
    for words in ("To look at first", "9 of 9", "2 of 2", "the score is near the threshold", "out of focus"):
        assert words in page.text
    open_page(browser, page_of(results))
    assert browser.get_log("browser") == []
    assert find_all(browser, ".data tbody td:last-child")[0].text == "undecided"
    names = [one.get_attribute("textContent") for one in find_all(browser, "#review + .gallery bdi")]
    assert [name for name in names if name.endswith(".png")] == some["image_id"].head(9).tolist()
    found = connect(open_results([str(results)])).sql("SELECT sum(len(reasons)), bool_or(needs_review) FROM review")
    assert found.fetchall() == [(9, True)]
