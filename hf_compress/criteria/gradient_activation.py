"""Keep the weights whose inputs and gradients are both large."""

from torch import Tensor

from hf_compress.criteria import Statistics, criteria

ALPHA = 100.0  # weight of the gradient, as both papers set it


@criteria.register(
    "gradient_activation",
    summary="|W_ij| * (100 rms gradient + rms input): Wanda with gradients (GBLM, Wanda++)",
    paper="https://arxiv.org/abs/2503.04992",
    needs=("fisher", "input_norm"),
    group="row",
)
def gradient_activation(weight: Tensor, statistics: Statistics) -> Tensor:
    """|W_ij| (alpha sqrt(E[g_ij^2]) + ||X_j|| / sqrt(tokens)), (out, in), alpha = 100.

    Das et al. 2023 (GBLM) and Yang et al. 2025 (Wanda++), with inputs as a root mean square over tokens, so that
    the number of calibration tokens does not shift the balance of the two terms.
    """
    assert statistics.fisher is not None
    assert statistics.input_norm is not None
    inputs = statistics.input_norm / max(1, statistics.tokens) ** 0.5
    balance: Tensor = ALPHA * statistics.fisher.sqrt() + inputs
    return weight.abs().float() * balance
