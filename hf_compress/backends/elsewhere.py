"""Hand a model to a library in another environment, and take back a folder whose answers were compared with it."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_compress.calibration import Batch
from hf_compress.environments import Say, environment
from hf_compress.environments.worker import WORKERS, reopened, run_worker
from hf_compress.errors import CompressError
from hf_compress.families import family_of
from hf_compress.verification import TOLERANCE, probe

PROBE = (3, 40)  # rows and tokens: another shape than exporters trace with


@dataclass(frozen=True)
class Format:
    """A copy for another runtime that a library of another environment writes.

    folder: its name beside the checkpoint. quantize: what `export.quantize` may say. refused: of routed experts, by
    the family's name or ``*``.
    """

    folder: str
    environment: str
    quantize: tuple[str | None, ...]
    refused: dict[str, str]

    def refusal(self, config: PreTrainedConfig) -> str:
        """Why a model of this config is not exported; "" when it is."""
        family = family_of(config)
        if family.experts is None:
            return ""
        return self.refused.get(family.name, self.refused.get("*", ""))


_DEEPSEEK = "optimum-intel converts it with transformers up to 4.53 only"
FORMATS = {
    "openvino": Format(
        "openvino",
        "openvino",
        ("int8", "int4", "int8-static", None),
        {"deepseek_v2": _DEEPSEEK, "deepseek_v3": _DEEPSEEK},
    ),
    "optimum-onnx": Format(
        "onnx",
        "onnx",
        ("int8", "int8-static", None),
        {"*": "the exporter keeps the routing of its sample text, and the file is silently wrong for any other"},
    ),
}


def export_elsewhere(
    model: PreTrainedModel,
    folder: Path,
    *,
    format: str,
    quantize: str | None,
    group_size: int = 32,
    calibration: Sequence[Batch] = (),
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Write ``folder/openvino`` or ``folder/onnx`` from `model` (fp32 whatever its dtype).

    quantize: int8 (weights; ONNX rounds activations as they come), int4 (OpenVINO, weights in groups of
    `group_size`), int8-static (activations on scales from `calibration`), None. Facts: bytes; fp32_error, of the
    unquantized export; relative_error and kl_to_dense, of what was written; reopened_difference, of a second process.

    Raises:
        CompressError: the environment is not built; the library does not know the architecture, or computes something
        else from it; the folder answers otherwise when it is opened again.
    """
    chosen = FORMATS[format]
    python = environment(chosen.environment).require(what=f"export to {format}", where="export")
    if why := chosen.refusal(model.config):
        raise CompressError(why, where="export", next_step="leave this stage out")
    target = folder / chosen.folder
    facts = hand_over(
        model,
        target,
        python,
        WORKERS / f"to_{chosen.environment}.py",
        options={"quantize": quantize, "group_size": group_size},
        calibration=calibration,
        say=say,
    )
    say("opening it again")
    try:
        facts["reopened_difference"] = off = reopened(chosen.environment, target)
        if not off <= TOLERANCE:
            raise CompressError(
                f"what was written answers otherwise when opened again: {off:.1e} of the largest",
                where="export",
                next_step="leave the stage out; report the architecture",
            )
    except BaseException:
        shutil.rmtree(target)  # nobody has vouched for it
        raise
    size = sum(p.stat().st_size for p in target.iterdir() if p.suffix in (".onnx", ".onnx_data", ".data", ".bin"))
    facts |= {"format": format, "quantize": quantize, "bytes": size, "error": facts["relative_error"]}
    (target / "export.json").write_text(json.dumps(facts, indent=2))
    return facts


def hand_over(
    model: PreTrainedModel,
    target: Path,
    python: Path,
    script: Path,
    *,
    options: dict[str, Any],
    calibration: Sequence[Batch],
    say: Say,
) -> dict[str, Any]:
    """Save the model where the worker may read it, run the worker, return its facts."""
    length = min(PROBE[1], getattr(model.config, "max_position_embeddings", None) or PROBE[1])
    ids, mask = probe(model.config.vocab_size, (PROBE[0], length))
    exact = model if model.dtype == torch.float32 else copy.deepcopy(model).float()  # as the worker opens it
    with torch.no_grad():
        logits = exact.eval()(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
    tensors: dict[str, Tensor] = {"probe.input_ids": ids, "probe.attention_mask": mask, "probe.logits": logits.float()}
    for number, batch in enumerate(calibration):
        tensors |= {f"calibration.{number}.{name}": batch[name] for name in ("input_ids", "attention_mask")}
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as dense:
        model.save_pretrained(dense)
        return run_worker(
            python, script, checkpoint=Path(dense), target=target, options=options, tensors=tensors, say=say
        )
