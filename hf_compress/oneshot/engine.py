"""The loop over blocks: gather statistics, compress, run again for the next block's inputs."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from hf_compress.allocator import trim
from hf_compress.calibration import Batch, cut, tokens_in
from hf_compress.criteria import Statistics
from hf_compress.errors import CompressError
from hf_compress.oneshot.calls import Block, Call, first_call, halve
from hf_compress.oneshot.gather import Reading, StageStatistics, read, without_padding
from hf_compress.oneshot.order import InputGroup, stages_of
from hf_compress.oneshot.solvers import Solved, Solver
from hf_compress.oneshot.tuning import STEP_TOKENS, STEPS, Rounded, Tuning, tune
from hf_compress.weights import Weight, blocks_of, require_finite, weights

FEWEST = 0.25  # tokens for each input, below which nothing is fitted


@dataclass
class Notes:
    """What a block's turn says beside its values: see `OneshotReport`."""

    starved: dict[str, int] = field(default_factory=dict)
    scarce: dict[str, float] = field(default_factory=dict)


class Store(Protocol):
    """Where blocks live between their turns: in memory, or on disk.

    scales: weight name -> the scale its solver chose, of the blocks that are live.
    """

    scales: dict[str, Tensor]

    def blocks_only(self) -> None:
        """What is outside the blocks has run for the last time."""

    def finished(self, block: int) -> bool:
        """Whether it was compressed before (an interrupted run goes on)."""

    def load(self, block: int) -> None:
        """Make the block's dense values live."""

    def restore(self, block: int) -> Notes:
        """Make a finished block's compressed values (and scales) live; what was noted of it."""

    def save(self, block: int, notes: Notes) -> None:
        """Keep the compressed block, and let go of its memory where that is the point."""


@dataclass
class OneshotReport:
    """touched: names. sparsity: share of zeros of each touched weight. starved: expert weight -> tokens it saw (fewer
    than 32). scarce: matrix -> tokens seen for each of its inputs, where that is below 1 and a solver fitted values
    to them. scales: of the weights whose solver chose a grid, where the model stays in memory. dropped: tensors of a
    checkpoint that were not taken over, since transformers opens the model without them."""

    touched: list[str] = field(default_factory=list)
    sparsity: dict[str, float] = field(default_factory=dict)
    starved: dict[str, int] = field(default_factory=dict)
    scarce: dict[str, float] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)

    @property
    def warning(self) -> str:
        """What a person should hear of `scarce`; "" where there is none."""
        if not self.scarce:
            return ""
        least = min(self.scarce, key=self.scarce.__getitem__)
        return (
            f"{len(self.scarce)} of {len(self.touched)} matrices were refitted on fewer calibration tokens than they "
            f"have inputs (least: {self.scarce[least]:.2f} for each input of {least}): give more rows, or let the "
            "model write some (continuations)"
        )

    def facts(self) -> dict[str, Any]:
        mean = sum(self.sparsity.values()) / max(1, len(self.sparsity))
        return {
            "weights": len(self.touched),
            "mean_sparsity": mean,
            "starved_experts": self.starved,
            "scarce_inputs": self.scarce,
            "warning": self.warning,
        } | ({"notes": [self._note()]} if self.dropped else {})

    def _note(self) -> str:
        return (
            f"{len(self.dropped)} tensors of the source, such as {self.dropped[0]}, are not here: transformers does "
            "not load them either"
        )


