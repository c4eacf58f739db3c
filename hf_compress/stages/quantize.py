"""Store the weights in fewer bits, in a container that plain from_pretrained opens."""

from __future__ import annotations

import inspect
import shutil
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_compress.backends import PartlyStored, backends, check_options, foresee, quantize
from hf_compress.calibration import tokens_in
from hf_compress.errors import CompressError, at, did_you_mean
from hf_compress.grids import Grid
from hf_compress.oneshot import Solver, compress_blocks, compress_checkpoint, empty_model, solvers
from hf_compress.oneshot.allocation import allocate
from hf_compress.oneshot.eora import Eora, correctable, write_adapter
from hf_compress.oneshot.mixed import check_overrides, given_grids
from hf_compress.oneshot.sensitivity import parts_of, sensitivities
from hf_compress.oneshot.smoothing import Smooth, folds_of, smooth
from hf_compress.oneshot.solvers import check_solver_options
from hf_compress.stages.base import CONTINUATIONS, Done, Stage, Work, check_continuations, facts_of_text
from hf_compress.weights import Weight, weights

FEWEST = 2  # bits
JUDGED = 8  # rows of text that say what a matrix is worth
OVERRIDDEN = "overridden"
ADAPTER = (
    "PeftModel.from_pretrained(model, FOLDER/adapter) adds the correction (with compressed-tensors after a first "
    "forward, before which its layers have no weight that peft looks for); the figures are those without it"
)


