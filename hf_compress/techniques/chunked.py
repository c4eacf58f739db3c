"""Losses from hidden states and the head's weight, a chunk of positions at a time: of more than `WHOLE` positions, no
tensor of all logits ever exists."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.errors import CompressError
from hf_compress.techniques.soft_targets import BLOCK_BYTES, Objective, Online, rows_in
from hf_compress.weights import base_of

LEAST, MOST = 128, 512  # rows of a chunk: each reads both heads' weights five times, so fewer would wait for memory
WHOLE = 256  # up to so many rows are one chunk: two would take longer, to save less than the head's gradient is


@dataclass(frozen=True)
class Head:
    """logits = cap tanh(scale (W x + b) / cap), without the tanh where cap is None."""

    module: nn.Linear
    scale: float = 1.0
    cap: float | None = None

    def shape_of(self, logits: Tensor) -> Tensor:
        """What the model does with the head's output, in place."""
        if self.scale != 1:
            logits = logits.mul_(self.scale)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def slope_of(self, logits: Tensor, slope: Tensor) -> Tensor:
        """From d loss / d logits to d loss / d what the head gave, in place."""
        if self.cap is not None:
            slope = slope.mul_(1 - (logits / self.cap).square_())
        return slope.mul_(self.scale) if self.scale != 1 else slope


def head_of(model: nn.Module) -> Head:
    """The language-model head, once what the model does with its output is known for sure.

    Raises:
        CompressError: no linear head, one with adapters or packed weights, or logits that are changed in a way not
        known here.
    """
    base = base_of(model)
    module = base.get_output_embeddings()
    if type(module) is not nn.Linear or not module.weight.is_floating_point():
        adapted = hasattr(module, "base_layer") or hasattr(module, "modules_to_save")
        raise CompressError(
            "the head has adapters, so its logits are not one matrix times hidden states"
            if adapted
            else f"the head is a {type(module).__name__}, not a plain nn.Linear",
            where="distill.chunked",
            next_step="leave lm_head out of the adapters' modules, or set chunked: false",
        )
    config: Any = base.config.get_text_config()
    scales = [1.0]
    for name, invert in (("logit_scale", False), ("logits_scaling", True), ("logits_scaling", False)):
        number = getattr(config, name, None)
        if number:
            scales.append(1 / number if invert else number)
    cap = getattr(config, "final_logit_softcapping", None)
    given, found = (x.float() for x in _probe(base, module))
    heads = [Head(module, scale, limit) for scale in scales for limit in (None, cap)]
    nearest = min(heads, key=lambda head: float((head.shape_of(given.clone()) - found).abs().max()))
    if torch.allclose(nearest.shape_of(given.clone()), found, rtol=2e-2, atol=1e-2):
        return nearest
    raise CompressError(
        f"{type(base).__name__} changes its logits after the head in a way that is not known here",
        where="distill.chunked",
        next_step="set chunked: false",
    )


@torch.no_grad()
def _probe(model: PreTrainedModel, module: nn.Linear) -> tuple[Tensor, Tensor]:
    """What comes out of the model when its head answers with known numbers: (vocabulary,) before and after."""
    device, training = module.weight.device, model.training
    given = torch.linspace(-40, 40, module.out_features, device=device).to(module.weight.dtype)
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    model.eval()
    try:
        with head_stands_in(module, lambda x: given.expand(*x.shape[:-1], -1).clone()):
            more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
            found: Tensor = model(input_ids=ids, **more).logits
    finally:
        model.train(training)
    return given, found[0, -1]


