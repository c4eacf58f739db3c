"""How good the answers are: accuracy or perplexity, and the paired difference to the dense model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_compress.data import Prepared
from hf_compress.errors import CompressError
from hf_compress.evaluation.artefacts import Artefact


def quality(
    artefacts: list[Artefact], prepared: Prepared, task: str, limit: int | None, *, with_kl: bool, seed: int
) -> dict[str, dict[str, Any]]:
    """accuracy (classification) or perplexity (causal) of each artefact, and its paired difference to the first.

    Accuracy: points between 0 and 1. Perplexity: exp(sum nll / tokens); the difference is a ratio. KL(dense ||
    artefact) and agreement of the top answer are means over examples (classification) or predicted tokens (causal).
    """
    rows = prepared.eval.select(range(min(len(prepared.eval), limit or len(prepared.eval))))
    per: dict[str, list[tuple[float, int]]] = {
        a.name: [] for a in artefacts
    }  # (correct, 1) or (summed nll, tokens) of each row
    divergence: dict[str, list[float]] = {a.name: [0.0, 0.0, 0.0] for a in artefacts}  # KL, agreements, count
    size = 32 if task == "text-classification" else 4
    for start in tqdm(range(0, len(rows), size), desc="quality", unit="batch"):
        batch = prepared.collator([rows[i] for i in range(start, min(start + size, len(rows)))])
        labels = batch.pop("labels")
        inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
        reference: Tensor | None = None
        for artefact in artefacts:
            logits = artefact.predict(inputs)
            if not torch.isfinite(logits).all():
                raise CompressError(
                    "logits are not finite",
                    where=f"evaluate: {artefact.name}, rows from {start}",
                    next_step="check the stage before",
                )
            if task == "text-classification":
                per[artefact.name] += [(float(ok), 1) for ok in logits.argmax(-1) == labels]
                flat = logits
            else:
                logits, target = logits[:, :-1], labels[:, 1:]
                nll = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), target.flatten(), ignore_index=-100, reduction="none"
                ).view(target.shape)
                per[artefact.name] += [
                    (float(a), int(b)) for a, b in zip(nll.sum(1), (target != -100).sum(1), strict=True)
                ]
                flat = logits[target != -100]
            if with_kl:
                logs = flat.log_softmax(-1)
                reference = logs if reference is None else reference
                found = divergence[artefact.name]
                found[0] += float((reference.exp() * (reference - logs)).sum())
                found[1] += float((reference.argmax(-1) == logs.argmax(-1)).sum())
                found[2] += len(logs)
    base = torch.tensor(per[artefacts[0].name], dtype=torch.float64)
    result: dict[str, dict[str, Any]] = {}
    for artefact in artefacts:
        ours = torch.tensor(per[artefact.name], dtype=torch.float64)
        name = "accuracy" if task == "text-classification" else "perplexity"
        result[artefact.name] = {
            name: {
                "value": _score(ours, task),
                "n": len(ours),
                "tokens": None if task == "text-classification" else int(ours[:, 1].sum()),
            }
        }
        if artefact is not artefacts[0]:
            result[artefact.name][f"{name}_difference"] = paired_difference(base, ours, task, seed=seed)
            if with_kl:
                kl, same, count = divergence[artefact.name]
                result[artefact.name] |= {"kl_to_dense": kl / count, "agreement": same / count}
    return result


def _score(rows: Tensor, task: str) -> float:
    mean = rows[..., 0].sum(-1) / rows[..., 1].sum(-1)
    return float(mean) if task == "text-classification" else float(mean.exp())


def paired_difference(base: Tensor, ours: Tensor, task: str, *, seed: int = 0, draws: int = 2000) -> dict[str, float]:
    """Point estimate and 95% bootstrap interval over examples of accuracy - accuracy, or perplexity / perplexity.

    base, ours: (examples, 2) of (correct, 1) or (summed nll, tokens), the same examples in the same order.
    """
    made = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(draws):
        chosen = torch.randint(len(base), (len(base),), generator=made)
        values.append(_compare(base[chosen], ours[chosen], task))
    low, high = torch.tensor(values).quantile(torch.tensor([0.025, 0.975])).tolist()
    return {"value": _compare(base, ours, task), "low": low, "high": high}


def _compare(base: Tensor, ours: Tensor, task: str) -> float:
    return (
        _score(ours, task) - _score(base, task)
        if task == "text-classification"
        else _score(ours, task) / _score(base, task)
    )
