"""Ranges of activations: bounds on their error, and that neither order nor split of batches changes them."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_compress.observers import HALF, OBSERVERS, Seen, affine, entropy, min_max, mse, percentile, squared_error
from hf_compress.techniques.inputs import round_tokens, round_within

quick = settings(deadline=None, max_examples=25)
batches = st.lists(
    st.tuples(st.integers(1, 60), st.integers(-12, 9), st.integers(0, 999), st.sampled_from(["both", "up", "zero"])),
    min_size=1,
    max_size=5,
).map(lambda drawn: [_values(*one) for one in drawn])


def _values(count: int, exponent: int, seed: int, side: str) -> Tensor:
    found = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    return found.abs() if side == "up" else found * (side == "both")


def seen(*parts: Tensor) -> Seen:
    found = Seen()
    for part in parts:
        found.add(part)
    return found


@quick
@given(batches, st.integers(2, 8))
def test_any_order_split_or_merge_of_batches_gives_the_same(parts: list[Tensor], bits: int) -> None:
    one, two, whole = seen(*parts), seen(*reversed(parts)), seen(torch.cat(parts))
    merged = Seen()
    for part in parts:
        merged.merge(seen(part))
    for other in (two, whole, merged):
        assert torch.equal(one.counts, other.counts)
        assert (one.exponent, one.low, one.high) == (other.exponent, other.low, other.high)
    assert one.counts.sum() == sum(len(p) for p in parts)


@quick
@given(batches, st.integers(2, 8))
@example([_values(26, 0, 26, "up")], 2)
def test_ranges_hold_zero_and_lie_within_what_was_seen(parts: list[Tensor], bits: int) -> None:
    found = seen(*parts)
    assert min_max(found, bits) == percentile(found, bits, share=100.0)
    assert min_max(found, bits) == (
        min(0.0, float(torch.cat(parts).min())),
        max(0.0, float(torch.cat(parts).max())),
    )
    for observer in OBSERVERS.values():
        low, high = observer(found, bits)
        assert found.low <= low <= 0 <= high <= found.high
        rounded = round_within(torch.tensor([0.0, 1e9, -1e9]), low, high, bits)
        assert rounded[0] == 0
        scale, _ = affine(low, high, bits)
        assert rounded[1] <= high + scale + 1e-20
        assert rounded[2] >= low - scale - 1e-20


@quick
@given(batches, st.integers(2, 8))
def test_the_least_squares_range_is_no_worse_than_the_whole(parts: list[Tensor], bits: int) -> None:
    found, values = seen(*parts), torch.cat(parts)
    best, whole = mse(found, bits), min_max(found, bits)
    assert squared_error(found, *best, bits) <= squared_error(found, *whole, bits)
    width = 2.0**found.exponent / HALF  # the histogram knows values to within a bin
    errors = [float((round_within(values, *r, bits) - values).square().mean().sqrt()) for r in (best, whole)]
    assert errors[0] <= errors[1] + 2 * width


def test_outliers_are_clipped_by_all_but_min_max() -> None:
    found = seen(torch.randn(50_000, generator=torch.Generator().manual_seed(0)), torch.tensor([60.0]))
    assert min_max(found, 4)[1] == 60.0
    assert 3 < percentile(found, 4)[1] < 5
    assert mse(found, 4)[1] < 5
    assert entropy(found, 4)[1] < 55
    assert squared_error(found, *mse(found, 4), 4) < 0.1 * squared_error(found, *min_max(found, 4), 4)


def test_percentile_drops_that_share() -> None:
    values = torch.arange(1, 1001).float()
    low, high = percentile(seen(values), 8, share=98.0)
    assert low == 0
    assert high == pytest.approx(990, abs=1)


def test_entropy_keeps_a_histogram_that_the_levels_can_say() -> None:
    values = torch.arange(16).float().repeat(10)
    assert entropy(seen(values), 8) == (0.0, 15.0)


def test_tokens_are_rounded_as_compressed_tensors_does() -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    args = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 5, 16).to(dtype)
        x[0, 0] = 0
        scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Linear(1, 1))
        assert torch.equal(round_tokens(x, 8), fake_quantize(x, scale, zero, args))
    y = torch.randn(3, 4, requires_grad=True)
    round_tokens(y, 8).sum().backward()
    assert torch.equal(y.grad, torch.ones(3, 4))


def test_the_gradient_stops_outside_a_range() -> None:
    x = torch.tensor([-2.0, -0.5, 0.0, 0.7, 3.0], requires_grad=True)
    round_within(x, -1.0, 1.0, 8).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
