"""The data dictionary of a results directory as Croissant JSON-LD (https://docs.mlcommons.org/croissant), generated
from schema.py: files with their digests, tables with their columns, for catalogues and loaders of data sets.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from malaria_ray.runtime import outputs
from malaria_ray.schema import RESEARCH_ONLY, Column
from malaria_ray.stages.views import Results, table_of, table_views

_TYPES = {
    "string": "sc:Text",
    "int8": "sc:Integer",
    "int32": "sc:Integer",
    "int64": "sc:Integer",
    "float": "sc:Float",
    "double": "sc:Float",
    "bool": "sc:Boolean",
    "list<element: string>": "sc:Text",
    "list<item: string>": "sc:Text",
}
_TERMS = (
    "citeAs column conformsTo:dct examples extract field fileProperty fileObject fileSet format includes isLiveDataset "
    "jsonPath key md5 parentField path recordSet references regex repeated replace separator source subField transform"
)


def croissant(results: Results) -> dict[str, Any]:
    """The description of every table that is there. A table of several parts has one record set for each."""
    digests = _digests(results)
    prefix = results.path.path.rstrip("/") + "/"
    distribution: list[dict[str, Any]] = []
    record_sets: list[dict[str, Any]] = []
    for view in table_views():
        for number, file in enumerate(results.files(view)):
            name = view if number == 0 else f"{view}-{number:05d}"
            place = file.path.removeprefix(prefix)
            distribution.append(
                {
                    "@type": "cr:FileObject",
                    "@id": f"{name}-file",
                    "name": f"{name}-file",
                    "contentUrl": place,
                    "encodingFormat": "application/x-parquet",
                    "sha256": digests[place],
                }
            )
            record_sets.append(
                {
                    "@type": "cr:RecordSet",
                    "@id": name,
                    "name": name,
                    "description": table_of(view).meaning,
                    "field": [_field(name, column) for column in table_of(view).columns],
                }
            )
    return {
        "@context": _context(),
        "@type": "sc:Dataset",
        "name": "".join(letter if letter.isalnum() else "-" for letter in results.name),
        "description": f"Scores of red-blood-cell images by {results.success['model']}, run "
        f"{results.success['run_id']}. {RESEARCH_ONLY}",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "datePublished": results.success["finished_at"][:10],
        "version": "1.0.0",
        "distribution": distribution,
        "recordSet": record_sets,
    }


def _field(record_set: str, column: Column) -> dict[str, Any]:
    return {
        "@type": "cr:Field",
        "@id": f"{record_set}/{column.name}",
        "name": column.name,
        "description": column.meaning + (f", in {column.unit}s" if column.unit else ""),
        "dataType": _TYPES[str(column.type)],
        **({"repeated": True} if pa.types.is_list(column.type) else {}),
        "source": {"fileObject": {"@id": f"{record_set}-file"}, "extract": {"column": column.name}},
    }


def _digests(results: Results) -> dict[str, str]:
    records = results.success["files"] | outputs.files_added(results.path)
    return {name: record["sha256"] for name, record in records.items()}


def _context() -> dict[str, Any]:
    """The JSON-LD context of Croissant 1.0."""
    terms = {term.partition(":")[0]: (term.partition(":")[2] or "cr") for term in _TERMS.split()}
    return {
        "@language": "en",
        "@vocab": "https://schema.org/",
        **{term: f"{prefix}:{term}" for term, prefix in terms.items()},
        "examples": {"@id": "cr:examples", "@type": "@json"},
        "data": {"@id": "cr:data", "@type": "@json"},
        "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
        "cr": "http://mlcommons.org/croissant/",
        "dct": "http://purl.org/dc/terms/",
        "rai": "http://mlcommons.org/croissant/RAI/",
        "sc": "https://schema.org/",
    }
