"""Tests of litgpt's LoRA layers."""

from __future__ import annotations

from ...helpers.real_adapters import check_layer, each_case


@each_case(["litgpt"])
def test_a_layer(case):
    """The survey reads a layer as declared.

    The layer computes and trains accordingly, and another init leaves its output unchanged.
    """
    check_layer(case)
