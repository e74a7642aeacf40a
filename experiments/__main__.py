"""The command line `python -m experiments`. It needs the extra `lab`, as `peft-pvm` does."""

from __future__ import annotations

import sys

from peft_pvm.utils.extras import require


def main() -> None:
    """Run the command line."""
    try:
        require("lab", "typer", "rich")
    except ImportError as error:
        sys.exit(f"Error: {error}")
    from .commands import app

    app(prog_name="python -m experiments")


if __name__ == "__main__":
    main()
