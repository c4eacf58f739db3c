"""Inner products instead of coordinates: between positions (Gram), or between a block's input and output (FSP)."""

from torch import Tensor

from hf_compress.losses import losses, same_width


@losses.register(
    "gram",
    summary="squared error of the normalized Gram matrices of a sequence's positions",
    paper="https://arxiv.org/abs/1907.09682",
    kind="hidden",
)
def gram(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """|G_s / |G_s| - G_t / |G_t||^2, G = X X^T over the masked positions of one sequence, Frobenius norms. Widths may
    differ; rotation and scale change nothing. (The paper compares the examples of a batch; this one sequence.)"""

    def normalized(x: Tensor) -> Tensor:
        x = x.float().masked_fill(~mask[..., None], 0.0)
        return _unit(x @ x.transpose(1, 2))

    return (normalized(student) - normalized(teacher)).square().sum((1, 2))


@losses.register(
    "fsp",
    summary="squared error of the flow of a block: inner products of what enters and what leaves it",
    paper="https://doi.org/10.1109/CVPR.2017.754",
    kind="flow",
)
def fsp(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
    """|F_s / |F_s| - F_t / |F_t||^2, F = X_in^T X_out (width, width) over the masked positions of one sequence.

    Raises:
        CompressError: different widths.
    """
    same_width(student[0], teacher[0], loss="fsp")

    def flow(states: tuple[Tensor, Tensor]) -> Tensor:
        entering, leaving = (x.float().masked_fill(~mask[..., None], 0.0) for x in states)
        return _unit(entering.transpose(1, 2) @ leaving)

    return (flow(student) - flow(teacher)).square().sum((1, 2))


def _unit(matrices: Tensor) -> Tensor:
    found: Tensor = matrices / matrices.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None]
    return found
