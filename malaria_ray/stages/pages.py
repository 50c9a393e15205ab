"""HTML pages out of the templates beside this module: one file each, which needs no network."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from typing import Any

import jinja2

from malaria_ray.runtime.terminal import printable
from malaria_ray.schema import RESEARCH_ONLY
from malaria_ray.stages.galleries import label_name

_FILES = ("page.html", "macros.html", "report.html", "comparison.html", "report.css", "report.js")


def render(template: str, **values: Any) -> str:
    """The page. Everything put into it is escaped unless it is `Markup`; an unknown name is an error."""
    script = _template("report.js")
    return _environment().get_template(template).render(
        css=_template("report.css"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        research_only=RESEARCH_ONLY,
        **values,
    )  # fmt: skip


def templates_digest() -> str:
    """First 16 hex digits of the SHA-256 of all templates: another page is due where they have changed."""
    return hashlib.sha256("".join(_template(name) for name in _FILES).encode()).hexdigest()[:16]


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["printable"] = lambda value: printable(str(value))
    environment.filters["short"] = lambda value: short(printable(str(value)))
    environment.filters["thousands"] = lambda value: f"{value:,}"
    environment.filters["label"] = label_name
    environment.filters["number"] = lambda value: "undefined" if value is None else f"{value:.4f}"
    return environment


def _template(name: str) -> str:
    return (resources.files("malaria_ray.stages") / "templates" / name).read_text(encoding="utf-8")


def short(text: str, n_letters: int = 64) -> str:
    """Both ends of a long name: the folder says the class, the end tells files apart."""
    half = n_letters // 2
    return text if len(text) <= n_letters else f"{text[:half]}…{text[-half:]}"
