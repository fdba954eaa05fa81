"""litgpt's LoRA layers."""

from __future__ import annotations

import pytest

from ...helpers.real_adapters import check_layer, each_case

pytest.importorskip("litgpt.lora", exc_type=ImportError)


@each_case(["litgpt"])
def test_a_layer(case):
    """It is read as declared, computes and trains as read, and starts at another init with the same output."""
    check_layer(case)
