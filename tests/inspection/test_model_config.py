"""A model's configuration that is not built: what is refused before any library is asked."""

from __future__ import annotations

import json
import sys

import pytest

import rankaware_optim as ra
from rankaware_optim.inspection import survey_config

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
CODE = {"AutoModel": "modeling_own.Model"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"There is no file .*config\.json\. Give a model's folder"),
        ("{", r"config\.json cannot be read"),
        ("[]", r"config\.json is no JSON object"),
        (
            json.dumps({**LLAMA, "auto_map": CODE}),
            r"names code of its own \(auto_map\)",
        ),
        (json.dumps({**LLAMA, "text": {"a": {"auto_map": CODE}}}), r"code of its own"),
    ],
)
def test_a_file_that_is_no_plain_configuration_is_refused(tmp_path, text, message):
    """A missing or unreadable file, and one that names code, are refused with cause and cure."""
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ra.InspectionError, match=message):
        survey_config(tmp_path, target_modules=["q_proj"])


@pytest.mark.parametrize("target_modules", [None, [], ""])
def test_lora_needs_the_names_of_its_layers(tmp_path, target_modules):
    """Without target_modules the width of LoRA is not known."""
    with pytest.raises(ra.InspectionError, match="Give target_modules too"):
        survey_config(tmp_path, target_modules=target_modules)


@pytest.mark.parametrize("missing", ["huggingface_hub", "transformers"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, missing):
    """Without the library that builds the model, the error says what to install and what to do without it."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    monkeypatch.setitem(sys.modules, missing, None)
    message = (
        r"needs a package that is not here: .*\. Install transformers or .*fan_in="
    )
    with pytest.raises(ra.InspectionError, match=message):
        survey_config(tmp_path, method="full")
