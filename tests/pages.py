"""The pages that users read, and the code blocks on them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt


REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
REASON = re.compile(r"<!-- not run in tests: (\S.*) -->")


@dataclass(frozen=True)
class Block:
    """A code block of a page.

    Attributes:
        language: As its fence names it.
        code: What stands in it.
        line: Where it begins, from 0.
        reason: Why it is not run.
    """

    language: str
    code: str
    line: int
    reason: str | None

    def commands(self) -> list[list[str]]:
        """The words of each command, without comments and without the file that its output goes to."""
        lines = (line.partition(" > ")[0] for line in self.code.replace("\\\n", " ").splitlines())
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks_of(page: Path) -> list[Block]:
    blocks: list[Block] = []
    reason = None
    for token in MarkdownIt().parse(page.read_text()):
        if token.type in ("fence", "code_block"):
            blocks.append(Block(token.info, token.content, token.map[0], reason))
        if token.type == "html_block" and (match := REASON.fullmatch(token.content.strip())):
            reason = match[1]
        elif token.nesting == 0:
            reason = None
    return blocks


BLOCKS = {page.relative_to(REPOSITORY).as_posix(): blocks_of(page) for page in PAGES}
