"""Optional packages: which extra brings them, and what to install where one is missing."""

from __future__ import annotations

from importlib.util import find_spec


PACKAGES = {"PIL": "pillow", "lmms_eval": "lmms-eval", "sklearn": "scikit-learn"}  # by module, where the names differ


def require(extra: str, *modules: str) -> None:
    """Refuse work that needs a package which is not installed, before the work begins.

    Args:
        extra: The extra of this package that brings it.
        modules: What is going to be imported.

    Raises:
        ImportError: One of them is missing.
    """
    missing = [PACKAGES.get(module, module) for module in modules if find_spec(module) is None]
    if missing:
        raise ImportError(
            f"This needs {' and '.join(missing)}, which the extra {extra!r} brings: "
            f"pip install '.[{extra}]' in a checkout of peft-pvm."
        )
