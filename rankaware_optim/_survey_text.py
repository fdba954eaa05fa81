"""A survey as text: its table, and likely mistakes that it shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ._tables import text_table

if TYPE_CHECKING:
    from ._types import Survey


class Rated(NamedTuple):
    """A parameter's learning rate, and the reason for it in words."""

    lr: float
    reason: str


_HEADINGS = (
    "convention",
    "kind",
    "role",
    "rank",
    "scaling",
    "init",
    "fan-in",
    "fan-out",
    "tensors",
    "lr",
    "why",
)
_MOST_SCALING = 8.0
_LEAST_SCALING = 1 / 64
NO_LAW = "neither factor started at zero, so no law covers it: the base rate"


def init_text(init: str) -> str:
    """Return an init in the words of a report: by the factor that starts at zero.

    >>> init_text("A"), init_text("B")
    ('B = 0', 'A = 0')
    """
    return {"A": "B = 0", "B": "A = 0"}.get(init, init)


def explain(survey: Survey, per_module: bool, rates: Mapping[str, Rated]) -> str:
    """Return a table of the factors with their rates and reasons, equal factors on one line, then
    what to check.
    """
    lines = Counter[tuple[str, ...]]()

    def add(
        name: str, convention: str, cells: tuple[str, ...], reason: str, rated: Rated | None
    ) -> None:
        why = ("", reason) if rated is None else (f"{rated.lr:.3g}", rated.reason)
        lines[(name if per_module else convention, *cells, *why)] += 1

    for f in survey.factors:
        scaling = "" if f.role == "full" else f"{f.scaling:g}"
        init = "" if f.role == "full" else init_text(f.init)
        cells = (
            f.kind,
            f.role,
            str(f.rank or ""),
            scaling,
            init,
            f"{f.fan_in:g}",
            f"{f.fan_out:g}",
        )
        reason = NO_LAW if f.init == "other" else "a LoRA pair" if f.rank else "a whole weight"
        add(f.name, f.convention, cells, reason, rates.get(f.name))
    for name in survey.other:
        kind = survey.unsupported.get(name, "")
        add(
            name,
            "",
            (kind, "other", *[""] * 5),
            reason_of_other([kind] if kind else []),
            rates.get(name),
        )
    for name in survey.frozen:
        add(name, "", ("", "frozen", *[""] * 5), "a LoRA factor that does not train", None)
    rows = [(*line[:8], str(count), *line[8:]) for line, count in lines.items()]
    headings = ("module" if per_module else _HEADINGS[0], *_HEADINGS[1:])
    notes = [
        *(f"check: {check}" for check in audit(survey)),
        *(f"note: {note}" for note in survey.notes),
    ]
    words = ("module", "convention", "kind", "role", "init", "why")
    return text_table(headings, rows, lines=notes, left=words, width=200 if per_module else 140)


def reason_of_other(kinds: Sequence[str], rate: str = "the base rate") -> str:
    """Return why a parameter that is not a factor has its rate. `kinds`: its adapter's kinds, if no
    law covers them.
    """
    return f"{', '.join(kinds)}: no law, {rate}" if kinds else f"no LoRA factor: {rate}"


def audit(survey: Survey) -> Iterator[str]:
    """Yield likely mistakes that a survey shows, a sentence each."""
    pairs = [f for f in survey.factors if f.role != "full"]
    if not survey.factors:
        kinds = sorted(set(survey.unsupported.values()))
        yield (
            f"0 LoRA pairs matched (trainable adapters: {', '.join(kinds) or 'none'}), so the rank"
            " moves no rate."
        )
    if survey.frozen:
        yield (
            f"{_some(survey.frozen, 'LoRA factor')} not trained: an inactive adapter, or one frozen"
            " by mistake."
        )
    if survey.unadapted:
        yield (
            f"{_some(survey.unadapted, 'frozen stack')} not adapted: in PEFT, experts that are bare"
            " parameters need target_parameters instead of target_modules."
        )
    for init, words in (
        ("other", "neither factor zero at the start"),
        ("unknown", "an init that cannot be read"),
    ):
        names = [f.name for f in pairs if f.init == init]
        if names:
            yield f"{_some(names, 'factor')} not covered by a law's derivation: {words}."
    names = [f.name for f in pairs if f.rank and f.kind != "embedding" and f.rank > f.fan_in]
    if names:
        yield f"{_some(names, 'factor')} not low-rank: the rank is above the fan-in."
    names = [f.name for f in pairs if not _LEAST_SCALING <= f.scaling <= _MOST_SCALING]
    if names:
        yield (
            f"{_some(names, 'factor')} not scaled as usual: alpha / rank is above 8 or below 1/64."
        )


def _some(names: Sequence[str], what: str) -> str:
    """Return number and first name, as "2 factors (a, …) are". The caller's sentence continues with
    "not".
    """
    one = len(names) == 1
    return (
        f"{len(names)} {what}{'' if one else 's'} ({names[0]}{'' if one else ', …'})"
        f" {'is' if one else 'are'}"
    )
