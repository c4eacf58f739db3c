"""The loop over blocks: gather statistics, compress, run again for the next block's inputs."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_compress.calibration import Batch
from hf_compress.errors import CompressError
from hf_compress.oneshot.solvers import Solver
from hf_compress.oneshot.statistics import Gatherer
from hf_compress.weights import Weight, blocks_of, weights


class Store(Protocol):
    """Where blocks live between their turns: in memory, or on disk.

    scales: weight name -> the scale its solver chose, of the blocks that are live.
    """

    scales: dict[str, Tensor]

    def load(self, block: int) -> bool:
        """Make block's values (and scales) live; True when it was compressed before (an interrupted run goes on)."""

    def save(self, block: int) -> None:
        """Keep the compressed block, and let go of its memory where that is the point."""


@dataclass
class OneshotReport:
    """touched: names. sparsity: share of zeros of each touched weight. starved: expert weight -> tokens it saw (fewer
    than 32). scales: of the weights whose solver chose a grid, where the model stays in memory."""

    touched: list[str] = field(default_factory=list)
    sparsity: dict[str, float] = field(default_factory=dict)
    starved: dict[str, int] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        mean = sum(self.sparsity.values()) / max(1, len(self.sparsity))
        return {"weights": len(self.touched), "mean_sparsity": mean, "starved_experts": self.starved}


@torch.no_grad()
def run_blocks(model: PreTrainedModel, batches: list[Batch], solver: Solver, store: Store) -> OneshotReport:
    """Compress every block matrix of `model` in place, in order.

    For each block: one pass over the batches gathers the statistics of all its matrices, `solver` gives each its new
    values, and a second pass through the compressed block makes the inputs of the next. Memory: one block (what
    `store` keeps live), the activations of all batches, statistics of one block. A solver that needs no statistics
    runs without these passes.

    Raises:
        CompressError: no batches for a solver that needs statistics; activations that are not finite (naming the
        block); layers that take different masks (sliding windows).
    """
    if solver.needs and not batches:
        raise CompressError("there is nothing to calibrate on", where="one-shot compression", next_step="give batches")
    batches = batches if solver.needs else []
    if batches and len(set(getattr(model.config, "layer_types", None) or ["same"])) > 1:
        raise CompressError(
            "blocks of this model take different attention masks",
            where="config.layer_types",
            next_step="use a model without sliding-window layers",
        )
    blocks = blocks_of(model)
    by_block: dict[int, list[Weight]] = {}
    for weight in weights(model):
        assert weight.block is not None
        by_block.setdefault(weight.block, []).append(weight)
    model.eval()
    first_done = store.load(0)
    calls = [_first_call(model, blocks[0], batch) for batch in batches]
    keeps = [batch["attention_mask"].flatten().bool().to(model.device) for batch in batches]
    report = OneshotReport()
    for index, block in enumerate(tqdm(blocks, desc="blocks", unit="block")):
        done = store.load(index) if index else first_done
        if not done:
            gatherer = Gatherer(by_block[index], solver.needs)
            for call, keep in zip(calls, keeps, strict=True):
                gatherer.keep = keep
                call.run(block, index)
            gatherer.close()
            for weight in by_block[index]:
                solved = solver.solve(weight, gatherer.statistics(weight))
                weight.matrix.copy_(solved.values)
                if solved.scale is not None:
                    store.scales[weight.name] = solved.scale
            report.starved |= gatherer.starved if batches else {}
        for weight in by_block[index]:
            report.touched.append(weight.name)
            report.sparsity[weight.name] = float((weight.matrix == 0).float().mean())
        for call in calls:
            call.hidden = call.run(block, index)
        store.save(index)
    report.scales = store.scales
    return report


@dataclass
class _Call:
    """How the model calls its blocks, with the hidden states that go into the next one."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, index: int) -> Tensor:
        out = block(self.hidden, *self.args, **self.kwargs)
        hidden: Tensor = out[0] if isinstance(out, tuple) else out
        if not torch.isfinite(hidden).all():
            raise CompressError(
                "activations are not finite",
                where=f"block {index}",
                next_step="check the calibration data and the model's dtype",
            )
        return hidden


class _Reached(Exception):
    pass


def _first_call(model: PreTrainedModel, block: nn.Module, batch: Batch) -> _Call:
    """What the model passes to its first block for this batch."""
    seen: list[_Call] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = copy.copy(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        seen.append(_Call(hidden, args[1:], kwargs))
        raise _Reached

    hook = block.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        model(**inputs, **({"use_cache": False} if model.can_generate() else {}))
    except _Reached:
        pass
    finally:
        hook.remove()
    return seen[0]
