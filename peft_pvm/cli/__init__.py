"""The command `peft-pvm`. It needs the extra `lab`; the library does not."""

from __future__ import annotations

import sys
from importlib.util import find_spec


NEEDED = ("typer", "rich", "matplotlib", "PIL", "sklearn")


def main() -> None:
    """Run the command line."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        sys.exit(f"peft-pvm needs {', '.join(missing)}, which the extra brings: pip install 'peft-pvm[lab]'")
    from .app import app

    app()
