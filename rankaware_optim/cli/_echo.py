"""Output of every command."""

from __future__ import annotations

import click

from .._printable import printable


def echo(text: object, err: bool = False) -> None:
    """Print `text` to standard output or standard error, without characters that control a terminal."""
    click.echo(printable(str(text)), err=err)
