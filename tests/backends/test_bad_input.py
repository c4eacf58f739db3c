"""What a container does not have, and what its library is missing for, is said before a weight is read."""

from pathlib import Path
from typing import Any

import pytest

from hf_compress.errors import CompressError
from hf_compress.planning import require_possible
from hf_compress.recipe import parse
from tests.models import tiny


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ({"backend": "bitsandbytes", "bits": 3}, r"4 or 8 bits, not 3[\s\S]*stages\[0\].quantize.bits"),
        ({"backend": "bitsandbytes", "group_size": 32}, "its own blocks, not groups of 32"),
        ({"backend": "bitsandbytes", "bits": 4, "options": {"quant_type": "nf5"}}, "unknown 4-bit grid 'nf5'"),
        ({"backend": "compressed-tensors", "bits": 1}, "2 to 8 bits, not 1"),
        ({"backend": "compressed-tensors", "bits": 9}, "2 to 8 bits, not 9"),
        ({"backend": "compressed-tensors", "bits": 4, "group_size": 48}, "48 does not divide its 64 inputs"),
        ({"backend": "torchao", "bits": 16}, "8 bits, not 16"),
        ({"backend": "torchao", "group_size": 48}, "48 does not divide its 64 inputs"),
    ],
)
def test_bits_and_groups_that_a_container_does_not_have(scheme: dict[str, Any], reason: str, tmp_path: Path) -> None:
    tiny("llama").config.save_pretrained(tmp_path)  # there are no weights to read
    model = {"id": str(tmp_path), "task": "causal-lm"}
    with pytest.raises(CompressError, match=reason):
        require_possible(parse({"name": "x", "model": model, "stages": [{"quantize": scheme}]}))


@pytest.mark.parametrize(
    ("stage", "package", "extra"),
    [({"quantize": {"backend": "torchao"}}, "torchao", "torchao"), ({"export": {}}, "onnxruntime", "onnx")],
)
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    stage: dict[str, Any], package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else object())
    with pytest.raises(CompressError, match=rf"'{package}', which is not installed[\s\S]*hf-compress\[{extra}\]"):
        parse({"name": "x", "model": {"id": "unread"}, "stages": [stage]})
