"""Patients and labels from names: one rule for mapping keys and file names."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from malaria_ray.cells.patients import compiled_pattern, label_of, labels_of, parse_mapping, patient_of, patients_of
from malaria_ray.errors import PatientMappingError
from malaria_ray.schema import Label

DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.parametrize(
    ("name", "patient"),
    [
        ("C51AP12thinF", "P12"),
        ("C37BP2_thinF", "P2"),
        ("C174P135NThinF", "P135"),
        ("C100P61ThinF", "P61"),
        ("C47P8thinOriginalOlympusCX21", "P8"),  # one patient,
        ("C47P8thin_Original_Motic", "P8"),  # two microscopes
        ("C241NThinF", "C241"),
        ("C1_thinF", "C1"),
        ("C201ThinF", "C201"),
        ("C51AP12thinF_IMG_20150724_154023_cell_119.png", "P12"),
        ("cell_images/Parasitized/C51AP12thinF_IMG_1_cell_2.png", "P12"),
        ("C99/C1_thinF_IMG_1_cell_2.png", "C1"),  # a folder's name does not count
        ("C4thin_original_IMG_1_cell_2.png", "C4"),
        ("C99/cell_1.png", None),
        ("C0001.png", None),  # somebody's first cell, not a donor of that one
        ("C0001_cell.png", None),
        ("cell_C51P12.png", None),  # the key stands first
        ("c51ap12thinF", None),  # and in the official spelling
        ("P12.png", None),
        ("CP12thinF", None),
        ("Thumbs.db", None),
        ("", None),
        ("C٣P٣.png", "P٣"),  # \d takes any script's digits; harmless
    ],
)
def test_patient_of_a_name(name: str, patient: str | None) -> None:
    assert patient_of(name) == patient
    assert patients_of(pa.array([name])).to_pylist() == [patient]


@pytest.mark.parametrize(
    ("pattern", "name", "patient"),
    [
        (r"(?P<patient>S\d+)/", "slides/S07/cell_1.png", "S07"),  # searched in the whole path
        (r"(?P<patient>S\d+)/", "C51AP12thinF.png", None),  # the NIH rule is replaced, not added to
        (r"^(?P<patient>[a-z]*)_", "_cell.png", None),  # an empty patient is none
        (r"x(?P<patient>\d+)?", "x.png", None),  # a group that took no part
    ],
)
def test_patient_by_another_archives_rule(pattern: str, name: str, patient: str | None) -> None:
    assert patient_of(name, compiled_pattern(pattern)) == patient


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("(?P<patient>", "is no regular expression"),
        (r"S(\d+)", r"has no group named patient; write .*\(\?P<patient>…\)"),
        (r"(?P<Patient>\d+)", "has no group named patient"),
    ],
)
def test_unusable_pattern_is_refused_with_what_to_write(expression: str, said: str) -> None:
    with pytest.raises(PatientMappingError, match=said):
        compiled_pattern(expression)


OFFICIAL = """\
C100P61ThinF,['C100P61ThinF_IMG_1_cell_1.png', 'C100P61ThinF_IMG_1_cell_2.png'],,,
C1_thinF,['C1_thinF_IMG_1_cell_1.png'],,,,
"""


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        (
            OFFICIAL,
            [
                ("C100P61ThinF_IMG_1_cell_1.png", "C100P61ThinF"),
                ("C100P61ThinF_IMG_1_cell_2.png", "C100P61ThinF"),
                ("C1_thinF_IMG_1_cell_1.png", "C1_thinF"),
            ],
        ),
        ("patient,images,,\nK,['a.png'],,\n", [("a.png", "K")]),  # a header
        ("\ufeffK,['a.png']", [("a.png", "K")]),  # a spreadsheet's byte order mark; no newline at the end
        ("K,['a.png'],,\r\nL,['b.png']\r\n\r\n", [("a.png", "K"), ("b.png", "L")]),
        ("K,['a.png'],,\n,,,\n\nL,['b.png']\n", [("a.png", "K"), ("b.png", "L")]),  # empty lines
        ("K,['a, b.png']", [("a, b.png", "K")]),  # a comma in a name
        ("K,[\"it's.png\", 'x.png']", [("it's.png", "K"), ("x.png", "K")]),  # as Python prints an apostrophe
        (" K ,['a.png']", [("a.png", "K")]),
        ("K,\"['a.png', 'b.png']\"\r\n", [("a.png", "K"), ("b.png", "K")]),  # as CSV writers put it
        ("K,['a\u2028b\x85.png']", [("a\u2028b\x85.png", "K")]),  # only newlines end a line
    ],
)
def test_mapping_file_gives_its_pairs(text: str, pairs: list[tuple[str, str]]) -> None:
    assert list(parse_mapping(text, source="map.csv")) == pairs


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (OFFICIAL + "cell_7.png,P7\n", "map.csv line 3: found 'cell_7.png,P7'; expected KEY"),
        ("file,patient\na.png,P1\n", "map.csv line 2: found 'a.png,P1'"),
        ("file,patient\n", "map.csv names no files"),
        ("K;['a.png', 'b.png']\n", "map.csv names no files"),  # columns of another separator
        (OFFICIAL + "K;['a.png', 'b.png']\n", "map.csv line 3: found"),
        ("['a.png', 'b.png'],K\n", "map.csv names no files"),  # columns swapped
        ('"file","patient"\n"a.png","P1"\n', "map.csv line 2: found"),
        (OFFICIAL + "K,['a.png', 'b.p\n", "map.csv line 3: found"),  # cut off
        ("", "map.csv names no files"),
    ],
)
def test_other_file_is_refused_with_its_line(text: str, said: str) -> None:
    with pytest.raises(PatientMappingError, match=said):
        list(parse_mapping(text, source="map.csv"))


@pytest.mark.skipif(not DATA.exists(), reason=f"the official mapping files are not in {DATA}")
def test_official_mappings_name_10678_images_of_81_patients() -> None:
    n_images, patients = Counter[str](), {}
    for kind in ("parasitized", "uninfected"):
        text = (DATA / f"patientid_cellmapping_{kind}.csv").read_text(encoding="utf-8")
        for name, key in parse_mapping(text, source=kind):
            n_images[kind] += 1
            patients[name] = patient_of(key)
            assert patient_of(name) == patients[name], name  # file names and keys agree
    assert len(set(patients.values())) == 81
    assert None not in patients.values()
    assert n_images["parasitized"] > 0
    assert n_images["uninfected"] > 0
    assert len(patients) == n_images.total()  # no name is in both files


@pytest.mark.parametrize(
    ("image_id", "label"),
    [
        ("cell_images/Parasitized/a.png", Label.parasitized),
        ("cell_images/Uninfected/a.png", Label.uninfected),
        ("PARASITIZED/a.png", Label.parasitized),
        ("uninfected/deeper/still/a.png", Label.uninfected),
        ("Uninfected/Parasitized/a.png", Label.parasitized),  # the nearest folder
        ("Parasitized.png", None),  # a folder's name, not a file's
        ("a/Parasitized", None),
        ("Parasitized cells/a.png", None),
        ("uninfected_2/a.png", None),
        ("a.png", None),
        ("", None),
    ],
)
def test_label_is_the_nearest_folders(image_id: str, label: Label | None) -> None:
    assert label_of(image_id) is label
    assert labels_of(pa.array([image_id])).to_pylist() == [label]
