"""ms-swift itself: its command trains examples/swift.sh."""

from __future__ import annotations

import pytest

from ...helpers.examples import EXAMPLES, run, tiny

pytest.importorskip("swift")


def test_swifts_command_trains_the_example(tmp_path):
    """`swift sft` loads the plug-in's file, prints its report once and logs rates that it moved."""
    tiny(tmp_path)
    out = run(
        tmp_path,
        "bash",
        str(EXAMPLES / "swift.sh"),
        MODELSCOPE_CACHE=str(tmp_path / "cache"),
    )
    assert out.count("RankAwareOptimizer(AdamW)") == 1
    assert "rank_multiplier/A/r64" in out
    assert list(tmp_path.glob("swift-out/**/adapter_model.safetensors"))
