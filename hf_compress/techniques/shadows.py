"""Another tensor stands where a module reads its parameter, for one forward at a time; that it was read is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_compress.errors import CompressError

Change = Callable[[Tensor], Tensor]
"""From a parameter as stored to what stands in for it; differentiable."""


def shadow(module: nn.Module, changes: Mapping[str, tuple[str, Change]]) -> list[RemovableHandle]:
    """Hooks that put change(parameter) into ``module.__dict__`` before a forward and take it away after.

    changes: attribute -> name of the parameter, for errors, and its change. No state_dict key changes. The first
    forward with gradients checks that the output was computed from each shadow: code that reads
    ``module._parameters`` would ignore it without a word. (Not under torch.compile, which has no graph to look at.)

    Raises:
        CompressError: in that forward.
    """
    unread = dict(changes)

    def put(module: nn.Module, args: Any) -> None:
        for attribute, (_, change) in changes.items():
            parameter = module._parameters[attribute]
            assert parameter is not None
            changed = change(parameter)
            if unread and torch.is_grad_enabled() and not changed.requires_grad:
                changed = changed.detach().requires_grad_()  # frozen: a gradient edge to look for
            module.__dict__[attribute] = changed

    def take(module: nn.Module, args: Any, output: Any) -> None:
        try:
            failed = output is None  # the forward raised: what it did not get to read is not the error
            if unread and not failed and torch.is_grad_enabled() and not torch.compiler.is_compiling():
                for attribute, (name, _) in list(unread.items()):
                    require_read(output, module.__dict__[attribute], where=name)
                    del unread[attribute]
        finally:
            for attribute in changes:
                module.__dict__.pop(attribute, None)

    return [module.register_forward_pre_hook(put), module.register_forward_hook(take, always_call=True)]


def require_read(output: Any, changed: Tensor, *, where: str) -> None:
    """Raise a CompressError unless the output was computed from `changed`, by the graph that autograd keeps."""
    wanted = torch.autograd.graph.get_gradient_edge(changed).node
    waiting = [tensor.grad_fn for tensor in _tensors(output) if tensor.grad_fn is not None]
    seen = set(waiting)
    while waiting:  # breadth first: what this module read is near
        node = waiting.pop(0)
        if node is wanted:
            return
        fresh = [parent for parent, _ in node.next_functions if parent is not None and parent not in seen]
        seen.update(fresh)
        waiting += fresh
    raise CompressError(
        "the changed weight was put in place, and the layer did not read it",
        where=where,
        next_step="skip this weight, or take away what reads the parameter itself (a parametrization, an adapter)",
    )


def _tensors(output: Any) -> Iterable[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)
