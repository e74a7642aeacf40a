"""Pages that need nothing else: HTML with its pictures inside, no script, and nothing loaded from outside."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #111;
  background: #fff }
img { max-width: 100%; height: auto }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.9rem }
th, td { border-bottom: 1px solid #bbb; padding: 0.3rem 0.7rem; text-align: right }
th:first-child, td:first-child { text-align: left }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f3f3f3; padding: 0.7rem }
figure { margin: 0 }
"""


def document(title: str, sections: Iterable[str]) -> str:
    """A whole HTML document.

    Args:
        title: Its title and first heading, as text.
        sections: What comes below, as HTML. Empty ones are left out.
    """
    title = escape(title)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # Browsers ask a server for an icon unless the page says that there is none.
        '<meta name="viewport" content="width=device-width">\n<link rel="icon" href="data:,">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of texts."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def figure(png: bytes, alternative: str) -> str:
    """A picture, inside the page.

    Args:
        png: The PNG file.
        alternative: The text in its place where it cannot be seen.
    """
    source = f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
    return f'<figure><img alt="{escape(alternative)}" src="{source}"></figure>'
