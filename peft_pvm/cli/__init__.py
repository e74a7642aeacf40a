"""The command `peft-pvm`. It needs the extra `lab`; the library does not."""

from __future__ import annotations

import sys

from ..utils.packages import require


def main() -> None:
    """Run the command line."""
    try:
        require("lab", "typer", "rich")
    except ImportError as error:
        sys.exit(f"Error: {error}")
    from .app import app

    app()
