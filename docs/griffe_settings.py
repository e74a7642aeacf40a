"""What mkdocstrings does as it reads the code: it shows the default of a field, not the call that makes the field."""

from __future__ import annotations

from typing import Any

import griffe


NO_WEIGHTS = "True"  # what `no_weights()` sets


class Defaults(griffe.Extension):
    """Puts the defaults of fields that `setting` and `no_weights` make into their places."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Runs as soon as a field was read, before the signature of its class is made."""
        if not isinstance(attr.value, griffe.ExprCall):
            return
        called = str(attr.value.function)
        if called == "setting":
            attr.value = attr.value.arguments[0]
        elif called == "no_weights":
            attr.value = NO_WEIGHTS
