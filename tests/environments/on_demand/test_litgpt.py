"""litgpt's LoRA layers."""

from __future__ import annotations

from ...helpers.real_adapters import check_layer, each_case


@each_case(["litgpt"])
def test_a_layer(case):
    """It is read as declared, computes and trains as read, and starts at another init with the same output."""
    check_layer(case)
