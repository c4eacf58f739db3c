"""GPTQ through optimum and gptqmodel, in an environment of their own: the format that GPTQ kernels read."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.backends import Written, backends, check_group
from hf_compress.backends.elsewhere import hand_over
from hf_compress.calibration import Batch
from hf_compress.coverage import coverage
from hf_compress.environments import Say, environment
from hf_compress.environments.worker import EXPECTATION as ANSWERED
from hf_compress.environments.worker import WORKERS
from hf_compress.errors import CompressError
from hf_compress.families import family_of
from hf_compress.verification import EXPECTATION
from hf_compress.weights import Weight, base_of, weights

WORD = 32


def stores(weight: Weight, *, bits: int, group_size: int | None = None, **options: Any) -> float | str:
    """Bytes on disk (codes and zero points packed into int32, scales, the group of each input), or why it stays."""
    out, width = weight.shape
    if weight.kind == "expert":
        return "stacked experts are not nn.Linear, the only thing optimum's GPTQ rounds"
    if weight.transposed:
        return "Conv1D packed by gptqmodel is not opened again by transformers"
    if width % (group_size or width):
        return f"group_size {group_size} does not divide its {width} inputs"
    if width % WORD or out % WORD:
        return f"gptqmodel packs {WORD} rows and columns at a time, and it has {out} x {width}"
    groups = width // (group_size or width)
    return out * width * bits / 8 + groups * out * (bits / 8 + weight.whole.element_size()) + 4 * width


def check(
    *,
    bits: int,
    group_size: int | None = None,
    act_order: bool = False,
    symmetric: bool = True,
    damping: float = 0.01,
) -> None:
    """Raise a CompressError for what this container does not have, whatever the model."""
    if bits not in (2, 3, 4, 8):
        raise CompressError(f"gptqmodel stores 2, 3, 4 or 8 bits, not {bits}", where="bits")
    check_group(group_size)
    if not 0 < damping < 1:
        raise CompressError(f"damping is a share of the mean diagonal, not {damping}", where="options.damping")


@backends.register(
    "gptq",
    summary="2, 3, 4 or 8 bits by GPTQ for dense models, in the format GPTQ kernels read; `hf-compress env add gptq`",
    paper="https://arxiv.org/abs/2210.17323",
    disk="about 4x (8 bits) or 7x (4 bits) smaller than fp32 for the matrices it holds",
    memory="kept small",
    speed="GPTQ kernels on a GPU; slower than fp32 on a CPU",
    experts="no",
    serves="transformers with gptqmodel, vLLM",
    needs="gptqmodel optimum",
    environment="gptq",
    stores=stores,
    check=check,
    adapters=lambda model, **options: "only another environment opens it",
)
def gptq(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    *,
    bits: int,
    group_size: int | None = None,
    act_order: bool = False,
    symmetric: bool = True,
    damping: float = 0.01,
    calibration: Sequence[Batch] | None = None,
    say: Say = lambda _: None,
) -> Written:
    """Write `model` with its block matrices rounded by GPTQ on `calibration` text.

    act_order: columns in the order of their activations; damping: share of the mean diagonal added to H. The folder
    opens only where gptqmodel is installed, as the environment is: `verify` opens it there.

    Raises:
        CompressError: the environment is not built; no calibration text; what the library refuses.
    """
    check(bits=bits, group_size=group_size, act_order=act_order, symmetric=symmetric, damping=damping)
    python = environment("gptq").require(what="backend gptq", where="quantize")
    found, reasons = weights(model), dict[str, str]()
    for weight in found:
        if isinstance(why := stores(weight, bits=bits, group_size=group_size), str):
            reasons[weight.name] = why
    base = base_of(model)
    family = family_of(base.config)
    blocks = f"{base.base_model_prefix}.{family.blocks}" if base.base_model is not base else family.blocks
    inside = [w.module_name.removeprefix(blocks + ".").split(".", 1)[1] for w in found if w.name not in reasons]
    facts = hand_over(
        model,
        folder,
        python,
        WORKERS / "to_gptq.py",
        options={
            "bits": bits,
            "group_size": group_size,
            "act_order": act_order,
            "symmetric": symmetric,
            "damping": damping,
            "dtype": str(model.dtype).removeprefix("torch."),
            "block_name_to_quantize": blocks,
            "modules_in_block_to_quantize": [[name] for name in dict.fromkeys(inside)],
        },
        calibration=calibration or (),
        say=say,
    )
    (folder / EXPECTATION).parent.mkdir()
    shutil.move(folder / ANSWERED, folder / EXPECTATION)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    rounded = set(facts.pop("rounded"))
    notes = [f"gptqmodel's kernel here differs from torch by {facts['kernel_difference']:.1e} of the largest logit"]
    covered = coverage(model, [w.name for w in found if w.module_name in rounded], reasons)
    return Written(None, covered, notes, facts)
