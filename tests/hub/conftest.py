"""The test Hub, the client of this process pointed at it, and processes that know nothing but its address."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.hub.server import Hub

TOKENS = {"hf_" + "a" * 34: "alice", "hf_" + "b" * 34: "bob"}
ALICE, BOB = TOKENS


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub(TOKENS).start()
    yield made
    made.stop()


@pytest.fixture
def online(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """This process talks to the test Hub as alice, with an empty cache and without waiting between retries."""
    for name, value in {
        "ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", ALICE)
    patient = types.SimpleNamespace(**(vars(time) | {"sleep": lambda _: None}))  # of the clients, not of the Hub
    for module in ("huggingface_hub.utils._http", "hf_compress.hub"):
        monkeypatch.setattr(f"{module}.time", patient)
    return hub


@pytest.fixture
def trusted(online: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """As `online`, for folders the pipeline has just verified: not opened once more in a process of their own."""
    monkeypatch.setattr("hf_compress.hub.verify", lambda folder: {str(folder): {}})
    return online


Fresh = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def fresh(hub: Hub, tmp_path: Path) -> Fresh:
    """Run code in a new process with an empty cache, where importing hf_compress fails; token="" for nobody."""

    def run(code: str, *, token: str = ALICE, cache: str = "fresh", **more: str) -> subprocess.CompletedProcess[str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHONPATH"))}
        env |= {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        env |= ({"HF_TOKEN": token} if token else {}) | more
        blocked = "import sys; sys.modules['hf_compress'] = None\n"
        return subprocess.run(
            [sys.executable, "-P", "-c", blocked + code], env=env, capture_output=True, text=True, cwd=tmp_path
        )

    return run
