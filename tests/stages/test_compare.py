from __future__ import annotations

import shutil
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from browser import chromium, open_page, requested_urls
from pages import Page
from results import HOSTILE, cells, write_results
from sklearn.metrics import accuracy_score, roc_auc_score

from malaria_ray import cli
from malaria_ray.errors import ConfigError, DatasetError, DirectoryError, QueryError
from malaria_ray.stages import compare, comparison
from malaria_ray.stages.views import connect, open_results


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two models' results on the same images."""
    folder = tmp_path_factory.mktemp("compare")
    first = write_results(folder / "first", cells(), archive=folder / "archive")
    second = write_results(folder / "second", cells(scores_seed=9), archive=folder / "archive", model="vgg19-frozen")
    return str(first), str(second)


def test_differences_are_of_the_second_against_the_first(two: tuple[str, str]):
    first, second = cells(), cells(scores_seed=9)
    both = pd.DataFrame(
        {
            "label": first["label"],
            "patient_id": first["patient_id"],
            "score": first["score"],
            "other_score": second["score"],
        }
    )
    table = comparison.differences(both, *open_results(two), n_resamples=100, seed=42)
    accuracies = [accuracy_score(one["label"], one["score"] >= 0.5) for one in (first, second)]
    assert table.loc["accuracy", ["first", "other"]].tolist() == pytest.approx(accuracies)
    assert table.loc["accuracy", "difference"] == pytest.approx(accuracies[1] - accuracies[0])
    aucs = [roc_auc_score(one["label"], one["score"]) for one in (first, second)]
    row = table.loc["roc_auc"]
    assert row["difference"] == pytest.approx(aucs[1] - aucs[0])
    assert row["ci_low"] < row["difference"] < row["ci_high"]


def test_results_that_are_made_anew_while_they_are_compared_are_not_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    made = [str(write_results(tmp_path / str(seed), cells(scores_seed=seed))) for seed in (1, 2)]
    pair_of = compare.pair_of

    def slowly(*given: Any, **more: Any) -> comparison.Pair:
        pair = pair_of(*given, **more)
        shutil.rmtree(made[1])
        write_results(Path(made[1]), cells(scores_seed=3), model="vgg19-frozen")
        return pair

    monkeypatch.setattr(compare, "pair_of", slowly)
    with pytest.raises(DirectoryError, match="2 was finished or changed by another process meanwhile; run again"):
        compare.run(compare.Config(results=tuple(made), report=str(tmp_path / "page.html"), n_resamples=100))
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "page.html").exists()


def test_only_held_out_cells_are_compared(two: tuple[str, str], capsys: pytest.CaptureFixture[str]):
    assert cli.main(["compare", *two, "--n-resamples", "100"]) == 0
    out = capsys.readouterr().out
    n_test = int((cells()["split"] == "test").sum())
    assert f"{n_test} shared held-out cells" in out
    n_differ = int(((cells()["score"] >= 0.5) != (cells(scores_seed=9)["score"] >= 0.5)).sum())
    assert f"{n_differ} of 240 shared images are called differently" in out


def test_a_model_compared_with_itself_differs_in_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    twice = [
        str(write_results(tmp_path / name, cells(), archive=tmp_path / "archive", model=name)) for name in ("a", "b")
    ]
    assert cli.main(["compare", *twice, "--n-resamples", "100"]) == 0
    out = capsys.readouterr().out
    assert "0 of 240 shared images are called differently" in out
    assert "-0.0001" not in out


def test_a_metric_that_is_undefined_is_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    of_one_class = {"a": cells().assign(label=0), "b": cells(scores_seed=9).assign(label=0)}
    made = [str(write_results(tmp_path / name, of, archive=tmp_path / "archive")) for name, of in of_one_class.items()]
    html = compared(tmp_path, *made).read_text(encoding="utf-8")
    for told in (capsys.readouterr().out, Page(html).text):
        assert "sensitivity" in told
        assert "undefined" in told
        assert "nan" not in told


def test_three_results_without_a_cell_that_all_hold_out_are_warned_of(tmp_path: Path):
    """Each pair holds some out."""
    held_out = {"a": ("0", "1", "2", "3"), "b": ("2", "3", "4", "5"), "c": ("0", "1", "4", "5")}
    some = cells(600)
    for missing in ("none", "c"):
        made = []
        for name, patients in held_out.items():
            is_theirs = some["patient_id"].str[1:].isin(patients)
            of = some.assign(split=is_theirs.map({True: "test", False: "train"}), score=some["score"] ** 1.1)
            if name != missing:
                folder = tmp_path / missing / name
                made.append(str(write_results(folder, of, archive=tmp_path / "archive", model=name, has_images=False)))
        text = Page(compared(tmp_path / missing, *made).read_text(encoding="utf-8")).text
        assert ("No labelled image is held out by all" in text) == (missing == "none")
        assert "No labelled image is held out by both" not in text


