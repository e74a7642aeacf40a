"""What commands do once their arguments are checked. Importing it loads the library, which takes seconds."""

import importlib
import sys


_library = sys.modules["peft_pvm"]
if not hasattr(_library, "__version__"):  # the console script has not run its __init__.py, see peft_pvm_cli.py
    importlib.reload(_library)
