"""Divide a channel where it is made, multiply it where it is read: the model answers as before and rounds better."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.calibration import Batch
from hf_compress.criteria import Statistics
from hf_compress.errors import CompressError, did_you_mean
from hf_compress.families import family_of
from hf_compress.grids import Grid, fake_quantize, spanning
from hf_compress.oneshot.engine import run_blocks
from hf_compress.oneshot.memory import InMemory
from hf_compress.oneshot.order import local_name
from hf_compress.oneshot.solvers import Solved, Solver
from hf_compress.weights import COMPRESSIBLE, Weight, blocks_of, weights

ROWS = 256  # of a matrix that the search looks at
EXPONENTS = tuple(step / 20 for step in range(21))
ALPHA = 0.5
METHODS = {"awq": ("input_norm", "hessian"), "smoothquant": ("input_max",)}


@dataclass
class Smooth:
    """``smooth: {method: awq}``"""

    method: str = field(
        default="awq",
        metadata={"help": "awq (exponents searched for the rounded weights) or smoothquant (for rounded activations)"},
    )
    alpha: float | None = field(
        default=None, metadata={"help": "smoothquant: how much of the range goes to the weights; none: a half"}
    )

    def check(self, *, where: str) -> None:
        if self.method not in METHODS:
            raise CompressError(
                f"unknown method {self.method!r}",
                where=f"{where}.method",
                next_step=did_you_mean(self.method, METHODS),
            )
        if self.alpha is None:
            return
        if self.method != "smoothquant":
            raise CompressError(
                f"{self.method} searches its exponents and reads no alpha",
                where=f"{where}.alpha",
                next_step="leave it out, or method: smoothquant",
            )
        if not 0 <= self.alpha <= 1:
            raise CompressError(f"alpha {self.alpha:g} is not within 0 and 1", where=f"{where}.alpha")


def smoothquant(largest_input: Tensor, largest_weight: Tensor, alpha: float) -> Tensor:
    """s_j = max |X_j|^alpha / max |W_j|^(1 - alpha), (in,) each: what input j is divided by.

    Xiao et al. 2022, https://arxiv.org/abs/2211.10438.
    """
    return _positive(largest_input).pow(alpha) / _positive(largest_weight).pow(1 - alpha)


def awq(size: Tensor, exponent: float) -> Tensor:
    """s_j = x_j^a over the geometric mean of its largest and smallest, x_j the size of input j, (in,); a = 0: all 1.

    Lin et al. 2023, https://arxiv.org/abs/2306.00978, whose x_j is the mean of |x_j|; here it is the root of the mean
    square, which every other solver reads too.
    """
    found = _positive(size).pow(exponent)
    return found / (found.max() * found.min()).sqrt()


def rounded_error(matrix: Tensor, hessian: Tensor, s: Tensor, grid: Grid) -> Tensor:
    """tr(E H E^T), E = Q(W diag(s)) diag(1/s) - W: what rounding to the nearest does to the outputs, W (out, in)."""
    wide = matrix.float() * s
    scale, zero = spanning(wide, grid)
    error = fake_quantize(wide, grid.stored(scale), grid, zero).float() / s - matrix
    return (error @ hessian * error).sum()


def _positive(size: Tensor) -> Tensor:
    """Inputs that are never seen count as small ones; where none are, all alike."""
    top = size.max()
    return size.float().clamp_min(float(top) * 1e-5) if top > 0 else torch.ones_like(size, dtype=torch.float32)


@dataclass(eq=False)
class Fold:
    """Channels that `source` makes and `readers` read.

    source: what is divided, (channels, ...) views of live parameters. readers: what is multiplied, (out, in) each.
    reads: (in,), the channel that each input is; values of attention heads are read by several query heads.
    """

    source: list[Tensor]
    readers: list[Weight]
    reads: Tensor

    def apply(self, s: Tensor) -> None:
        """s: (channels,)."""
        for made in self.source:
            made.copy_(made.float() / s.view(-1, *[1] * (made.dim() - 1)))
        for reader in self.readers:
            reader.matrix.copy_(reader.matrix.float() * s[self.reads])

    def per_channel(self, inputs: Tensor, *, largest: bool) -> Tensor:
        """(in,) -> (channels,): the mean, or the largest, over the inputs that are one channel."""
        out = inputs.new_zeros(int(self.reads.max()) + 1)
        return out.scatter_reduce(0, self.reads, inputs, "amax" if largest else "mean", include_self=False)


def folds_of(model: PreTrainedModel, block: int) -> list[Fold]:
    """Every place of a block where a channel can be divided and multiplied again without changing what it answers:
    norms before matrices (a norm before experts feeds its router and the shared experts too, all are multiplied), the
    values before the attention's output, and, where the FFN is gated, the factor that is not activated before ``down``
    (of each expert).

    Raises:
        CompressError: the family has none (post-norm: norms feed the residual stream too).
    """
    family, module = family_of(model.config), blocks_of(model)[block]
    if not any(family.scaled_by):
        raise CompressError(
            f"in {family.name} models no norm feeds matrices alone: the residual stream reads it too",
            where="smooth",
            next_step="leave smooth out",
        )
    found = {w: local_name(family, w) for w in weights(model, (*COMPRESSIBLE, "router")) if w.block == block}
    up_half = len(family.up) == 2
    folds: list[Fold] = []
    for names, source in zip((*family.attention, family.up), family.scaled_by, strict=True):
        readers = [w for w, name in found.items() if name in names]
        if names is family.up:
            readers += [w for w in found if _reads_ffn_input(w, family.down, family.experts)]
        if source and readers:
            folds.append(_fold(model, module.get_submodule(source), readers))
    ups = {w: name for w, name in found.items() if up_half and name == family.up[-1]}
    for up in ups:
        folds.append(_fold(model, up.module, [w for w, name in found.items() if name == family.down]))
    shared = [w for w in found if w.kind == "shared_expert"]
    for up in (w for w in shared if w.module_name.endswith("." + family.up[-1].rpartition(".")[2])):
        down = [w for w in shared if w.module_name.endswith("." + family.down.rpartition(".")[2])]
        folds.append(_fold(model, up.module, down))
    if family.experts is not None:
        stacked = {(w.attribute, w.expert): w for w in found if w.kind == "expert"}
        for (attribute, expert), weight in stacked.items():
            if attribute == family.experts.gate_up:
                down = [stacked[family.experts.down, expert]]
                reads = torch.arange(down[0].shape[1], device=weight.whole.device)
                folds.append(Fold([weight.matrix.chunk(2)[1]], down, reads))
    return folds


def _reads_ffn_input(weight: Weight, down: str, experts: Any) -> bool:
    if weight.kind == "expert":
        return bool(weight.attribute == experts.gate_up)
    last = weight.module_name.rpartition(".")[2]
    return weight.kind == "router" or (weight.kind == "shared_expert" and last != down.rpartition(".")[2])


def _fold(model: PreTrainedModel, source: nn.Module, readers: list[Weight]) -> Fold:
    made = [p.data for name in ("weight", "bias") if (p := source._parameters.get(name)) is not None]
    channels, width = len(made[0]), readers[0].shape[1]
    if channels == width:
        return Fold(made, readers, torch.arange(width, device=made[0].device))
    config: Any = model.config  # values of a head are read by as many query heads as share it
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = torch.arange(channels, device=made[0].device).view(-1, 1, size)
    return Fold(made, readers, heads.expand(-1, width // channels, -1).flatten())


@torch.no_grad()
def smooth(
    model: PreTrainedModel,
    batches: list[Batch],
    how: Smooth,
    grid: Grid,
    *,
    grids: Mapping[str, Grid] | None = None,
    only: Collection[str] | None = None,
) -> dict[str, Any]:
    """Choose and apply s for every `Fold`, in place; logits stay what they were. Facts of what was done.

    awq: of `EXPONENTS`, the one with the least `rounded_error`, summed over what reads the channels and will be
    rounded (`only`, by name; None: all). Rows of routed experts count as often as they are called, times their gates.

    Raises:
        CompressError: as `folds_of` and `run_blocks`; no batches.
    """
    alpha = ALPHA if how.alpha is None else how.alpha
    chosen: list[tuple[Fold, Tensor]] = []
    exponents: list[float] = []
    seen: dict[str, tuple[Weight, Statistics]] = {}

    def close() -> None:
        for fold in folds_of(model, min(w.block or 0 for w, _ in seen.values())):
            known = [seen[w.name] for w in fold.readers if w.name in seen]
            if known and how.method == "awq":
                exponent, s = _search(fold, known, grid, grids or {})
                exponents.append(exponent)
                chosen.append((fold, s))
            elif known:
                inputs = torch.stack([st.input_max for _, st in known if st.input_max is not None]).amax(0)
                outputs = torch.stack([w.matrix.abs().amax(0).float() for w, _ in known]).amax(0)
                x, w = (fold.per_channel(each, largest=True) for each in (inputs, outputs))
                chosen.append((fold, smoothquant(x, w, alpha)))
        seen.clear()

    def look(group: Sequence[Weight], statistics: Statistics) -> list[Solved]:
        if seen and next(iter(seen.values()))[0].block != group[0].block:
            close()
        seen.update({weight.name: (weight, statistics) for weight in group})
        return [Solved(weight.matrix) for weight in group]

    run_blocks(model, batches, Solver(look, METHODS[how.method]), InMemory(model, None, ""), only=only)
    if seen:
        close()
    for fold, s in chosen:
        fold.apply(s)
    facts: dict[str, Any] = {"method": how.method, "folds": len(chosen)}
    return facts | ({"mean_exponent": sum(exponents) / len(exponents)} if exponents else {"alpha": alpha})


def _search(
    fold: Fold, known: list[tuple[Weight, Statistics]], grid: Grid, grids: Mapping[str, Grid]
) -> tuple[float, Tensor]:
    inputs = {id(st): st for _, st in known}.values()
    square = torch.stack([st.input_norm for st in inputs if st.input_norm is not None]).square().sum(0)
    size = fold.per_channel(square, largest=False).sqrt()
    best: tuple[float, float, Tensor] | None = None
    for exponent in EXPONENTS:
        s = awq(size, exponent)
        error = 0.0
        for weight, statistics in known:
            assert statistics.hessian is not None
            rows = weight.matrix[:: -(-weight.shape[0] // ROWS)]
            share = weight.shape[0] / len(rows)
            own = grids.get(weight.name, grid)
            error += share * float(rounded_error(rows, statistics.hessian, s[fold.reads], own))
        if best is None or error < best[0]:
            best = error, exponent, s
    assert best is not None
    return best[1:]
