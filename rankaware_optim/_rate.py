"""This module defines `Rate`, a learning rate together with its uncertainty.

`Recipe.at`, `convert_lr` and `suggest_lr` return a `Rate`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from ._printing import Table, printable

if TYPE_CHECKING:
    from ._types import Reference


class Rate(float):
    """A learning rate together with its uncertainty.

    A `Rate` is a float, so you can pass it wherever a learning rate is expected:
    `torch.optim.AdamW(params, lr=rate)`, `TrainingArguments(learning_rate=rate)`,
    `json.dumps`. Arithmetic with a `Rate` returns plain floats. `print(rate)` shows a
    table with everything that is known about the learning rate, and `f"{rate:.2g}"`
    formats the number alone. A `Rate` is pickled as a plain float, so a
    pickle file that contains a `Rate` can be read without this package.

    Args:
        lr: the learning rate to use, per step. It is below the middle of the interval if a
            learning rate that is too high costs more than one that is too low.
        low: lower end of the 90 % interval of the best learning rate, None if unknown.
        high: upper end of the interval, None if unknown.
        ceiling: the smallest learning rate where a run diverged, converted to this configuration
            by the scaling law. The law describes best learning rates. At a higher rank runs may
            diverge below the ceiling: in a published DPO study the learning rate that diverged fell
            twice as fast (benchmarks/results/large_models.md). None if no run diverged, and for
            full finetuning that was never run.
        extrapolated: whether the configuration is outside those that were tried.
        notes: sentences on assumptions and uncertainties.
        configuration: rank, alpha, steps and whatever else is known of the configuration, in words.
        reference: the configuration as a `Reference`, None if unknown. `RankAwareOptimizer` takes
            it as `tuned_at`.

    >>> rate = Rate(1e-3, low=5e-4, high=2e-3)
    >>> print(rate)
    lr            0.001
    90 % interval 0.0005 to 0.002
    >>> rate
    Rate(0.001, low=0.0005, high=0.002)
    >>> rate / 2, f"{rate}"
    (0.0005, '0.001')
    """

    low: float | None
    high: float | None
    ceiling: float | None
    extrapolated: bool
    notes: tuple[str, ...]
    configuration: str
    reference: Reference | None

    def __new__(
        cls,
        lr: float,
        low: float | None = None,
        high: float | None = None,
        ceiling: float | None = None,
        extrapolated: bool = False,
        notes: Sequence[str] = (),
        configuration: str = "",
        reference: Reference | None = None,
    ) -> Rate:
        rate = super().__new__(cls, lr)
        vars(rate).update(
            low=low,
            high=high,
            ceiling=ceiling,
            extrapolated=extrapolated,
            notes=tuple(notes),
            configuration=configuration,
            reference=reference,
        )
        return rate

    @property
    def lr(self) -> float:
        """The learning rate as a plain float."""
        return float(self)

    @property
    def band(self) -> str:
        """The 90 % interval as a string, such as "0.0005 to 0.002". If one end of
        the interval is unknown, the string is "unknown".
        """
        if self.low is None or self.high is None:
            return "unknown"
        return f"{self.low:.3g} to {self.high:.3g}"

    def with_notes(self, *notes: str) -> Rate:
        """Return the same learning rate with additional notes."""
        facts = {**vars(self), "notes": (*self.notes, *notes)}
        return Rate(self.lr, **facts)

    # --- as a number ------------------------------------------------------------------------------

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(
            f"The attribute {name} of a Rate cannot be set. Pass a plain number instead of the Rate"
            " to use a different learning rate."
        )

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"The attribute {name} of a Rate cannot be deleted. Call float(rate) to get the"
            " learning rate alone."
        )

    def __reduce__(self) -> Any:
        # A checkpoint may be loaded on a machine where this package is not installed.
        return float, (self.lr,)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__reduce__()

    def __copy__(self) -> Rate:
        return self

    def __deepcopy__(self, memo: object) -> Rate:
        return self

    # --- in words ---------------------------------------------------------------------------------

    def __format__(self, spec: str) -> str:
        return format(self.lr, spec)

    def __repr__(self) -> str:
        facts = [f"{self.lr:.6g}"]
        for name in ("low", "high", "ceiling"):
            value = getattr(self, name)
            if value is not None:
                facts.append(f"{name}={value:.3g}")
        if self.extrapolated:
            facts.append("extrapolated=True")
        return f"Rate({', '.join(facts)})"

    def __str__(self) -> str:
        table = self._table()
        width = 1 + max(len(name) for name, _ in table.rows)
        facts = [f"{name:<{width}}{text}" for name, text in table.rows]
        return printable("\n".join([*facts, *table.lines]))

    def _repr_html_(self) -> str:
        return self._table().html()

    def _table(self) -> Table:
        notes = [f"note: {note}" for note in self.notes]
        return Table((), [*self._facts()], notes)

    def _facts(self) -> Iterator[tuple[str, str]]:
        yield "lr", f"{self.lr:.3g}"
        if self.configuration:
            yield "at", self.configuration
        if self.high is not None:
            yield "90 % interval", self.band
        if self.ceiling is not None:
            yield (
                "ceiling",
                f"{self.ceiling:.3g} (the smallest learning rate that diverged, converted to this"
                " configuration as a best learning rate is; at a higher rank it may be lower)",
            )
        if self.extrapolated:
            yield "extrapolated", "yes: outside the configurations that were tried"
