"""The engine's arithmetic is compared with plain fp32 sums, on whatever machine: a test that wants bfloat16 asks."""

from collections.abc import Iterator

import pytest

from hf_compress import precision


@pytest.fixture(autouse=True)
def plain_fp32() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:  # of its own: a test may undo its own
        patch.setattr(precision, "bfloat16_is_fast", lambda device: False)
        yield
