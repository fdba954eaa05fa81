"""Trainable parameters that belong to an adapter and have no law: told by their names, left at the base rate."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["is_other_adapter", "other_kind", "unsupported"]


class _Kind(NamedTuple):
    name: str
    pattern: re.Pattern[str]
    adapter: bool = True  # a way of finetuning of its own, rather than a part of another


def _kind(name: str, pattern: str, adapter: bool = True) -> _Kind:
    return _Kind(name, re.compile(pattern), adapter)


_KINDS = (
    _kind("LoHa", r"hada_[wt]\d"),
    _kind("LoKr", r"lokr_[wt]\d"),
    _kind("PVeRA", r"pvera_lambda_"),
    _kind("VeRA", r"vera_lambda_"),
    _kind("VB-LoRA", r"vblora_"),
    _kind("RandLoRA", r"randlora_"),
    _kind("Poly", r"poly_lora_"),
    _kind("DyLoRA", r"lora_[AB]\.\d+$|(^|\.)(up|down)_list\.\d+$"),
    _kind("GLoRA", r"(^|\.)([ab][12]|bm)\.weight$|glora_[A-E]\."),
    _kind("T-LoRA", r"(^|\.)lambda_layer$"),
    _kind("GraLoRA", r"gralora_[AB]"),
    _kind("DeLoRA", r"delora_(A|B|lambda)"),
    _kind("HiRA", r"hira_(embedding_)?[AB]"),
    _kind("Lily", r"lily_(A|B|router)"),
    _kind("TinyLoRA", r"tinylora_v"),
    _kind("Uni-LoRA", r"unilora_theta"),
    _kind("AdaMSS", r"adamss_[AB]"),
    _kind("PEANuT", r"peanut_"),
    _kind("FRoD", r"frod_lambda_"),
    _kind("DEFT", r"deft_[PR]\."),
    _kind("OSF", r"osf_svd_params"),
    _kind("SuperTuning", r"supertuning_"),
    _kind("RoAd", r"road_(theta|alpha)"),
    _kind("BEFT", r"beft_bias"),
    _kind("LN tuning", r"ln_tuning_layers"),
    _kind("IA³", r"ia3_l(\.|$)"),
    _kind("BOFT", r"boft_[Rs]"),
    _kind("PSOFT", r"psoft_R"),
    _kind("OFT", r"(^|\.)oft_"),
    _kind("HRA", r"hra_u"),
    _kind("MiSS", r"(bone|miss)_block|(^|\.)bone_"),
    _kind("SHiRA", r"shira_weight"),
    _kind("C³A", r"c3a_kernel"),
    _kind("FourierFT", r"fourierft_spectrum"),
    _kind("WaveFT", r"waveft_spectrum"),
    _kind("prompt tuning", r"prompt_(encoder|embeddings)"),
    _kind("AdaLoRA's singular values", r"(^|\.)lora_E(\.|$)", False),
    _kind("KaSA's singular values", r"(^|\.)lora_diag(\.|$)", False),
    _kind("MonteCLoRA's sampler", r"lora_monteclora_sampler", False),
    _kind("DoRA magnitude", r"lora_magnitude|dora_scale|(^|\.)(weight_)?magnitude(\.|$)", False),
    _kind("Tucker core", r"lora_mid\.", False),
    _kind("LoRA bias", r"(lora_[ABab]|lora_up|lora_down)\.(.*\.)?bias$", False),
    _kind("LyCORIS scalar", r"(^|\.)scalar$", False),
    _kind("new tokens", r"trainable_tokens_", False),
    _kind("whole copy (modules_to_save)", r"modules_to_save\.", False),
)


def other_kind(name: str) -> str | None:
    """The kind of adapter that a parameter without a law belongs to, by its name; None for any other parameter.

    >>> other_kind("blocks.0.q.vera_lambda_b.default"), other_kind("head.weight")
    ('VeRA', None)
    """
    return next((kind.name for kind in _KINDS if kind.pattern.search(name)), None)


def is_other_adapter(name: str) -> bool:
    """Whether a parameter's name is one of an adapter that is no LoRA pair, such as LoHa or IA³."""
    return any(kind.adapter and kind.pattern.search(name) for kind in _KINDS)


def unsupported(names: Iterable[str]) -> dict[str, str]:
    """The kind of every parameter in `names` that belongs to an adapter without a law, by name."""
    return {name: kind for name in names if (kind := other_kind(name))}
