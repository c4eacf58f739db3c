"""How much of a model a stage touched, and what it left alone and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from hf_compress.errors import CompressError
from hf_compress.weights import KINDS, weights


@dataclass(frozen=True)
class Coverage:
    """Bytes (at the model's dtype before the stage) of the block matrices a stage touched.

    share: touched / all attention, FFN and expert matrices. experts: the same over routed experts (None without any).
    skipped: reason -> names, of everything with two or more dimensions that was not touched (embeddings and router
    too).
    """

    touched_bytes: int
    total_bytes: int
    expert_bytes: int = 0
    expert_total_bytes: int = 0
    skipped: dict[str, list[str]] = field(default_factory=dict)

    @property
    def share(self) -> float:
        return self.touched_bytes / self.total_bytes if self.total_bytes else 1.0

    @property
    def experts(self) -> float | None:
        return self.expert_bytes / self.expert_total_bytes if self.expert_total_bytes else None

    def as_facts(self) -> dict[str, Any]:
        return asdict(self) | {"share": self.share, "experts": self.experts}

    @property
    def least(self) -> float:
        """The share, or the experts' where that is lower."""
        return min(self.share, 1.0 if self.experts is None else self.experts)

    def left_out(self) -> str:
        """Why, and of which weights, but for those that stay by design; a sentence's end."""
        return "; ".join(
            f"{len(names)} x {reason} (e.g. {names[0]})"
            for reason, names in self.skipped.items()
            if reason not in KEPT.values()
        )

    def require(self, minimum: float, *, where: str) -> None:
        """Raise a `CompressError` naming what was left out when `least` is below `minimum`."""
        if self.least < minimum:
            raise CompressError(
                f"covers {self.least:.1%} of the weights, below min_coverage {minimum:.0%}; left out: "
                + self.left_out(),
                where=where,
                next_step="pick a backend that stores them, skip less, or lower min_coverage knowingly",
            )


KEPT = {"router": "router, kept by design", "embedding": "embedding, kept by design", "head": "head, kept by design"}


def coverage(model: nn.Module, touched: Iterable[str], reasons: Mapping[str, str] | None = None) -> Coverage:
    """Coverage of a stage that touched the weights named in `touched` (`Weight.name`); `reasons`: name -> why it was
    not."""
    done, why = set(touched), dict(reasons or {})
    touched_bytes = total = experts = experts_total = 0
    skipped: dict[str, list[str]] = {}
    for weight in weights(model, KINDS):
        size, hit = weight.nbytes, weight.name in done
        if weight.kind not in KEPT:
            total, touched_bytes = total + size, touched_bytes + size * hit
        if weight.kind == "expert":
            experts_total, experts = experts_total + size, experts + size * hit
        if not hit:
            skipped.setdefault(why.get(weight.name, KEPT.get(weight.kind, "not selected")), []).append(weight.name)
    return Coverage(touched_bytes, total, experts, experts_total, skipped)
