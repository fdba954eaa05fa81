"""Benchmarks import each other from their own folder. Hypothesis has no deadlines and fixed examples."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("steady", deadline=None, derandomize=True, database=None)
settings.load_profile("steady")

sys.path.insert(0, str(Path(__file__).parents[1]))

Runs = dict[str, Iterable[tuple[int, float, float]]]


@pytest.fixture
def published_page(tmp_path: Path) -> Callable[[Runs], Path]:
    """Writes runs (rank, rate, loss) by model, as the page of published sweeps has them."""

    def write(runs: Runs) -> Path:
        lines = []
        for model, of_model in runs.items():
            lines += [f"## {model}", f"- Model: `{model}`"]
            lines += [
                f"| {lr} | {rank} | {loss} | 0.7 | 67 |" for rank, lr, loss in of_model
            ]
        path = tmp_path / "sft_sweep.md"
        path.write_text("\n".join(lines))
        return path

    return write
