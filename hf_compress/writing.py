"""Text that a model writes itself, drawn from its whole distribution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import Cache, GenerationConfig, StoppingCriteria, StoppingCriteriaList


@torch.no_grad()
def write(
    model: Any, prompts: list[Tensor], room: list[int], *, seed: int, ends: bool = True, bar: tqdm[Any] | None = None
) -> list[Tensor]:
    """What `model` goes on with after each of `prompts`, (tokens,) int64 each: at most as many tokens as there is
    `room`. A text ends at the end-of-text token, which it holds; without `ends` what comes after that is another text,
    as in packed rows, and all rooms are filled. `bar` moves with each position.

    Draws depend on `seed` alone, and the program's own random numbers stay where they were; neither do the penalties,
    cuts and beams of the model's generation_config matter.
    """
    end = model.generation_config.eos_token_id if ends else None
    stops = torch.tensor(end if isinstance(end, list) else [-1 if end is None else end], device=prompts[0].device)
    options = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=end,
        pad_token_id=max(0, int(stops[0])),
    )
    training, its_own = model.training, model.generation_config
    watched = StoppingCriteriaList([] if bar is None else [_Moving(bar)])
    with torch.random.fork_rng(range(torch.cuda.device_count())):  # manual_seed sets all of them
        torch.manual_seed(seed)
        model.eval()
        model.generation_config = options  # generate() would take penalties, cuts and beams from the model's own
        try:
            written = [
                row
                for group in _together(model, prompts, room)
                for row in _written(model, *group, options, stopping_criteria=watched)
            ]
        finally:
            model.train(training)
            model.generation_config = its_own
    found = []
    for most, row in zip(room, written, strict=True):
        over = torch.isin(row, stops).nonzero()
        found.append(row[: min(most, int(over[0]) + 1 if len(over) else most)])
    return found


def _together(model: Any, prompts: list[Tensor], room: list[int]) -> list[tuple[list[Tensor], list[int]]]:
    """Prompts and room of what is written in one go: all rows, or each alone where the longest prompt and the longest
    continuation, which are of different rows, would together pass the model's last position."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None or max(map(len, prompts)) + max(room) <= limit:
        return [(prompts, room)]
    return [([prompt], [most]) for prompt, most in zip(prompts, room, strict=True)]


def _written(
    model: Any, prompts: list[Tensor], room: list[int], options: GenerationConfig, **asked: Any
) -> list[Tensor]:
    """What follows each prompt, and perhaps more than it has room for."""
    ids = pad_sequence(prompts, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left")
    options.max_new_tokens = max(room)
    return list(
        model.generate(input_ids=ids, attention_mask=mask, generation_config=options, **asked)[:, ids.shape[1] :]
    )


class _Moving(StoppingCriteria):
    """Stops nothing: generate() asks it once a position."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self.bar = bar

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        self.bar.update()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def bytes_held(cache: Cache) -> int:
    """Of the keys and values in it, or of whatever stands for them."""
    return _bytes([vars(layer) for layer in cache.layers])


def _bytes(held: Any) -> int:
    """Of all tensors in nested lists, tuples and dicts."""
    if isinstance(held, Tensor):
        return held.numel() * held.element_size()
    inside = held.values() if isinstance(held, dict) else held if isinstance(held, (list, tuple)) else ()
    return sum(_bytes(each) for each in inside)
