"""How a command ends that cannot do what it was asked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import typer


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Errors that the user can do something about, without a traceback."""
    try:
        yield
    except (OSError, ValueError, NotImplementedError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
