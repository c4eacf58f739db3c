"""Which options of `QAT` go together, and which containers store what they make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_compress.bnb_guard import BLOCK
from hf_compress.errors import CompressError, did_you_mean
from hf_compress.grids import KINDS
from hf_compress.observers import OBSERVERS
from hf_compress.techniques.schedule import parse_when

if TYPE_CHECKING:
    from hf_compress.techniques.qat import QAT


@dataclass(frozen=True)
class Method:
    """learns: scales train, in steps of their own; else they follow the largest weight. fixed: the levels stay."""

    paper: str
    learns: bool = False
    fixed: bool = False


METHODS = {
    "ste": Method("https://arxiv.org/abs/1308.3432"),
    "lsq": Method("https://arxiv.org/abs/1902.08153", learns=True),
    "scales": Method("https://arxiv.org/abs/2407.11062", learns=True, fixed=True),
}
SCALE_STARTS = ("search", "mean")
STARTS = ("dense", "gptq")
RANGES = ("token", *OBSERVERS)


def check_options(options: QAT) -> None:
    """Raise a CompressError, at the recipe key, for values that do not exist or do not go together."""
    known_words = {"kind": KINDS, "method": METHODS, "ranges": RANGES, "scale_start": SCALE_STARTS, "start": STARTS}
    for key, known in known_words.items():
        given = getattr(options, key)
        if given not in known:
            raise CompressError(
                f"unknown {key} {given!r}", where=f"qat.{key}", next_step=did_you_mean(str(given), known)
            )
    for key in ("bits", "group_size", "activations", "samples", "continuations", "start_epochs"):
        given = getattr(options, key)
        if type(given) is not int and (given is not None or key not in ("group_size", "activations")):
            raise CompressError(f"{given!r} is no whole number", where=f"qat.{key}", next_step="leave out quotes")
    number, unit = parse_when(options.begin, where="qat.begin")
    frozen = None if options.freeze_after is None else parse_when(options.freeze_after, where="qat.freeze_after")
    acts, solved, fixed = options.activations, options.start == "gptq", METHODS[options.method].fixed
    wrong = {
        (f"{options.bits} bits are not between 2 and 8", "bits"): not 2 <= options.bits <= 8,
        (f"{options.kind} has 4 bits", "bits"): options.kind in ("nf4", "fp4") and options.bits != 4,
        (f"group size {options.group_size} is not positive", "group_size"): options.group_size is not None
        and options.group_size < 1,
        (f"{acts} bits are not between 2 and 8", "activations"): acts is not None and not 2 <= acts <= 8,
        ("ranges are of activations, and those are not rounded", "ranges"): acts is None and options.ranges != "token",
        (f"{options.percentile} is no percentage above 50", "percentile"): not 50 < options.percentile <= 100,
        ("it begins where the run ends", "begin"): (number, unit) == (1, "share"),
        ("`method: scales` chooses codes where training begins; leave begin out", "begin"): fixed and number != 0,
        ("`method: scales` trains nothing of them that could freeze; leave freeze_after out", "freeze_after"): fixed
        and frozen is not None,
        ("codes that stay would stay at scales that are to be learned", "scale_start"): fixed
        and options.scale_start != "search",
        ("the ranges freeze before rounding begins", "freeze_after"): frozen is not None
        and frozen[1] == unit
        and frozen[0] <= number,
        (f"a rate of {options.scale_rate} does not train", "scale_rate"): options.scale_rate <= 0,
        (f"{options.samples} rows are none to calibrate on", "samples"): options.samples < 1,
        ("only `start: gptq` reads rows", "samples"): not solved and options.samples != type(options).samples,
        (f"{options.continuations} rows cannot be written", "continuations"): options.continuations < 0,
        ("only `start: gptq` reads rows", "continuations"): not solved and options.continuations > 0,
        (f"{options.start_epochs} passes cannot be made", "start_epochs"): options.start_epochs < 0,
        ("these are passes of `start: gptq`, which is not asked for", "start_epochs"): not solved
        and options.start_epochs > 0,
        (f"gptq has no form for {options.kind}", "start"): solved and options.kind not in ("int", "nf4", "fp4"),
        ("ste would find other scales than gptq chose; method: lsq and scales keep them", "start"): solved
        and options.kind == "int"
        and not METHODS[options.method].learns,
        ("training begins with gptq's scales, so this would do nothing", "scale_start"): solved
        and options.scale_start != "search",
    }
    for (what, where), is_so in wrong.items():
        if is_so:
            raise CompressError(what, where=f"qat.{where}", next_step="see `hf-compress list qat`")


def check_beside(options: QAT, *, pruned: bool, adapted: bool) -> None:
    """Raise a CompressError for what does not go together with pruning, or LoRA adapters, in one run."""
    if adapted and options.start == "gptq":
        raise CompressError(
            "gptq would round the base of the adapters, and what trains is W + BA",
            where="qat.start",
            next_step="train whole weights, or leave start out",
        )
    if adapted and METHODS[options.method].fixed:
        raise CompressError(
            "adapters would move W + BA off the codes, and those stay",
            where="qat.method",
            next_step="method: lsq, or train without lora",
        )
    if pruned and METHODS[options.method].fixed:
        raise CompressError(
            "the weights stay as they begin, and pruning would choose among them as they train",
            where="qat.method",
            next_step="prune in a stage before (its zeros stay), or method: lsq",
        )


def notes(options: QAT) -> list[str]:
    """What no container stores of this grid: said in the facts, since the values then stay in a plain checkpoint."""
    block = options.kind in ("nf4", "fp4") and options.group_size == BLOCK
    found = []
    if not (options.kind == "int" or block):
        size = "a row" if options.group_size is None else f"groups of {options.group_size}"
        found.append(
            f"no container stores {options.kind} with {size}: the values stand in a plain checkpoint, of full size"
        )
    if options.activations is not None and (options.ranges, options.activations, options.bits) != ("token", 8, 8):
        found.append(
            f"no container rounds activations to {options.activations} bits by {options.ranges}: whoever runs the "
            "folder computes with unrounded ones"
        )
    return found
