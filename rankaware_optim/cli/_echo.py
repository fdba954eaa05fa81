"""How every command prints."""

from __future__ import annotations

import click

from .._printable import printable


def echo(text: object, err: bool = False) -> None:
    """Print `text`, without what a terminal would obey, on standard output or standard error."""
    click.echo(printable(str(text)), err=err)
