"""Which options of `Pruning` go together; what does not is said before any model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_compress.budgets import owl
from hf_compress.criteria import TRAINING, usable
from hf_compress.errors import CompressError, did_you_mean
from hf_compress.patterns import GROUPS, NM, check_target, parse_pattern
from hf_compress.techniques.schedule import check_schedule, parse_when

if TYPE_CHECKING:
    from hf_compress.techniques.pruning import Pruning

BUDGETS = ("uniform", "owl")


def check_options(options: Pruning) -> None:
    """Raise a CompressError, at the recipe key, for values that do not exist or do not go together."""
    check_target(options.sparsity, options.pattern)
    usable(options.criterion, TRAINING, during="training", where="prune.criterion")
    check_schedule(options.schedule)
    if options.budget not in BUDGETS:
        raise CompressError(
            f"unknown budget {options.budget!r}", where="prune.budget", next_step=did_you_mean(options.budget, BUDGETS)
        )
    if options.group is not None and options.group not in GROUPS:
        raise CompressError(
            f"unknown group {options.group!r}", where="prune.group", next_step=did_you_mean(options.group, GROUPS)
        )
    if options.budget == "owl":
        owl({0: 0.0}, {0: 1}, sparsity=options.sparsity)
    iterative, shared = options.schedule == "iterative", options.budget != "uniform" or bool(options.sparsities)
    blind = options.schedule in ("oneshot", "iterative") or options.initial_sparsity > 0
    number, unit = parse_when(options.begin, where="prune.begin")
    for when, where in ((options.end, "end"), (options.every, "every"), (options.rewind_to or 0, "rewind_to")):
        parse_when(when, where=f"prune.{where}")
    ends, same_unit = parse_when(options.end, where="prune.end")
    nm = isinstance(parse_pattern(options.pattern), NM)
    wrong = {
        ("initial_sparsity is not between 0 and sparsity", "initial_sparsity"): not (
            0 <= options.initial_sparsity <= options.sparsity
        ),
        ("with a sparsity of 0 its schedule stays at 0, whatever single weights are given", "sparsity"): (
            options.sparsity == 0 and any(options.sparsities.values())
        ),
        ("begin is after end", "begin"): same_unit == unit
        and number > ends
        and options.schedule not in ("oneshot", "constant"),
        ("it begins where the run ends", "begin"): (number, unit) == (1, "share"),
        ("zeros that are there are kept from the first step on", "begin"): options.schedule == "constant"
        and number > 0,
        ("the iterative schedule needs a number of cycles", "cycles"): iterative and (options.cycles or 0) < 1,
        ("cycles and rewind_to belong to the iterative schedule", "schedule"): not iterative
        and not (options.cycles is None and options.rewind_to is None),
        (f"{options.pattern} compares within its own groups", "group"): nm and options.group is not None,
        (f"{options.pattern} gives every block the same sparsity", "budget"): nm and shared,
        ("one threshold over all matrices leaves no budgets", "group"): options.group == "global" and shared,
        ("owl and given sparsities are two budgets", "budget"): options.budget == "owl" and bool(options.sparsities),
        (f"{options.criterion!r} looks at steps before the first mask, and there are none", "begin"): number == 0
        and blind
        and bool(options.needs),
    }
    for (what, where), is_so in wrong.items():
        if is_so:
            raise CompressError(what, where=f"prune.{where}", next_step="see `hf-compress list prune-in-training`")
