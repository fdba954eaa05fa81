"""A learning rate that explains itself: what `Recipe.at`, `convert_lr` and `suggest_lr` return."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from ._printable import printable


@dataclass(frozen=True)
class Rate:
    """A learning rate and how sure it is. `lr` or `float(rate)` is the number, and printed it explains itself.

    `lr` is the rate to use. It lies below the middle of its band where too high a rate costs more. `low` and `high`
    bound the best rate with 90 %, and are 0 and infinity where nothing bounds it. `ceiling` is the smallest rate seen
    to diverge, moved to this configuration, or None. `extrapolated` says that nothing was tried this far out. `notes`
    are cautions in words. `configuration` says what the rate is for: rank, alpha, steps and more, as far as known.

    >>> rate = Rate(1e-3, low=5e-4, high=2e-3)
    >>> print(rate)
    lr        0.001
    90 % band 0.0005 to 0.002
    >>> float(rate)
    0.001
    """

    lr: float
    low: float = 0.0
    high: float = math.inf
    ceiling: float | None = None
    extrapolated: bool = False
    notes: tuple[str, ...] = ()
    configuration: str = field(default="", compare=False)

    def __float__(self) -> float:
        return float(self.lr)

    def __str__(self) -> str:
        return self.explain()

    def explain(self) -> str:
        """The rate in words, a fact a line: the number, what bounds it, and the notes."""
        return printable("\n".join([*self._facts(), *(f"note: {note}" for note in self.notes)]))

    @property
    def band(self) -> str:
        """The band in words: "0.0005 to 0.002"."""
        return f"{self.low:.3g} to {self.high:.3g}"

    def _facts(self) -> Iterator[str]:
        yield f"lr        {self.lr:.3g}"
        if self.configuration:
            yield f"at        {self.configuration}"
        if math.isfinite(self.high):
            yield f"90 % band {self.band}"
        if self.ceiling is not None:
            yield f"ceiling   {self.ceiling:.3g} (the smallest rate seen to diverge)"
        if self.extrapolated:
            yield "extrapolated"
