"""`peft-pvm models` and `methods`: what there is, and what works on what."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import AsJSON


def models(
    name: Annotated[str | None, typer.Argument(help="A type, or a part of a model's name; by default all.")] = None,
    as_json: AsJSON = False,
) -> None:
    """Show which models are tested, and what works on each."""
    from .work import models as work

    work.models(name, as_json)


def methods(as_json: AsJSON = False) -> None:
    """Show the methods: what each does, its parameters, and on how many types of models it works.

    With --json, also what each changes and on which attention kernels.
    """
    from .work import methods as work

    work.methods(as_json)
