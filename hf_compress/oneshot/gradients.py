"""What a loss over calibration text says of every weight: mean gradients and their squares."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.criteria import Statistics, seed_of
from hf_compress.errors import CompressError
from hf_compress.weights import Weight, weights


def gradient_statistics(model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Statistics]:
    """`Weight.name` -> gradient and fisher of the next-token loss (classifiers: of the loss of the batch's labels).

    gradient = sum_b n_b g_b / sum_b n_b, g_b the gradient of batch b's mean loss, n_b its predicted tokens (rows, for
    a classifier): the gradient of the loss over all of them, whatever the batches. fisher = the mean over batches of
    g_b^2, so it is of per-batch gradients; batches of one sequence make it per sequence.

    One backward a batch, in eval mode; each gradient is added to two fp32 sums as soon as it is made and let go. Both
    sums cover attention, FFN and expert matrices only; the model is left as it was.

    Raises:
        CompressError: no batches; a classifier's batch without labels; nothing to predict; a loss that is not finite;
        packed weights.
    """
    if not batches:
        raise CompressError("there is nothing to calibrate on", where="gradient statistics", next_step="give batches")
    found = weights(model)
    whole: dict[str, Weight] = {}
    for weight in found:
        assert weight.matrix.is_floating_point()  # raises, by name, where a quantizer packed it
        whole[weight.parameter] = weight
    sums = {name: torch.zeros_like(w.whole, dtype=torch.float32) for name, w in whole.items()}
    squares = {name: torch.zeros_like(w.whole, dtype=torch.float32) for name, w in whole.items()}
    seen = 0

    def add(name: str, count: int, parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        sums[name] += gradient * count
        squares[name] += gradient.square()
        parameter.grad = None

    with only_these_train(model, (weight.whole for weight in whole.values())):
        for index, batch in enumerate(batches):
            inputs, count = _labelled(model, batch, where=f"batch {index}")
            hooks = [
                weight.whole.register_post_accumulate_grad_hook(partial(add, name, count))
                for name, weight in whole.items()
            ]
            try:
                loss = model(**inputs).loss
                if not torch.isfinite(loss):
                    raise CompressError(
                        "the loss is not finite",
                        where=f"gradient statistics, batch {index}",
                        next_step="check the calibration data and the model's dtype",
                    )
                loss.backward()
            finally:
                for hook in hooks:
                    hook.remove()
            seen += count
    for name in sums:
        sums[name] /= seen
        squares[name] /= len(batches)
    return {
        w.name: Statistics(gradient=w.of(sums[w.parameter]), fisher=w.of(squares[w.parameter]), seed=seed_of(w.name))
        for w in found
    }


def _labelled(model: PreTrainedModel, batch: Mapping[str, Tensor], *, where: str) -> tuple[dict[str, Any], int]:
    """The batch with labels (padding is -100), and how many of them are predicted."""
    inputs: dict[str, Any] = {name: tensor.to(model.device) for name, tensor in batch.items()}
    if not model.can_generate():
        if "labels" not in inputs:
            raise CompressError(
                f"{type(model).__name__} is no language model, and the batch holds no labels for its loss",
                where=f"gradient statistics, {where}",
                next_step="keep the labels in the calibration batches, or use a criterion without gradients",
            )
        return inputs, len(inputs["labels"])
    padding = (
        inputs["attention_mask"] == 0 if "attention_mask" in inputs else torch.zeros_like(inputs["input_ids"]) > 0
    )
    inputs |= {"labels": inputs["input_ids"].masked_fill(padding, -100), "use_cache": False}
    count = int((inputs["labels"][:, 1:] != -100).sum())
    if count == 0:
        raise CompressError(
            "there is no token to predict", where=f"gradient statistics, {where}", next_step="give longer rows"
        )
    return inputs, count


@contextmanager
def only_these_train(model: nn.Module, parameters: Iterable[Tensor]) -> Iterator[None]:
    """Eval mode, gradients for these of the model's parameters alone; afterwards all as before, gradients too."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    wanted = {id(parameter) for parameter in parameters}
    model.eval()
    for parameter, _, _ in before:
        parameter.grad = None
        parameter.requires_grad_(id(parameter) in wanted)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
        for module, training in modes:
            module.training = training
