"""The console script `peft-pvm`. It reads its arguments before torch, transformers and PEFT are loaded.

`import peft_pvm` loads all three, which takes seconds, because it registers the methods with PEFT. So the package is
made known here without running its `__init__.py`. `peft_pvm.cli.work` runs it when a command has something to do.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec


def main() -> None:
    """Run the command line."""
    if spec := find_spec("peft_pvm"):
        sys.modules.setdefault("peft_pvm", module_from_spec(spec))

    from peft_pvm.utils.extras import require

    try:
        require("lab", "typer", "rich")
    except ImportError as error:
        sys.exit(f"Error: {error}")

    from peft_pvm.cli.app import app

    app(prog_name="peft-pvm")


if __name__ == "__main__":
    main()
