"""Trainable parameters of adapters without a law. They are recognised by their names and keep the
base rate.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Other finetuning methods, by the names of their parameters.
_ADAPTERS = {
    "LoHa": r"hada_[wt]\d",
    "LoKr": r"lokr_[wt]\d",
    "PVeRA": r"pvera_lambda_",
    "VeRA": r"vera_lambda_",
    "VB-LoRA": r"vblora_",
    "RandLoRA": r"randlora_",
    "Poly": r"poly_lora_",
    "DyLoRA": r"lora_[AB]\.\d+$|(^|\.)(up|down)_list\.\d+$",
    "GLoRA": r"(^|\.)([ab][12]|bm)\.weight$|glora_[A-E]\.",
    "T-LoRA": r"(^|\.)lambda_layer$",
    "GraLoRA": r"gralora_[AB]",
    "DeLoRA": r"delora_(A|B|lambda)",
    "HiRA": r"hira_(embedding_)?[AB]",
    "Lily": r"lily_(A|B|router)",
    "TinyLoRA": r"tinylora_v",
    "Uni-LoRA": r"unilora_theta",
    "AdaMSS": r"adamss_[AB]",
    "PEANuT": r"peanut_",
    "FRoD": r"frod_lambda_",
    "DEFT": r"deft_[PR]\.",
    "OSF": r"osf_svd_params",
    "SuperTuning": r"supertuning_",
    "RoAd": r"road_(theta|alpha)",
    "BEFT": r"beft_bias",
    "LN tuning": r"ln_tuning_layers",
    "IA³": r"ia3_l(\.|$)",
    "BOFT": r"boft_[Rs]",
    "PSOFT": r"psoft_R",
    "OFT": r"(^|\.)oft_",
    "HRA": r"hra_u",
    "MiSS": r"(bone|miss)_block|(^|\.)bone_",
    "SHiRA": r"shira_weight",
    "C³A": r"c3a_kernel",
    "FourierFT": r"fourierft_spectrum",
    "WaveFT": r"waveft_spectrum",
    "prompt tuning": r"prompt_(encoder|embeddings)",
}
# Parameters that train in addition to a pair.
_PARTS = {
    "AdaLoRA's singular values": r"(^|\.)lora_E(\.|$)",
    "KaSA's singular values": r"(^|\.)lora_diag(\.|$)",
    "MonteCLoRA's sampler": r"lora_monteclora_sampler",
    "DoRA magnitude": r"lora_magnitude|dora_scale|(^|\.)(weight_)?magnitude(\.|$)",
    "Tucker core": r"lora_mid\.",
    "LoRA bias": r"(lora_[ABab]|lora_up|lora_down)\.(.*\.)?bias$",
    "LyCORIS scalar": r"(^|\.)scalar$",
    "new tokens": r"trainable_tokens_",
    "whole copy (modules_to_save)": r"modules_to_save\.",
}
_KINDS = {
    kind: re.compile(pattern) for kind, pattern in {**_ADAPTERS, **_PARTS}.items()
}


def other_kind(name: str) -> str | None:
    """Return the kind of adapter without a law to which a parameter belongs, by its name; None for
    other parameters.

    >>> other_kind("blocks.0.q.vera_lambda_b.default"), other_kind("head.weight")
    ('VeRA', None)
    """
    return next(
        (kind for kind, pattern in _KINDS.items() if pattern.search(name)), None
    )


def is_other_adapter(name: str) -> bool:
    """Return whether a parameter belongs, by its name, to an adapter that is not a LoRA pair, such
    as LoHa or IA³.
    """
    return any(_KINDS[kind].search(name) for kind in _ADAPTERS)


def unsupported(names: Iterable[str]) -> dict[str, str]:
    """Return the kind of every parameter in `names` that belongs to an adapter without a law, by
    name.
    """
    return {name: kind for name in names if (kind := other_kind(name))}
