"""What an ONNX graph takes beside token ids: mask, positions, token types, a cache that is still empty."""

from typing import Any

import numpy as np


def feeds(session: Any, input_ids: np.ndarray, attention_mask: np.ndarray) -> dict[str, np.ndarray]:
    """Inputs of an onnxruntime session, for its first answer to rows (batch, tokens) of int64 ids.

    Raises:
        ValueError: the graph takes something else.
    """
    known = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": np.maximum(attention_mask.cumsum(-1) - 1, 0),
        "token_type_ids": np.zeros_like(input_ids),
    }
    given = {}
    for wanted in session.get_inputs():
        if wanted.name in known:
            given[wanted.name] = known[wanted.name]
        elif wanted.name.startswith("past_key_values"):
            shape = [len(input_ids), *(size if isinstance(size, int) else 0 for size in wanted.shape[1:])]
            given[wanted.name] = np.zeros(shape, np.float16 if "float16" in wanted.type else np.float32)
        else:
            raise ValueError(f"the ONNX graph takes {wanted.name!r}, which is neither text nor an empty cache")
    return given
