"""A learning rate with its uncertainty, as `Recipe.at`, `convert_lr` and `suggest_lr` return it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ._printing import Table, printable


@dataclass(frozen=True)
class Rate:
    """A learning rate and its uncertainty. `float(rate)` is the number. Printing shows all of it.

    Args:
        lr: the rate to use, per step. It is below the middle of the band if too high a rate costs
            more.
        low: lower end of the 90 % band of the best rate, None if unknown.
        high: upper end of the band, None if unknown.
        ceiling: the smallest rate that diverged, moved to this configuration by the law of best
            rates. At a higher rank runs may break below it: in a published DPO such a rate fell
            twice as fast (benchmarks/results/large_models.md). None if no run diverged, and for
            full finetuning that was never run.
        extrapolated: whether the configuration is outside those tried.
        notes: sentences on assumptions and uncertainties.
        configuration: the rate's rank, alpha, steps and more in words, as far as known.

    >>> rate = Rate(1e-3, low=5e-4, high=2e-3)
    >>> print(rate)
    lr        0.001
    90 % band 0.0005 to 0.002
    >>> float(rate)
    0.001
    """

    lr: float
    low: float | None = None
    high: float | None = None
    ceiling: float | None = None
    extrapolated: bool = False
    notes: tuple[str, ...] = ()
    configuration: str = field(default="", compare=False)

    def __float__(self) -> float:
        return float(self.lr)

    def __str__(self) -> str:
        table = self._table()
        facts = [f"{name:<10}{text}" for name, text in table.rows]
        return printable("\n".join([*facts, *table.lines]))

    def _repr_html_(self) -> str:
        return self._table().html()

    def _table(self) -> Table:
        notes = [f"note: {note}" for note in self.notes]
        return Table((), [*self._facts()], notes)

    @property
    def band(self) -> str:
        """The band as text, such as "0.0005 to 0.002"; "unknown" if an end is."""
        if self.low is None or self.high is None:
            return "unknown"
        return f"{self.low:.3g} to {self.high:.3g}"

    def _facts(self) -> Iterator[tuple[str, str]]:
        yield "lr", f"{self.lr:.3g}"
        if self.configuration:
            yield "at", self.configuration
        if self.high is not None:
            yield "90 % band", self.band
        if self.ceiling is not None:
            yield (
                "ceiling",
                f"{self.ceiling:.3g} (the smallest rate that diverged, moved to this"
                " configuration as a best rate; at a higher rank it may be lower)",
            )
        if self.extrapolated:
            yield "extrapolated", ""
