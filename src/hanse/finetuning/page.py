"""Pages for people: Jinja2 templates of this package, each one file without scripts or anything from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
from pathlib import Path
from typing import Any

from hanse.errors import NotInstalled
from hanse.finetuning.files import write_whole


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Render a template of this package to a file, whole or not at all. It escapes all values; its policy forbids scripts and connections.

    Raises NotInstalled without Jinja2.
    """
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise NotInstalled("pages need the package jinja2", hint="Install it with: pip install 'hanse[report]'") from error
    files = importlib.resources.files("hanse.finetuning")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["csp_hash"] = _csp_hash
    style = files.joinpath("page.css").read_text(encoding="utf-8")
    text = environment.from_string(files.joinpath(template).read_text(encoding="utf-8")).render(style=_Safe(style), **values)
    write_whole(path, text.encode(errors="replace"))
    return path


class _Safe(str):
    """Text that a template takes as it is: the package's own style sheet."""

    def __html__(self) -> str:
        return str(self)


def _csp_hash(style: str) -> str:
    """What the page's policy allows: this style sheet and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(str(style).encode()).digest()).decode()}"
