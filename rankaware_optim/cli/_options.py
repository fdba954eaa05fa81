"""Options of several commands, and how their texts are parsed."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from ..errors import RankAwareError


@contextmanager
def _current_folder() -> Iterator[None]:
    """Let the current folder be searched for modules, after everything else."""
    folder = os.getcwd()
    if folder in sys.path:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def may_name_module(ctx: click.Context, param: click.Parameter, given: Any) -> Any:
    """Import from the current folder too, if a text names a module, as "module:name". A click
    callback.

    Until then, and without such a text, nothing of the folder is run: it may be someone else's.
    """
    if ":" in str(given):  # of a text, or of several
        ctx.with_resource(_current_folder())
    return given


def numbers(
    kind: Callable[..., Any], named: Mapping[str, Any] | None = None
) -> Callable[..., tuple[Any, ...] | None]:
    """Return a callback that parses "4,64" as a tuple of numbers. A word in `named` stands for its
    value.
    """

    def read(
        ctx: click.Context, param: click.Parameter, text: str | None
    ) -> tuple[Any, ...] | None:
        if text is None:
            return None
        words = [word.strip() for word in text.split(",")]
        try:
            return tuple(
                named[word] if named and word in named else kind(word, param, ctx) for word in words
            )
        except click.BadParameter as error:
            raise click.BadParameter(
                f"{error.message} Separate numbers by commas, as in 4,64.", ctx, param
            ) from None

    return read


def in_options(error: RankAwareError, command: click.Command) -> str:
    """Return an error's message, with the command's option in place of the argument at fault."""
    for param in command.params:
        if isinstance(param, click.Option) and param.name == error.argument:
            return max(param.opts, key=len) + str(error).removeprefix(error.argument)
    return str(error)


def number_or_rank(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> float | str | None:
    """Parse a number, or the word "rank". A click callback."""
    try:
        return value if value in (None, "rank") else float(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a valid float, nor 'rank'.") from error


def _columns(ctx: click.Context, param: click.Parameter, pairs: Sequence[str]) -> dict[str, str]:
    parted = [pair.partition("=") for pair in pairs]
    if not all(equals for _, equals, _ in parted):
        raise click.BadParameter("Write FIELD=COLUMN, such as loss=final_loss.")
    return {field.strip(): column.strip() for field, _, column in parted}


# Files that may be overwritten, by kind (a page, or the suffix of others): what they are, and how
# they begin.
_WRITTEN = {
    "page": ("a page of `rankaware report`", rb'<meta name="generator" content="rankaware-optim">'),
    ".toml": ("a recipe", rb"(?ms)^schema *= *\d.*^\[(?:fit|tensors)\]"),
    ".png": ("a PNG picture", rb"\A\x89PNG"),
    ".svg": ("an SVG picture", rb"<svg"),
    ".pdf": ("a PDF file", rb"\A%PDF"),
}
_UNKNOWN = ("a file that this command writes", rb"\A\Z")

_HEAD = 2**16  # bytes


def check_out(path: Path, kind: str = "") -> None:
    """Raise if a file would be overwritten that is neither empty nor of the same kind."""
    if not os.path.exists(path):
        return
    what, known = _WRITTEN.get(kind or path.suffix.lower(), _UNKNOWN)
    if path.is_file():
        try:
            with path.open("rb") as file:
                head = file.read(_HEAD)
        except OSError as error:
            raise click.ClickException(f"{path} cannot be read: {error}.") from error
        if not head or re.search(known, head):
            return
    raise click.ClickException(
        f"{path} exists and is not {what}, so it was not overwritten. Give another file, or remove"
        " this one."
    )


def out_option(kind: str = "", **settings: Any) -> Callable[[Any], Any]:
    """Return the option -o FILE, which `check_out` checks before the command begins."""

    def check(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
        if path is not None:
            check_out(path, kind)
        return path

    return click.option(
        "-o", "--out", type=click.Path(dir_okay=False, path_type=Path), callback=check, **settings
    )


RECIPE_FIELDS = (
    "an object with the fields of the recipe's .toml file but schema and tensors, null where the"
    " file has none. recipes/SCHEMA.md lists them with their units."
)


def json_option(shape: str) -> Callable[[Any], Any]:
    """Return the option --json, as `as_json`. shape: the fields of the document with their units,
    for the help.
    """
    return click.option("--json", "as_json", is_flag=True, help=f"Print JSON: {shape}")


_INIT_HELP = (
    "A: B starts at zero, as in PEFT (Init[A], printed as B = 0). B: A starts at zero (Init[B],"
    " printed as A = 0)."
)


def init_option(
    more: str = "", names: Sequence[str] = ("A", "B"), **settings: Any
) -> Callable[[Any], Any]:
    """Return the option --init. more: what follows the meaning of A and B in its help."""
    return click.option(
        "--init", type=click.Choice(names), help=f"{_INIT_HELP} {more}".rstrip(), **settings
    )


ALPHA = click.option(
    "--alpha",
    callback=number_or_rank,
    help="alpha of rows without one: a number, or 'rank' for alpha = rank.",
)
COLUMN = click.option(
    "--column",
    "columns",
    multiple=True,
    callback=_columns,
    help="Column of a field, such as loss=final_loss. Repeatable.",
)
OPTIMIZER = click.option(
    "--optimizer",
    callback=may_name_module,
    default="AdamW",
    show_default=True,
    help="Optimizer: a name such as AdamW, or package:Class.",
)
LAW_TEXT = (
    "It is a registered name, or package.module:Class. Parameters follow a question mark, such as"
    " 'mua?tokens=16'. Put an inner law with parameters in brackets."
)
RSLORA = click.option("--rslora", is_flag=True, help="rsLoRA: divide alpha by √rank, not by rank.")

# Fields of a `Rate` in a document.
RATE_FIELDS = (
    "lr (per step), low and high (ends of the 90 % band, per step), ceiling (smallest rate that"
    " diverged, moved to this configuration, or null), extrapolated (whether it is outside what was"
    " tried), notes (sentences), configuration (text)"
)
