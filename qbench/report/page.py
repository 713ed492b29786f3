"""One HTML file out of data: the template filled in, everything escaped, nothing fetched.

Three things keep the file safe to open and to pass on. Text goes through the template's escaping,
or into JSON in which no character can begin a tag, and the script puts it on the page as text
only. The Content-Security-Policy forbids every connection and runs no script but the two whose
hashes it names, so that markup which got through would be inert. Nothing refers to another file.

plotly.js draws the plots. It is taken from the installed ``plotly`` package, which carries the
whole library (4.8 MB) and no smaller bundle; compressed into the page it is 2.0 MB, which the
browser unpacks when the first plot is wanted, so that the table is there before. Pages of runs are
packed in the same way, each by itself, and unpacked when they are opened.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from qbench.errors import QBenchError


def render(content: Mapping[str, Any], packed: Mapping[str, Any]) -> str:
    """The page.

    Args:
        content: what the template shows.
        packed: name -> data that the script unpacks when it is wanted.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    folder = files("qbench.report")
    script = _own_script()
    library, packed_library = _plotly()
    blocks = {name: pack(json_text(data).encode()) for name, data in packed.items()}
    blocks["plotly"] = packed_library
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["json"] = lambda data: Markup(json_text(data))
    template = environment.from_string(folder.joinpath("page.html").read_text(encoding="utf-8"))
    return template.render(
        **content,
        policy=policy(script, library),
        style=Markup(folder.joinpath("page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        blocks=blocks,
    )


def policy(*scripts: str) -> str:
    """A Content-Security-Policy under which these scripts run, and nothing is fetched or sent.

    Plotly writes styles into the page, so styles are allowed; a style cannot reach out, because
    images and fonts come from the page itself.
    """
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def json_text(data: Any) -> str:
    """JSON that can stand inside a script element: no ``<`` begins a tag or a comment in it.

    Infinite and NaN, which JSON lacks, become text.
    """
    text = json.dumps(_finite(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def pack(data: bytes) -> str:
    """Pack with zlib and base64: letters that no parser of HTML minds."""
    return base64.b64encode(zlib.compress(data, 9)).decode()


def plotly_script() -> str:
    """The source of plotly.js, read without importing plotly, which would take a second.

    Raises:
        QBenchError: if plotly is not installed.
    """
    from importlib.util import find_spec

    found = find_spec("plotly")
    places = found.submodule_search_locations if found else None
    if not places:
        raise QBenchError("the report's plots need plotly; install it: pip install plotly")
    with open(f"{places[0]}/package_data/plotly.min.js", encoding="utf-8", newline="") as file:
        return file.read()


@cache
def _plotly() -> tuple[str, str]:
    """The library, as it is and packed."""
    source = plotly_script()
    return source, pack(source.encode())


def _own_script() -> str:
    folder = files("qbench.report")
    parts = [folder.joinpath(n).read_text(encoding="utf-8") for n in ("page.js", "run.js")]
    return "\n".join(part.replace("\r\n", "\n") for part in parts)


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
