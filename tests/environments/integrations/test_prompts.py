"""Tests of the interactive examples on pages that need PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest

from ...test_pages import pages, prompts_of, prompts_run

WITH_PEFT = [path for path in pages() if "peft" in prompts_of(path)]


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
@pytest.mark.parametrize("path", WITH_PEFT, ids=lambda path: path.stem)
def test_what_is_typed_at_a_prompt_prints_what_the_page_says(path: Path) -> None:
    """Every `>>>` example of the page prints what the page shows."""
    assert prompts_run(path).attempted
