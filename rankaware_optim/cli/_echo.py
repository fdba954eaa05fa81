"""Output of every command."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import click
import msgspec

from .._printing import printable


def echo(text: object, err: bool = False) -> None:
    """Print `text` to standard output or standard error, without characters that control a
    terminal.
    """
    click.echo(printable(str(text)), err=err)


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Print warnings on standard error as notes."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: echo(f"note: {message}", err=True)
        yield


def echo_json(value: object) -> None:
    """Print `value` as one JSON document: dataclasses as objects, numbers that are not finite as
    null.
    """
    plain = msgspec.json.decode(msgspec.json.encode(value, enc_hook=float))
    click.echo(json.dumps(plain, indent=1))


def echo_result(as_json: bool, result: object, document: object = None) -> None:
    """Print a result as text or as JSON. document: what JSON shows, if it is not the result."""
    if as_json:
        echo_json(result if document is None else document)
    else:
        echo(result)
