"""Text from files and users, made fit for a message, a terminal and a model card: printable, escaped and short."""

from __future__ import annotations

import html
import re
import reprlib
from collections.abc import Iterable, Sequence


LONGEST = 1_000  # characters of a message


def plain(text: object, limit: int | None = LONGEST, keep: str = "") -> str:
    """Text without anything that a terminal would act on, and not too long.

    Control characters, line breaks, marks that turn the direction of writing and lone surrogates appear as escapes.

    Args:
        text: Anything that `str` takes.
        limit: How many characters are left, at most. `None`: all.
        keep: Characters that stay although they are not printable, such as line breaks.

    Example:
        >>> plain("red: \\x1b[31m, 中文", limit=20)
        'red: \\\\x1b[31m, 中文'
        >>> plain("a long story", limit=8)
        'a lon...'
    """
    said = str(text)
    escaped = "".join(
        character if character.isprintable() or character in keep else repr(character)[1:-1]
        for character in (said if limit is None else said[: limit + 1])
    )
    return escaped if limit is None or len(escaped) <= limit else f"{escaped[: limit - 3]}..."


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxlong = _repr.maxother = 100
_repr.maxlist = _repr.maxtuple = _repr.maxset = _repr.maxfrozenset = _repr.maxdict = 12
_repr.maxlevel = 3


def quoted(value: object, limit: int = 200) -> str:
    """A value as a message quotes it: its `repr`, in which long strings, numbers and lists are cut.

    Example:
        >>> quoted(list(range(100)))
        '[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ...]'
    """
    try:
        return plain(_repr.repr(value), limit)
    except ValueError:  # an int of more digits than Python is willing to write
        return f"<{type(value).__name__} too long to show>"


def listed(items: Sequence[object], separator: str = "; ", shown: int = 3) -> str:
    """The first of many items, and how many more there are.

    Example:
        >>> listed(["one", "two", "three"], shown=2)
        'one; two; and 1 more'
    """
    parts = [plain(item, 160) for item in items[:shown]]
    return separator.join([*parts, f"and {len(items) - shown} more"] if len(items) > shown else parts)


def markdown(text: object, limit: int = 200) -> str:
    """Text for a sentence or a table cell of a Markdown page, where it is only text.

    Example:
        >>> markdown("<b> | *x*")
        '&lt;b&gt; &#124; \\\\*x\\\\*'
    """
    escaped = html.escape(plain(text, limit), quote=False)
    return re.sub(r"([\\`*_\[\]~$])", r"\\\1", escaped).replace("|", "&#124;")


def code_span(text: object, limit: int = 200) -> str:
    """Text as code in a table cell of a Markdown page.

    Example:
        >>> code_span("[1, 2]"), code_span("a | b")
        ('`[1, 2]`', '<code>a &#124; b</code>')
    """
    said = plain(text, limit)
    return f"<code>{markdown(said, limit)}</code>" if re.search(r"[`|\\]", said) else f"`{said}`"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table of a Markdown page, whose cells are Markdown.

    Example:
        >>> markdown_table(["a", "b"], [["1", "2"]])
        ['| a | b |', '| --- | --- |', '| 1 | 2 |']
    """
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
