"""Moments of a run, published values of the schedules, and when masks are chosen."""

import pytest
from transformers import TrainerState

from hf_compress.errors import CompressError
from hf_compress.techniques.schedule import Plan, parse_when, scheduled_sparsity, steps_of


def plan(total: int = 100, epoch: int | None = 20, **options: object) -> Plan:
    state = TrainerState()
    state.max_steps = total
    given = {"schedule": "cubic", "begin": 0.0, "end": 0.75, "every": 10, "cycles": None, "rewind_to": None}
    return Plan.of(state, epoch, **(given | {"waits": False} | options))


def events(made: Plan, total: int = 100) -> list[int]:
    return [step for step in range(total) if made.due(step)]


def test_cubic_schedule_has_its_published_values() -> None:
    values = [scheduled_sparsity(p, schedule="cubic", initial=0.0, final=0.9) for p in (0.0, 0.25, 0.5, 1.0, 2.0)]
    assert values == pytest.approx([0.0, 0.5203125, 0.7875, 0.9, 0.9])
    line = [scheduled_sparsity(p, schedule="linear", initial=0.1, final=0.9) for p in (-1.0, 0.0, 0.25, 1.0)]
    assert line == pytest.approx([0.1, 0.1, 0.3, 0.9])


@pytest.mark.parametrize(
    ("when", "steps"),
    [
        (0.25, 25),
        (1, 100),
        (1.0, 100),
        (30, 30),
        (30.0, 30),
        ("1 step", 1),
        ("30 steps", 30),
        ("2 epochs", 40),
        ("0.5 epochs", 10),
        ("1 epoch", 20),
        ("0.5", 50),
        (0.29, 29),
    ],
)
def test_moments_are_shares_steps_or_epochs(when: float | str, steps: int) -> None:
    assert steps_of(when, total=100, epoch=20, where="begin") == steps


@pytest.mark.parametrize("when", ["soon", -0.1, 2.5, "1.5 steps", "2 days", "", float("nan")])
def test_other_moments_are_refused(when: float | str) -> None:
    with pytest.raises(CompressError, match=r"no moment of a run[\s\S]*begin"):
        parse_when(when, where="begin")


def test_masks_are_chosen_from_begin_to_end_at_every_interval_and_at_the_end() -> None:
    made = plan(begin=0.1, end=0.45, every=10)
    assert events(made) == [10, 20, 30, 40, 45]
    sparsities = [made.sparsity(step, initial=0.1, final=0.9) for step in events(made)]
    assert sparsities[0] == pytest.approx(0.1)
    assert sparsities[-1] == 0.9
    assert sparsities == sorted(sparsities)
    assert events(plan(end=1.0, every="1 epoch")) == [0, 20, 40, 60, 80, 99]  # a step is left to train under the last
    assert events(plan(schedule="oneshot", begin="1 epoch", end=0.1)) == [20]
    assert len(events(plan(every=1))) == 76
    assert events(plan(every=0.2)) == [0, 20, 40, 60, 75]
    assert events(plan(waits=True, every=25)) == [1, 26, 51, 75]


def test_cycles_are_even_in_time_and_in_sparsity() -> None:
    made = plan(schedule="iterative", cycles=4, begin=0.1, end=0.7)
    assert events(made) == [10, 30, 50, 70]
    assert [made.sparsity(s, initial=0.0, final=0.8) for s in events(made)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert events(plan(schedule="iterative", cycles=1, begin=0.1)) == [10]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"begin": 200}, "begins at step 200, and the run has 100"),
        ({"begin": 0.5, "end": 20}, "begins at step 50 and ends at step 20"),
        ({"every": 0.001}, "less than a step"),
        ({"schedule": "iterative", "cycles": 9, "begin": 10, "end": 15}, "9 cycles do not fit"),
        ({"schedule": "iterative", "cycles": 2, "begin": 10, "rewind_to": 11}, "is after step 10"),
        ({"epoch": None, "end": "3 epochs"}, "rows are streamed"),
    ],
)
def test_plans_that_cannot_be_kept_are_refused(options: dict, message: str) -> None:
    with pytest.raises(CompressError, match=message):
        plan(**options)