def test_unlabelled_results_are_compared_by_their_calls(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    unlabelled = {"a": cells().assign(label=pd.NA), "b": cells(scores_seed=9).assign(label=pd.NA)}
    made = [str(write_results(tmp_path / name, of, archive=tmp_path / "archive")) for name, of in unlabelled.items()]
    assert cli.main(["compare", *made]) == 0
    assert "No shared image has a label" in capsys.readouterr().out


def test_a_label_of_either_results_is_the_label_of_both(tmp_path: Path):
    """Whatever the order: of three results, one has labels."""
    unlabelled = cells(40).assign(label=pd.NA, score=lambda rows: 1 - rows["score"])
    made = [
        str(write_results(tmp_path / name, of, has_images=False, archive=tmp_path / "archive"))
        for name, of in (("labelled", cells(40)), ("a", unlabelled), ("b", unlabelled))
    ]
    for number, given in enumerate(permutations(made[:2])):
        opened = open_results(given)
        pair = comparison.pair_of(connect(opened), *opened, n_resamples=100, seed=42)
        assert pair.metrics is not None
        right = pair.metrics.loc["accuracy", ["first", "other"]].to_dict()
        test = cells(40).query("split == 'test'")
        expected = accuracy_score(test["label"], test["score"] >= 0.5)
        assert right[("first", "other")[number]] == pytest.approx(expected)
        assert right[("other", "first")[number]] == pytest.approx(1 - expected)
        html = compared(tmp_path, *given).read_text(encoding="utf-8")
        assert "<dt>label</dt><dd>parasitized</dd>" in html
        assert "<dt>label</dt><dd>no label</dd>" not in html
    for given in permutations(made):
        text = Page(compared(tmp_path, *given).read_text(encoding="utf-8")).text
        assert f"metrics on the {len(test)} held-out cells that all have" in text


def test_results_that_label_an_image_differently_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    of = {"ours": cells(40), "theirs": cells(40), "unlabelled": cells(40).assign(label=pd.NA)}
    of["theirs"].loc[:1, "label"] = 1 - of["ours"]["label"]
    for name in of:
        write_results(tmp_path / name, of[name], has_images=False, archive=tmp_path / "archive")
    image, label = of["ours"].iloc[:2].sort_values("image_id")[["image_id", "label"]].iloc[0]
    uninfected, parasitized = ("theirs", "ours") if label else ("ours", "theirs")
    said = (
        f"2 images have several labels in these results, the first {image!r}: uninfected in {uninfected}, parasitized "
        f"in {parasitized}; give results of one archive"
    )
    for given in (("ours", "theirs"), ("theirs", "ours"), ("unlabelled", "ours", "theirs")):
        assert cli.main(["compare", *(str(tmp_path / name) for name in given)]) == 1
        assert said in capsys.readouterr().err
    with pytest.raises(DatasetError, match="2 images have several labels"):
        compare.run(compare.Config(results=(str(tmp_path / "ours"), str(tmp_path / "theirs"))))


def test_shared_held_out_cells_of_patients_that_a_model_knows_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    splits = {"by [b]patient": cells()["split"], "by image": pd.Series(np.resize(["train", "test", "test"], 240))}
    splits["new cells"] = splits["as new"] = splits["by [b]patient"].mask(cells().index % 10 == 0)
    of = {name: cells().assign(split=split) for name, split in splits.items()}
    results = {
        name: str(write_results(tmp_path / name, of[name], has_images=False, archive=tmp_path / "archive"))
        for name in of
    }
    config = Path(results["by image"]) / "model" / "config.json"
    config.write_text(config.read_text().replace('"split_by": "patient"', '"split_by": "image"'))
    for first, other, who_knows in (
        ("by [b]patient", "by image", ["by image"]),
        ("by image", "by [b]patient", ["by image"]),
        ("new cells", "as new", ["new cells", "as new"]),
        ("by [b]patient", "new cells", []),
    ):
        is_seen = {name: splits[name].isin(["train", "val"]) for name in (first, other)}
        shared = cells()[~is_seen[first] & ~is_seen[other]]
        page = Page(compared(tmp_path, results[first], results[other]).read_text(encoding="utf-8"))
        for text in (" ".join(capsys.readouterr().out.split()), page.text):
            assert text.count("trained or tuned on") == len(who_knows)
            for name in who_knows:
                n_known = shared["patient_id"].isin(of[name].loc[is_seen[name], "patient_id"]).sum()
                why = ", as the run was split by image" if name == "by image" else ""
                assert (
                    f"{name}: {n_known} of {len(shared)} shared held-out cells are of patients that the run was "
                    f"trained or tuned on{why}: their figures are better than a new patient's would be."
                ) in text


def test_results_that_share_nothing_are_refused(tmp_path: Path, two: tuple[str, str]):
    other = cells(20).assign(image_id=[f"other/{i}.png" for i in range(20)])
    results = write_results(tmp_path / "results", other)
    with pytest.raises(QueryError, match="share no image"):
        compare.run(compare.Config(results=(two[0], str(results))))
    with pytest.raises(ConfigError, match="--report .* is a directory; give the page's file"):
        compare.run(compare.Config(results=two, report=str(tmp_path)))
    with pytest.raises(ConfigError, match="give two or more"):
        compare.Config(results=two[:1])


def compared(tmp_path: Path, *results: str, **flags: Any) -> Path:
    target = tmp_path / "new" / "comparison.html"
    compare.run(compare.Config(results=results, report=str(target), n_resamples=100, **flags))
    return target


def test_the_page_shows_models_intervals_curves_and_the_pictures_of_disagreements(two: tuple[str, str], tmp_path: Path):
    page = Page(compared(tmp_path, *two).read_text(encoding="utf-8"))
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert {"models", "together", "pair-1"} <= set(ids)
    assert len(set(ids)) == len(ids)
    both = cells().merge(cells(scores_seed=9), on="image_id", suffixes=("", "_other"))
    differ = both[(both["score"] >= 0.5) != (both["score_other"] >= 0.5)]
    assert f"{len(differ)} of 240 shared images are called differently" in page.text
    differ = differ[differ["split"] == "test"]  # of the others one of the models has learnt
    assert f"Of the {len(differ)} shared held-out cells among them" in page.text
    first_right = ((differ["score"] >= 0.5) == (differ["label"] == 1)).sum()
    assert f"first is right in {first_right} and second in {len(differ) - first_right}" in page.text
    n_shown = min(first_right, 24) + min(len(differ) - first_right, 24)
    assert len(page.all("img")) == n_shown
    assert all(picture["alt"] and picture["src"].startswith("data:image/jpeg") for picture in page.all("img"))
    table = comparison.pair_of(connect(open_results(two)), *open_results(two), n_resamples=100, seed=42).metrics
    row = table.loc["roc_auc"]
    for text in (f"{row['difference']:+.4f}", f"{row['ci_low']:+.4f} to {row['ci_high']:+.4f}", "ROC curves"):
        assert text in page.text
    for chart in page.all("svg"):
        assert set(chart["aria-labelledby"].split()) <= set(ids)


def test_the_page_opens_in_a_browser_without_error_and_its_galleries_open(two: tuple[str, str], tmp_path: Path):
    third = write_results(tmp_path / "third", cells(scores_seed=4), archive=tmp_path / "third-archive", model="cnn")
    target = compared(tmp_path, *two, str(third), thumbnails=3)
    with chromium() as browser:
        open_page(browser, target)
        assert {url.partition(":")[0] for url in requested_urls(browser)} <= {"file", "data"}
        assert browser.get_log("browser") == []
        browser.find_element("css selector", ".cell").click()
        assert "score of second" in browser.find_element("css selector", "dialog").text
        for width in (360, 1400):
            metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_the_page_of_hostile_names_without_labels_is_text(tmp_path: Path):
    some = cells(len(HOSTILE) * 6).assign(label=pd.NA, split=None)
    some["image_id"] = [f"{HOSTILE[i % len(HOSTILE)]}{i}.png" for i in range(len(some))]
    some["patient_id"] = [HOSTILE[i % len(HOSTILE)][:40] for i in range(len(some))]
    made = [
        str(write_results(tmp_path / name, of, archive=tmp_path / "archive"))
        for name, of in (("<b>a\u202e<b>", some), ('it\'s [b] "test"', some.assign(score=1 - some["score"])))
    ]
    html = compared(tmp_path, *made).read_text(encoding="utf-8")
    page = Page(html)
    assert len(page.all("script")) == 1
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "No shared image has a label" in page.text
    assert "<b>a\\u202e<b> and it's [b]" in page.text
    for letter in ("\u202e", "\x1b"):
        assert letter not in html


def test_a_page_without_any_disagreement_or_archive_is_made(tmp_path: Path):
    twice = [str(write_results(tmp_path / name, cells(40), has_images=False, model=name)) for name in ("a", "b")]
    page = Page(compared(tmp_path, *twice).read_text(encoding="utf-8"))
    assert "0 of 40 shared images are called differently" in page.text
    other = write_results(tmp_path / "c", cells(40).assign(score=lambda t: 1 - t["score"]), has_images=False)
    page = Page(compared(tmp_path, twice[0], str(other)).read_text(encoding="utf-8"))
    assert page.all("img") == []
    assert "cells have no picture here" in page.text
