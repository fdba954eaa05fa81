"""This module contains options, output functions and parsers that several `rankaware`
commands share.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from .._printing import printable
from .._rate import Rate

if TYPE_CHECKING:
    from ..inspection import Widths
    from ..laws import Law

Decorator = Callable[[Any], Any]
INTERRUPTED = 130  # exit code of shells for SIGINT

# --- output ---------------------------------------------------------------------------------------


def echo(text: object, err: bool = False) -> None:
    """Print `text` to standard output or standard error, without characters that control a
    terminal.
    """
    click.echo(printable(str(text)), err=err)


def echo_note(message: object, *_: object, **__: object) -> None:
    """Print a warning on standard error as a note.

    This function replaces `warnings.showwarning` while a `rankaware` command runs.
    """
    echo(f"note: {message}", err=True)


def echo_result(as_json: bool, result: object, document: object) -> None:
    """Print the result of a command as text or as JSON.

    In the JSON output, dataclasses become objects, and infinite and NaN values become
    null.
    """
    if not as_json:
        echo(result)
        return
    text = msgspec.json.encode(document, enc_hook=float)
    echo(msgspec.json.format(text, indent=1).decode())


def rate_document(rate: Rate) -> dict[str, object]:
    """Convert a learning rate and its 90 % interval to a dict that can be written as
    JSON.
    """
    return {
        "lr": rate.lr,
        "low": rate.low,
        "high": rate.high,
        "ceiling": rate.ceiling,
        "extrapolated": rate.extrapolated,
        "notes": rate.notes,
        "configuration": rate.configuration,
    }


# --- values ---------------------------------------------------------------------------------------


def several(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Return a function that parses comma-separated values of a command option, such as
    4,64.

    The value "full" is parsed to None, which stands for full finetuning.
    """

    def numbers(text: str) -> tuple[Any, ...]:
        return tuple(None if w == "full" else kind(w) for w in text.split(","))

    return numbers


def number_or_rank(text: str) -> float | str:
    """Parse the value of the option --alpha, which is a number or the word "rank"."""
    return text if text == "rank" else float(text)


def may_name_module(_: click.Context, __: Any, value: Any) -> Any:
    """If the user typed a name such as "module:name", allow Python to import the module
    from the current folder.

    Otherwise, commands never execute code from the current folder, because the folder
    may belong to someone else. The current folder is added at the end of Python's
    search path, so that its modules cannot replace installed modules. This function is
    a click callback.
    """
    folder = os.getcwd()
    if ":" in str(value) and folder not in sys.path:
        sys.path.append(folder)
    return value


def typed_law(text: str) -> Law | str:
    """Return the scaling law that the user typed as the value of an option.

    If the user typed "module:Class", this scaling law is imported and registered while
    the command runs, so that recipes can store and load it. A scaling law that is only
    named in a recipe file is never imported.
    """
    if ":" not in text:
        return text
    from ..laws import get_law, register_law

    law = get_law(text)
    register_law(law)
    return law


# --- options --------------------------------------------------------------------------------------


def option(names: str, kind: Any, text: str, **settings: Any) -> Decorator:
    """Return a decorator that adds an option to a command of `rankaware`.

    Args:
        names: its names, as in click, separated by spaces.
        kind: the type or the parser of its value.
        text: its help.
        **settings: the other arguments of `click.option`.
    """
    return click.option(*names.split(), type=kind, help=text, **settings)


def flag(names: str, text: str) -> Decorator:
    """Return a decorator that adds a flag, which is an option without a value, to a
    command.
    """
    return option(names, bool, text, is_flag=True)


def out_option(text: str, **settings: Any) -> Decorator:
    """Return the command option -o FILE, which names the output file of a command.

    Commands with the option -o first call `refuse_existing`.
    """
    file = click.Path(dir_okay=False, path_type=Path)
    return option("-o --out", file, text, **settings)


FORCE = flag("--force", "Overwrite the file of -o if it exists.")


def refuse_existing(out: Path | None, force: bool) -> None:
    """Raise an error if the output file already exists. A command calls this function
    before it does any work.
    """
    if out is not None and os.path.lexists(out) and not force:
        raise click.ClickException(
            f"The file {out} already exists. Pass --force to overwrite it."
        )


FILE = click.Path(path_type=Path)


INIT_HELP = "A: B starts at zero, as in PEFT. B: A starts at zero."


def _law(context: click.Context, parameter: Any, text: str | None) -> Law | str | None:
    """Return the scaling law that the user passed to the option --law.

    This function is a click callback.
    """
    return (
        None if text is None else typed_law(may_name_module(context, parameter, text))
    )


OWN_LAW = click.option(
    "--law",
    callback=_law,
    metavar="MODULE:CLASS",
    help="The recipe's scaling law, if it is your own, as package.module:Class. It is imported.",
)


def law_option(text: str, default: str) -> Decorator:
    """Return the command option --law, whose help text begins with `text`."""
    text = f"{text} A name such as mua, or your own law as package.module:Class."
    return option("--law", str, text, callback=_law, default=default)


OPTIMIZER = option(
    "--optimizer",
    str,
    "The optimizer: a name such as AdamW, or package:Class.",
    callback=may_name_module,
    default="AdamW",
)
MODEL_CONFIG = option(
    "--model-config",
    FILE,
    "Read the model's widths from its config.json, or from the folder that contains it.",
    metavar="CONFIG",
)


def widths_note(path: Path, widths: Widths) -> str:
    """Return a sentence that states the widths of a model and the file that they come
    from.
    """
    hidden, mean, largest = widths
    return (
        f"{path} states a hidden size of {hidden:g}. With LoRA on all linear layers the mean fan-in"
        f" is {mean:g}. The largest fan-in is {largest:g}."
    )


RSLORA = flag(
    "--rslora",
    "Use rsLoRA, which divides alpha by the root of the rank instead of the rank.",
)

# The fields of `rate_document`.
RATE_FIELDS = (
    "lr (per step), low and high (the ends of the 90 % interval, per step, or null), ceiling (the"
    " smallest learning rate that diverged, converted to this configuration, or null), extrapolated"
    " (whether the configuration is outside those that were tried), notes (sentences),"
    " configuration (text)"
)