@torch.no_grad()
def run_blocks(
    model: PreTrainedModel, batches: list[Batch], solver: Solver, store: Store, *, only: Collection[str] | None = None
) -> OneshotReport:
    """Compress every block matrix of `model` (or `only` these, by name) in place, in order.

    For each block: the batches run through it until every matrix of a stage has been reached (a stage is the whole
    block unless the solver is `staged`), `solver` gives each matrix its new values, what is left is tuned together
    where the solver asks for it (`tune`), and a last pass through the compressed block makes the inputs of the next.
    A solver that asks for ``drift``, or tunes, follows the dense model: a second stream of activations. A solver that
    needs no statistics runs without any pass. Text runs as `calibrating` says, and for one that tunes in the caller's
    batches cut to `STEP_TOKENS`, or to as few as make `STEPS` of them: a step a batch.

    Memory: one block (what `store` keeps live), the activations of all batches (of both streams, and what each matrix
    of the block reads in the dense one, when asked for, with a copy of its experts' first matrices), the statistics
    of one stage (in a staged solver, of one expert and its layer's sum), then what `tune` says.

    Raises:
        CompressError: before any work: no batches for a solver that needs statistics; far fewer tokens than a matrix
        has inputs, for one that fits values to them; layers that take different masks (sliding windows). Then:
        activations that are not finite (naming the block).
    """
    if solver.reads_text and not batches:
        raise CompressError("there is nothing to calibrate on", where="one-shot compression", next_step="give batches")
    batches = batches if solver.reads_text else []
    if solver.tuning is not None:
        batches = cut(batches, min(STEP_TOKENS, sum(b["input_ids"].numel() for b in batches) // STEPS))
    if batches and (mixed := mixed_layers(model.config)):
        raise CompressError(mixed, where="config.layer_types", next_step="use a model without sliding-window layers")
    blocks = blocks_of(model)
    wanted = None if only is None else set(only)
    by_block: dict[int, list[Weight]] = {index: [] for index in range(len(blocks))}
    for weight in weights(model):
        assert weight.block is not None
        if wanted is None or weight.name in wanted:
            by_block[weight.block].append(weight)
    if solver.refits:
        _require_tokens(batches, [w for found in by_block.values() for w in found if w.expert is None])
    model.eval()
    calls = [first_call(model, blocks[0], batch) for batch in batches]
    store.blocks_only()
    halve(calls, batches)
    for call in calls:
        call.dense = call.hidden if solver.follows_dense else None
    report = OneshotReport()
    for index in tqdm(range(len(blocks)), desc="blocks", unit="block"):
        finished = store.finished(index)
        if solver.follows_dense or not finished:
            store.load(index)
            require_finite(by_block[index])
        turn = _Turn(model, index, by_block[index], solver, calls)
        if solver.follows_dense:
            turn.run_dense(keep="drift" in solver.needs and not finished)
            trim()
        if finished:
            turn.notes = store.restore(index)
        else:
            for stage in turn.stages:
                store.scales |= turn.compress(stage)
                trim()
            if solver.tuning is not None:
                store.scales |= turn.tune(by_block[index], solver.tuning)
        for weight in by_block[index]:
            report.touched.append(weight.name)
            report.sparsity[weight.name] = float((weight.matrix == 0).float().mean())
        report.starved |= turn.notes.starved
        report.scarce |= turn.notes.scarce
        turn.advance()
        store.save(index, turn.notes)
        trim()
    report.scales = store.scales
    return report


def mixed_layers(config: PreTrainedConfig) -> str:
    """Why blocks of such a model cannot be run one by one on the same masks; "" when they can."""
    alike = len(set(getattr(config, "layer_types", None) or ["same"])) == 1
    return "" if alike else "blocks of this model take different attention masks"


def _require_tokens(batches: list[Batch], found: list[Weight]) -> None:
    """Values fitted to few tokens fit those and no others: below one for each input they do worse than a mask alone on
    text that was not seen (an expert's statistics are drawn toward its layer's, so it is only named)."""
    tokens, widest = tokens_in(batches), max(found, key=lambda w: w.shape[1], default=None)
    if widest is not None and tokens < FEWEST * widest.shape[1]:
        raise CompressError(
            f"{tokens} calibration tokens are too few to refit {widest.shape[1]} inputs",
            where=widest.name,
            next_step=f"give more or longer rows: {2 * widest.shape[1]} tokens are good, under "
            f"{math.ceil(FEWEST * widest.shape[1])} refused; or a method that refits nothing",
        )


class _Turn:
    """One block's turn."""

    def __init__(self, model: PreTrainedModel, index: int, found: list[Weight], solver: Solver, calls: list[Call]):
        self.solver, self.calls = solver, calls
        self.block = Block(model, index)
        stages = stages_of(model, found)
        self.stages = stages if solver.staged else [[group for stage in stages for group in stage]]
        self.dense: list[Reading] = [{} for _ in calls]
        self.dense_gate_up: dict[nn.Module, Tensor] = {}
        self.notes = Notes()
        self._rounded: dict[str, Rounded] = {}
        self._residuals = {
            group: self.block.module.get_submodule(group.residual)
            for stage in stages
            for group in stage
            if group.residual and "drift" in solver.needs
        }

    def run_dense(self, *, keep: bool) -> None:
        """The dense model's stream through this block, which is still dense; `keep` what its matrices read, in
        bfloat16 where that is shorter: rows that are only multiplied with others and summed."""
        modules = {g.first.module for stage in self.stages for g in stage} | set(self._residuals.values())
        for call, dense in zip(self.calls, self.dense, strict=True):
            out: list[Tensor] = []
            run = partial(self._dense_into, call, out)
            seen = without_padding(read(run, modules if keep else (), leave=False), call.keep)
            for module, (rows, *_) in seen.items():
                dense[module] = (rows.to(torch.bfloat16) if rows.element_size() > 2 else rows,)
            call.dense = out[0]
        for group in (g for stage in self.stages for g in stage if g.gate_up and keep):
            module = group.first.module
            if module not in self.dense_gate_up:
                self.dense_gate_up[module] = module.get_parameter(group.gate_up).detach().clone()

    def _dense_into(self, call: Call, out: list[Tensor]) -> None:
        assert call.dense is not None
        out.append(self.block.whole(call, call.dense))

    def compress(self, stage: list[InputGroup]) -> dict[str, Tensor]:
        """Solve the matrices of one stage in place; name -> scale of those whose solver chose a grid."""
        found = StageStatistics(stage, frozenset(self.solver.needs), self.dense_gate_up)
        modules, streams = self._read_by(stage)
        later = [self._read_by(other) for other in self.stages[self.stages.index(stage) + 1 :]]
        done = (modules | streams).difference(*(more for both in later for more in both))
        writes = self.solver.staged and self.block.ends_attention(stage)
        written: list[Tensor] = []
        for call, dense in zip(self.calls, self.dense, strict=True):
            seen = read(partial(self.block, call), modules | streams, leave=True)
            if writes:
                written.append(seen[stage[0].first.module][0])
            found.add(without_padding(seen, call.keep), call.fold, dense, self._residuals)
            for module in done:  # together they are larger than all else that is held here
                dense.pop(module, None)
        trim()
        self.notes.starved |= found.starved if self.calls else {}
        # a solver that is not staged compares matrices as they were before any of the block was changed
        known = [found.of(group) if self.calls else Statistics() for group in stage if not self.solver.staged]
        scales: dict[str, Tensor] = {}
        for number, group in enumerate(stage):
            statistics = found.of(group) if self.solver.staged else known[number]
            if self.solver.refits:
                self._note_tokens(group, statistics)
            for weight, solved in zip(group.weights, self._solved(group, statistics), strict=True):
                weight.matrix.copy_(solved.values)
                if solved.scale is not None:
                    scales[weight.name] = solved.scale
                    if solved.ratio is not None:
                        self._rounded[weight.name] = Rounded(solved.scale, solved.ratio)
        for call in self.calls if writes else []:
            call.middle = self.block.after_attention(call, stage[0].first.module, written.pop(0))
        return scales

    def _read_by(self, stage: list[InputGroup]) -> tuple[set[nn.Module], set[nn.Module]]:
        """The modules whose inputs a stage reads: of its matrices, and where the stream can be seen."""
        streams = {self._residuals[group] for group in stage if group in self._residuals}
        return {group.first.module for group in stage}, streams

    def _solved(self, group: InputGroup, statistics: Statistics) -> list[Solved]:
        try:
            return self.solver.solve(group.weights, statistics)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise CompressError(
                f"the statistics of its input cannot be factorised: {error}",
                where=group.first.name,
                next_step="give more calibration text, or look for inputs that are all but constant",
            ) from error

    def _note_tokens(self, group: InputGroup, statistics: Statistics) -> None:
        share = statistics.tokens / group.first.shape[1]
        if share < 1:
            self.notes.scarce |= {weight.name: round(share, 3) for weight in group.weights}

    def tune(self, found: list[Weight], tuning: Tuning) -> dict[str, Tensor]:
        """Let what is left of the block's matrices move together toward the dense block's outputs; name -> scale of
        those on a grid."""
        rounded, self._rounded = self._rounded, {}
        self.dense_gate_up.clear()
        if found:
            tune(self.block, self.calls, found, tuning, rounded if tuning.grid is not None else None)
        for call in self.calls:
            call.middle = None
        return {name: each.scale for name, each in rounded.items()}

    def advance(self) -> None:
        """The compressed stream goes through the block."""
        for call in self.calls:
            call.hidden = self.block(call)
            call.middle = None
