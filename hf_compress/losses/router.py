"""Mixture-of-experts routers: tokens go where the teacher sends them, and experts are used as much."""

from torch import Tensor

from hf_compress.losses import losses, masked_mean, same_width


@losses.register(
    "router_kl",
    summary="KL(teacher || student) of softmax(router logits)",
    kind="router",
)
def router_kl(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """At each position; of sigmoid routers (DeepSeek-V3) too it is the softmax of their logits that is compared.

    Raises:
        CompressError: different numbers of experts.
    """
    same_width(student, teacher, loss="router_kl")
    log_q, log_p = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return masked_mean((log_p.exp() * (log_p - log_q)).sum(-1), mask)


@losses.register(
    "expert_usage",
    summary="KL(teacher || student) of how much each expert is used in a sequence",
    kind="router",
)
def expert_usage(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Usage = mean over a sequence's masked positions of softmax(router logits), which a gradient can follow; within
    a sequence, so that accumulation does not change it.

    Raises:
        CompressError: different numbers of experts.
    """
    same_width(student, teacher, loss="expert_usage")

    def usage(logits: Tensor) -> Tensor:
        shares = logits.float().softmax(-1).masked_fill(~mask[..., None], 0.0).sum(1)
        return (shares / mask.sum(1, keepdim=True).clamp_min(1)).clamp_min(1e-12)

    q, p = usage(student), usage(teacher)
    return (p * (p.log() - q.log())).sum(-1)
