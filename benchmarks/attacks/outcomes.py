"""Outcomes of attacks: counts by kind, failures in words, and the slowest attempt in seconds."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

HELD, REFUSED, FAILED = "held", "refused", "failed"
_KEPT = 20  # failures that are kept in words


def _control_s() -> float:
    """Seconds of a fixed piece of work on this machine, as it is loaded now: about a tenth where it is idle."""
    began = time.perf_counter()
    sorted(str(number * number) for number in range(200_000))
    return time.perf_counter() - began


HANG_S = 50 * _control_s()  # an attempt that takes longer counts as hung


class Refused(Exception):
    """An error of ours, raised in a process of its own, in its words."""


@dataclass
class Outcomes:
    """Counts of attempts by outcome: held, refused by one of our errors, or failed."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest: float = 0.0

    def attempt(
        self,
        what: object,
        call: Callable[[], Any],
        refusals: type[Exception] | tuple[()] = (),
        limit: float = HANG_S,
    ) -> None:
        """Make one attempt and count its outcome.

        It held if `call` returns. It was refused if `call` raises one of `refusals` with a printable message. It failed
        otherwise, or if it took more than `limit` seconds.
        """
        began, failure = time.perf_counter(), ""
        try:
            call()
            outcome = HELD
        except refusals as error:
            outcome = REFUSED
            failure = (
                ""
                if str(error).translate({9: "", 10: ""}).isprintable()
                else f"unprintable: {str(error)!r}"
            )
        except Exception as error:
            outcome, failure = FAILED, f"{type(error).__name__}: {error}"
        self.slowest = max(self.slowest, seconds := time.perf_counter() - began)
        if seconds > limit:
            failure = failure or f"took {seconds:.0f} s"
        self.counts[FAILED if failure else outcome] += 1
        if failure and len(self.failures) < _KEPT:
            self.failures.append(f"{what}: {failure}"[:400])

    def as_dict(self) -> dict[str, Any]:
        return {
            "counts": dict(self.counts),
            "failures": self.failures,
            "slowest": self.slowest,
        }


@dataclass(frozen=True)
class Attack:
    """`run(seed, count, folder)` makes `count` attempts. Of `total` attempts, each process runs a piece of `piece`.

    If a process dies or takes longer than `patience` seconds, its whole piece counts as failed.
    """

    name: str
    total: int
    piece: int
    run: Callable[[int, int, Any], Outcomes]
    patience: float = 900.0
