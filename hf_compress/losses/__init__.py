"""Distillation losses: pure functions from student and teacher tensors to one value per position."""

from collections.abc import Callable

from torch import Tensor

from hf_compress.registry import Registry

Loss = Callable[..., Tensor]
"""``loss(student, teacher, **options) -> (positions,)`` in fp32; student and teacher are (positions, features)."""

losses: Registry[Loss] = Registry("loss", __name__)
