"""Does a calibration's prior lose by its number of tokens? 1, 2 and 8, simulated on the study's surfaces.

    python benchmarks/calibration/prior_tokens.py

Every study is made three times, with the same seeds and the same octaves by which its first guess is moved. Means over
a task's configurations, studies and ranks are paired, and the 95 % intervals are of a bootstrap over the seven tasks.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from calibration.simulated import FEW, PLANS, REAL, Plan, calibrated, rate_of
from calibration.surfaces import study_surfaces
from study.domains import STUDY
from study.grids import FULL

from rankaware_optim import MuA, RankAwareWarning

TOKENS, DRAWS = (1.0, 2.0, 8.0), 20
COMPARED = (FEW[-1], PLANS[0], PLANS[1], REAL)
Lost = dict[tuple[float, str, bool], list[float]]  # by tokens, task, and whether full


def lost_by(plan: Plan) -> Lost:
    """What the rates of all studies lose, in percent of the gain."""
    lost: Lost = {}
    for index, on in enumerate(study_surfaces()):
        for tokens in TOKENS:
            for draw in range(DRAWS):
                recipe = calibrated(on, plan, (index, draw), MuA(tokens=tokens))
                for rank in (*on.ranks, FULL):
                    regret = 100 * on.mean[rank](rate_of(recipe, on, rank)[0])
                    lost.setdefault((tokens, on.domain, rank == FULL), []).append(
                        regret
                    )
    return lost


def interval(differences: Sequence[float]) -> str:
    """The mean, and its interval over tasks."""
    rng = np.random.default_rng(0)
    drawn = rng.choice(differences, (10_000, len(differences))).mean(axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return f"{statistics.fmean(differences):+.3f} [{low:+.3f}, {high:+.3f}]"


def main() -> None:
    """Print a line for each plan, and LoRA's ranks or full finetuning."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RankAwareWarning)
    for plan in COMPARED:
        lost = lost_by(plan)
        for full in (False, True):
            means = {
                tokens: [statistics.fmean(lost[tokens, task, full]) for task in STUDY]
                for tokens in TOKENS
            }
            said = [f"{t:g}: {statistics.fmean(of):.2f} %" for t, of in means.items()]
            for tokens in (1.0, 8.0):
                pairs = zip(means[2.0], means[tokens], strict=True)
                differences = [two - other for two, other in pairs]
                said.append(f"2 less {tokens:g}: {interval(differences)}")
            print(plan, "full" if full else "LoRA", *said, sep="; ", flush=True)


if __name__ == "__main__":
    main()
