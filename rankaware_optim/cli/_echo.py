"""Output of every command."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import Any

import click

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
    click.echo(json.dumps(_plain(value), indent=1, allow_nan=False))


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
