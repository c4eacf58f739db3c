"""Freed memory goes back to the system."""

import os
import sys
from pathlib import Path

import pytest
import torch

from hf_compress.allocator import trim


def resident() -> float:
    """MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone has it, and /proc")
def test_what_was_freed_between_live_pieces_is_given_back() -> None:
    pieces = [torch.ones(1 << 14) for _ in range(4000)]  # 64 KB each: too small for a mapping of its own
    kept = pieces[::100]
    del pieces
    before = resident()
    trim()
    assert before - resident() > 200
    assert all(piece.sum() == 1 << 14 for piece in kept)


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("ctypes.CDLL", lambda name: pytest.fail("asked for a C library"))
    trim()