@dataclass
class Quantize(Stage):
    """``quantize: {backend: bitsandbytes, bits: 8}``"""

    backend: str = field(default="bitsandbytes", metadata={"help": "container: see `hf-compress list backends`"})
    bits: int = field(default=8, metadata={"help": "bits a weight"})
    group_size: int | None = field(
        default=None, metadata={"help": "weights that share a scale along the inputs; none = a whole row"}
    )
    overrides: dict[str, dict[str, int | None]] = field(
        default_factory=dict,
        metadata={
            "help": "regular expression -> bits, group_size or both of the weights it finds; the first one wins"
        },
    )
    budget: float | None = field(
        default=None,
        metadata={
            "help": "bits a weight on average, scales included (in float32 a scale for each 32 weights is one bit of "
            "them): matrices get 2 to `bits` each, more where rounding changes the answers most"
        },
    )
    smooth: Smooth | None = field(
        default=None,
        metadata={
            "help": "channels to divide where they are made and multiply where they are read, before rounding: "
            "{method: awq}, or {method: smoothquant, alpha: 0.5} for rounded activations"
        },
    )
    eora: Eora | None = field(
        default=None,
        metadata={"help": "write what rounding took away as a LoRA adapter beside the checkpoint: {rank: 32}"},
    )
    method: str | None = field(
        default=None,
        metadata={"help": "solver that rounds (see `hf-compress list solvers`); none = the container's own rounding"},
    )
    solver_options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "further options of the method (see `hf-compress list gptq`)"},
    )
    streaming: bool = field(
        default=False, metadata={"help": "read and write block by block; for models larger than memory"}
    )
    samples: int = field(default=128, metadata={"help": "rows of training text to calibrate on, if the method does"})
    continuations: int = field(default=0, metadata=CONTINUATIONS)
    options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "further options of the backend (see `hf-compress list bitsandbytes`)"},
    )
    min_coverage: float = field(
        default=0.99, metadata={"help": "fail when less of the weights, or of the experts, is stored in these bits"}
    )

    def check(self, work_kinds: list[str], *, where: str) -> None:
        with at(f"{where}.backend"):
            backends.entry(self.backend)
        check_options(self.backend, self.options, where=f"{where}.options")
        if self.samples < 1:
            raise CompressError(
                f"{self.samples} rows calibrate nothing", where=f"{where}.samples", next_step="128 rows are usual"
            )
        check_continuations(self.continuations, streaming=self.streaming, where=where)
        with at(f"{where}.{{}}"):
            self._check_bits()
        for key, wanted in (("smooth", self.smooth), ("eora", self.eora)):
            if wanted is None:
                continue
            wanted.check(where=f"{where}.{key}")
            if self.streaming or "grid" not in backends.entry(self.backend).traits:
                raise CompressError(
                    f"{key} needs the whole model in memory, and the grid of a container",
                    where=f"{where}.{key}",
                    next_step=f"leave streaming out, or {key}",
                )
        for key, asked, trait in (("method", self.method, "grid"), ("streaming", self.streaming, "packing")):
            if asked and trait not in backends.entry(self.backend).traits:
                able = ", ".join(entry.name for entry in backends if trait in entry.traits)
                raise CompressError(
                    f"{self.backend} rounds the whole model at once, by itself",
                    where=f"{where}.{key}",
                    next_step=f"leave it out, or use a backend that takes it: {able}",
                )
        if self.method is not None:
            makers = [entry.name for entry in solvers if entry.traits["makes"] == "codes"]
            if self.method not in makers:
                raise CompressError(
                    f"no solver {self.method!r} for quantization",
                    where=f"{where}.method",
                    next_step=did_you_mean(self.method, makers),
                )
        if self.solver_options and self.method is None:
            raise CompressError(
                "solver_options are those of a method, and none is given",
                where=f"{where}.solver_options",
                next_step="method: gptq (see `hf-compress list solvers`), or leave solver_options out",
            )
        check_solver_options(self.method or "rtn", self.solver_options, where=f"{where}.solver_options")
        if "quantize" in work_kinds:
            raise CompressError("the weights are quantized already", where=where, next_step="keep one quantize stage")

    def _check_bits(self) -> None:
        check, scheme = (
            backends.entry(self.backend).traits["check"],
            {"bits": self.bits, "group_size": self.group_size},
        )
        check(**scheme, **self.options)
        for key, asked in (("overrides", self.overrides), ("budget", self.budget is not None)):
            if asked and "grids" not in inspect.signature(backends[self.backend]).parameters:
                raise CompressError(
                    f"{self.backend} has one scheme for a whole model",
                    where=key,
                    next_step="leave it out, or use backend: compressed-tensors",
                )
        if self.budget is not None:
            if self.streaming:
                raise CompressError(
                    "what each matrix is worth is measured on the whole model in memory",
                    where="budget",
                    next_step="leave streaming out, or give overrides instead of a budget",
                )
            check(**scheme, **self.options, grids={"budget": replace(self._grid, bits=FEWEST)})
        check_overrides(self.overrides, where="overrides")
        for pattern, own in self.overrides.items():
            with at(f"overrides: {pattern!r}: {{}}"):
                check(**(scheme | own), **self.options)

    def scheme(self, model: PreTrainedModel) -> dict[str, Any]:
        """bits, group_size and, where some weights of `model` have others, grids: what the backend and its traits are
        called with beside `options`. With a budget, the most that a weight may get.

        Raises:
            CompressError: an expression that finds no weight (did you mean); a model that cannot be smoothed; a budget
            that is below the least or above the most.
        """
        if self.smooth is not None:
            folds_of(model, 0)
        scheme: dict[str, Any] = {"bits": self.bits, "group_size": self.group_size}
        if self.overrides:
            names = [w.name for w in weights(model)]
            own = given_grids(names, self.overrides, self._grid, where="quantize.overrides")
            scheme["grids"] = own
        if self.budget is not None:
            sizes = self._sizes(model, scheme)
            count = self._stored(model, scheme)
            least, most = (sum(end(each.values()) for each in sizes.values()) / max(1, count) for end in (min, max))
            if not self.budget >= least:  # NaN too
                raise CompressError(
                    f"the budget {self.budget:g} is below the least that all matrices need, {least:.2f} bits a weight "
                    "with scales",
                    where="quantize.budget",
                    next_step="raise the budget, use larger groups, or fewer bits in overrides",
                )
            if self.budget > most:
                raise CompressError(
                    f"the budget {self.budget:g} is above what all matrices take with {self.bits} bits, {most:.2f} "
                    "bits a weight with scales: nothing is left to choose",
                    where="quantize.budget",
                    next_step="lower the budget, raise bits (the most that a matrix may get), or leave budget out",
                )
        return scheme

    def _stored(self, model: PreTrainedModel, scheme: dict[str, Any]) -> int:
        """Weights that the container stores in fewer bits."""
        stores = backends.entry(self.backend).traits["stores"]
        return sum(
            w.shape[0] * w.shape[1] for w in weights(model) if not isinstance(stores(w, **scheme, **self.options), str)
        )

    def _sizes(self, model: PreTrainedModel, scheme: dict[str, Any]) -> dict[str, dict[int, float]]:
        """Part -> bits -> bits on disk, scales included, of each choice. What is overridden is one part, without a
        choice; what the container leaves as it is counts nowhere."""
        stores, fixed = backends.entry(self.backend).traits["stores"], scheme.get("grids", {})

        def size(members: list[Weight], bits: int) -> float:
            grids = {w.name: replace(self._grid, bits=bits) for w in members} | fixed
            sizes = [stores(w, **(scheme | {"grids": grids}), **self.options) for w in members]
            return float(sum(8 * each for each in sizes if not isinstance(each, str)))

        choices = range(FEWEST, self.bits + 1)
        found = {part: {b: size(members, b) for b in choices} for part, members in _free(model, fixed).items()}
        found[OVERRIDDEN] = {self.bits: size([w for w in weights(model) if w.name in fixed], self.bits)}
        return {part: each for part, each in found.items() if each[self.bits]}

    def _allocate(self, work: Work, scheme: dict[str, Any]) -> dict[str, Any]:
        """Put grids within the budget into `scheme`; facts of the choice."""
        assert self.budget is not None
        model, sizes, fixed = work.model, self._sizes(work.model, scheme), scheme.get("grids", {})
        parts = {name: members for name, members in _free(model, fixed).items() if name in sizes}
        grids = {bits: replace(self._grid, bits=bits) for bits in range(FEWEST, self.bits + 1)}
        batches = work.calibration(model.config.vocab_size, min(self.samples, JUDGED))
        losses = sensitivities(model, batches, parts, grids, cache=work.folder.parent)
        count = self._stored(model, scheme)
        chosen = allocate(losses | {OVERRIDDEN: {self.bits: 0.0}}, sizes, self.budget * count)
        scheme["grids"] = {w.name: grids[chosen[name]] for name, members in parts.items() for w in members} | fixed
        average = sum(sizes[name][bits] for name, bits in chosen.items()) / count
        chosen.pop(OVERRIDDEN, None)
        kl = sum(losses[name][bits] for name, bits in chosen.items())
        read = tokens_in(batches)
        return {"budget": self.budget, "average_bits": average, "sum_of_kl": kl, "tokens": read, "bits": chosen}

    @property
    def _grid(self) -> Grid:
        found: Grid = backends.entry(self.backend).traits["grid"](
            bits=self.bits, group_size=self.group_size, **self.options
        )
        return found

    def _rounding(self, scheme: dict[str, Any], default: str) -> Solver:
        return solvers[self.method or default](grid=self._grid, grids=scheme.get("grids"), **self.solver_options)

    def calibrates(self, model: PreTrainedModel) -> bool:
        asked = (self.smooth, self.eora, backends.entry(self.backend).traits.get("environment"))
        return any(each is not None for each in asked) or (
            self.method is not None and self._rounding({}, self.method).reads_text
        )

    def needs_text(self, model: PreTrainedModel) -> bool:
        return self.budget is not None or self.calibrates(model)

    def run(self, work: Work) -> Done:
        saved = work.folder / "quantized"
        shutil.rmtree(saved, ignore_errors=True)  # of a run that stopped between writing it and taking it over
        where = f"quantize ({self.backend}, {self.bits} bits)"
        traits = backends.entry(self.backend).traits
        if self.streaming:
            empty = empty_model(Path(work.checkpoint))
            scheme = self.scheme(empty)
            solver = self._rounding(scheme, "rtn")
            packing = traits["packing"](empty, **scheme, **self.options)
            batches = work.calibration(empty.config.vocab_size, self.samples) if self.calibrates(empty) else []
            foreseen = foresee(empty, self.backend, **scheme, **self.options)
            foreseen.coverage.require(self.min_coverage, where=where)
            only = [w.name for w in weights(empty) if w.name not in foreseen.reasons]
            report, _ = compress_checkpoint(
                Path(work.checkpoint), saved, batches, solver, only=only, container=packing
            )
            facts = report.facts() | (facts_of_text(batches, 0) if batches else {})
            facts["notes"] = packing.notes + facts.get("notes", [])
            facts["warning"] = _both(report.warning, packing.warning)
            return Done(None, facts, foreseen.coverage, saved, quantized=self.backend)
        scheme = self.scheme(work.model)
        scales, facts = work.scales if "grid" in traits and not self._grid.pinned else None, {}
        if self.budget is not None:
            facts["allocation"] = self._allocate(work, scheme)
        ours = self.method or ("rtn" if self.eora is not None else None)
        rounding = None if ours is None else self._rounding(scheme, ours)
        text = self.calibrates(work.model)
        vocabulary = work.model.config.vocab_size
        batches = work.calibration(vocabulary, self.samples, self.continuations) if text else []
        facts |= facts_of_text(batches, self.continuations) if text else {}
        foreseen = foresee(work.model, self.backend, **scheme, **self.options)
        only = [w.name for w in weights(work.model) if w.name not in foreseen.reasons]
        if self.smooth is not None:
            own = scheme.get("grids")
            facts["smooth"] = smooth(work.model, batches, self.smooth, self._grid, grids=own, only=only)
        corrected = correctable(work.model, only) if self.eora is not None else []
        dense = {weight.name: weight.matrix.clone() for weight in corrected}
        if rounding is not None:
            report = compress_blocks(work.model, batches, rounding, only=only, resume_dir=work.folder / "blocks")
            scales, facts = report.scales, facts | report.facts()
        extras: dict[str, Path] = {}
        if self.eora is not None:
            extras["adapter"] = work.folder / "adapter"
            shutil.rmtree(extras["adapter"], ignore_errors=True)
            facts["eora"] = write_adapter(
                work.model, batches, dense, extras["adapter"], rank=self.eora.rank, left=len(only) - len(dense)
            )
            del dense
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PartlyStored)
            written = quantize(
                work.model,
                saved,
                backend=self.backend,
                tokenizer=work.tokenizer,
                scales=scales,
                batches=batches,
                say=work.say,
                **scheme,
                **self.options,
            )
        written.coverage.require(self.min_coverage, where=where)
        notes = facts.pop("notes", []) + written.notes + ([ADAPTER] if extras else [])
        facts |= written.facts | {"notes": notes, "warning": _both(facts.get("warning", ""), written.warning)}
        return Done(written.model, facts, written.coverage, saved, extras, quantized=self.backend)


def _both(*warnings: str) -> str:
    return "; ".join(filter(None, warnings))


def _free(model: PreTrainedModel, fixed: dict[str, Grid]) -> dict[str, list[Weight]]:
    """`parts_of` what is not in `fixed`, by name."""
    parts = {name: [w for w in members if w.name not in fixed] for name, members in parts_of(model).items()}
    return {name: members for name, members in parts.items() if members}
