"""What rounding one part of a model does to its answers, part by part and bits by bits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_compress.calibration import Batch
from hf_compress.criteria import Statistics
from hf_compress.errors import CompressError
from hf_compress.grids import Grid
from hf_compress.oneshot.memory import fingerprint
from hf_compress.oneshot.order import stages_of
from hf_compress.oneshot.solvers import solvers
from hf_compress.weights import Weight, weights

EXPERTS = "routed experts"


def parts_of(model: PreTrainedModel) -> dict[str, list[Weight]]:
    """Name of the first -> weights that get the same bits: those that read one input, which servers fuse (q, k and v;
    gate and up), and all routed experts of the model, which transformers opens with one scheme."""
    found: dict[str, list[Weight]] = {}
    by_block: dict[int, list[Weight]] = {}
    for weight in weights(model):
        by_block.setdefault(weight.block or 0, []).append(weight)
    for members in by_block.values():
        for group in (group for stage in stages_of(model, members) for group in stage):
            name = group.first.name if group.first.expert is None else EXPERTS
            found.setdefault(name, []).extend(group.weights)
    return found


@torch.no_grad()
def sensitivities(
    model: PreTrainedModel,
    batches: list[Batch],
    parts: Mapping[str, Sequence[Weight]],
    grids: Mapping[int, Grid],
    *,
    cache: Path | None = None,
) -> dict[str, dict[int, float]]:
    """Part -> bits -> mean over tokens of KL(dense || the model with this part alone rounded to the nearest point).

    A budget is no part of it: with `cache` (a folder) the table is written down, as JSON named after the weights, the
    text and the grids, and read instead of being measured when these are the same.

    Args:
        grids: bits -> grid. Memory: the model, a copy of the largest part (of a mixture, its routed experts), the
        answers to all batches.

    Raises:
        CompressError: answers that are not finite.
    """
    names = {part: sorted(w.name for w in members) for part, members in parts.items()}
    facts = [model.config.to_dict(), names, {bits: grid.facts() for bits, grid in grids.items()}]
    known = [w.matrix[0, :64].float().cpu() for w in weights(model)]
    file = None
    if cache is not None:
        file = cache / f"sensitivity-{fingerprint(facts, known, batches)[:16]}.json"
        if file.exists():
            read = json.loads(file.read_text())
            return {part: {int(bits): kl for bits, kl in each.items()} for part, each in read.items()}
    model.eval()
    dense = [_answers(model, batch) for batch in batches]
    count = sum(len(each) for each in dense)
    table: dict[str, dict[int, float]] = {}
    for part, members in tqdm(parts.items(), desc="sensitivity", unit="part"):
        kept = [weight.matrix.clone() for weight in members]
        table[part] = {}
        try:
            for bits, grid in grids.items():
                nearest = solvers["rtn"](grid=grid)
                for weight, before in zip(members, kept, strict=True):
                    weight.matrix.copy_(before)
                    weight.matrix.copy_(nearest.solve([weight], Statistics())[0].values)
                total = sum(
                    float(F.kl_div(_answers(model, batch), wanted, reduction="sum", log_target=True))
                    for batch, wanted in zip(batches, dense, strict=True)
                )
                table[part][bits] = total / count
        finally:
            for weight, before in zip(members, kept, strict=True):
                weight.matrix.copy_(before)
    if file is not None:
        file.with_suffix(".part").write_text(json.dumps(table, indent=1))
        file.with_suffix(".part").rename(file)
    return table


def _answers(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Log probabilities, (tokens or rows, classes), without padding."""
    given = {name: tensor.to(model.device) for name, tensor in batch.items()}
    logits: Tensor = model(**given, **({"use_cache": False} if model.can_generate() else {})).logits.float()
    if logits.dim() == 3:
        logits = logits[given["attention_mask"].bool()]
    if not torch.isfinite(logits).all():
        raise CompressError(
            "the model's answers are not finite",
            where="budget",
            next_step="check the weights and the model's dtype, or give overrides instead of a budget",
        )
    return F.log_softmax(logits, -1)