@contextmanager
def head_stands_in(module: nn.Module, compute: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, the head's forward is `compute`; its hooks still fire, and so do those of every wrapper around it."""
    before = module.__dict__.get("forward")
    module.forward = compute
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@torch.no_grad()
def ask(model: nn.Module, head: Head, inputs: dict[str, Any], weight: float = 1.0) -> Online:
    """A teacher's answer to a batch: what reaches its head, (batch, positions, width); the head itself runs a chunk at
    a time later, in the dtype that it would have had here."""
    asked: list[Online] = []

    def keep(hidden: Tensor) -> Tensor:
        asked.append(online(head, hidden, weight))
        return hidden[..., :1]

    with head_stands_in(head.module, keep):
        model(**inputs)
    return asked[0]


def online(head: Head, hidden: Tensor, weight: float = 1.0) -> Online:
    """The teacher that has `head`, of whose forward `hidden` (batch, positions, width) is left."""
    product, flat = _Product(head.module.weight.detach(), head.module.bias), hidden.flatten(0, -2)

    def outputs(rows: Tensor) -> Tensor:
        return product(flat[rows.to(flat.device)]).to(rows.device)  # a teacher may lie on other devices

    return Online(outputs, weight, head.shape_of)


class _Product:
    """x W^T + b in the dtype that the model would compute it in, into one buffer that every chunk uses again."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        kind = weight.device.type
        self.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        self.weight = weight.to(self.dtype)
        self.bias = None if bias is None else bias.to(self.dtype)
        self._buffer = weight.new_empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        """(rows, width) -> (rows, vocabulary); overwritten by the next call."""
        if len(x) > len(self._buffer):
            self._buffer = torch.empty(len(x), len(self.weight), dtype=self.dtype, device=x.device)
        out = self._buffer[: len(x)]
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            if self.bias is None:
                return torch.mm(x.to(self.dtype), self.weight.T, out=out)
            return torch.addmm(self.bias, x.to(self.dtype), self.weight.T, out=out)


def chunked_loss(
    head: Head, hidden: Tensor, rows: Tensor, objective: Objective, size: int | None
) -> tuple[Tensor, Tensor]:
    """(total, sums) of an objective over `rows` of hidden states (batch, positions, width); see `Objective`."""
    found: tuple[Tensor, Tensor] = _FromHidden.apply(  # type: ignore[no-untyped-call]
        hidden.flatten(0, -2), head.module.weight, head.module.bias, head, rows, objective, size
    )
    return found


def _chunk(rows: int) -> int:
    return max(1, rows) if rows <= WHOLE else min(MOST, max(LEAST, rows // 8))


def _blocks(rows: int, classes: int, *, cpu: bool) -> list[slice]:
    """Parts of a chunk that are computed at a time; on a GPU the whole of it."""
    size = rows_in(BLOCK_BYTES, classes) if cpu else rows
    return [slice(start, start + size) for start in range(0, rows, size)]


class _FromHidden(torch.autograd.Function):
    """Each chunk of positions is multiplied with the head once for its logits, and its gradient once for the hidden
    states and once for the weight: in forward, so that nothing of the vocabulary's size is kept but the weight's
    gradient, which is summed in fp32."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        rows: Tensor,
        objective: Objective,
        size: int | None,
    ) -> tuple[Tensor, Tensor]:
        product = _Product(weight, bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        sums = torch.zeros(4, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight: Tensor | None = None  # begun by the first product: zeros would be one more pass over it
        grad_bias = torch.zeros(len(weight), device=weight.device) if need_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            for part in rows.split(size or _chunk(len(rows))):
                x = hidden[part].to(product.dtype)
                logits = product(x)
                objective.start(part)
                learned = False
                for block in _blocks(len(part), len(weight), cpu=hidden.is_cpu):
                    outputs = head.shape_of(logits[block].float())
                    more, slope = objective(outputs, part[block], block)
                    sums += more
                    if slope is not None:
                        learned = True
                        logits[block] = head.slope_of(outputs, slope)
                if not learned:
                    continue
                if grad_bias is not None:
                    grad_bias += logits.float().sum(0)
                if grad_hidden is not None:
                    grad_hidden[part] = (logits @ product.weight).to(hidden.dtype)
                if not need_weight:
                    continue
                if grad_weight is None:
                    grad_weight = (logits.T @ x).float()
                elif product.dtype == torch.float32:
                    grad_weight.addmm_(logits.T, x)
                else:
                    grad_weight += logits.T @ x
        if need_weight and grad_weight is None:  # other ranks wait for it
            grad_weight = torch.zeros(weight.shape, device=weight.device)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.mark_non_differentiable(sums)
        return objective.soft_weight * sums[1] + objective.task_weight * sums[0], sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        of_weight, of_bias = ctx.dtypes
        # in place: a second copy of the weight's gradient would be the largest tensor of the step
        weight = None if weight is None else weight.mul_(grads[0]).to(of_weight)
        bias = None if bias is None else (bias * grads[0]).to(of_bias)
        return None if hidden is None else hidden * grads[0], weight, bias, None, None, None, None
