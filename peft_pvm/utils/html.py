"""Pages that need nothing else: HTML from templates, with pictures inside, no script, and nothing loaded from outside.

Templates lie beside the code that fills them, and extend `page.html` beside this file. Whatever they are given is
escaped, unless they say otherwise. This needs jinja2, which the extra `lab` brings; importing this module does not.
"""

from __future__ import annotations

import base64
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .extras import require


if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, **values: Any) -> str:
    """A whole HTML document.

    Args:
        template: The path of the template in this package.
        values: What it is given. Text in them may be of anybody: it is escaped.

    Raises:
        ImportError: jinja2 is not installed.
    """
    require("lab", "jinja2")
    return _environment().get_template(template).render(**values)


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parents[1]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["data_url"] = _data_url
    return environment


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
