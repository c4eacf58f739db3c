"""Set before any heavy import: no network, one thread a worker (two spin against each other), no telemetry, no
progress bars."""

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    OMP_WAIT_POLICY="passive",
    TQDM_DISABLE="1",
    COLUMNS="120",
    BITSANDBYTES_NOWELCOME="1",
)

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Kind -> the folder `tests.finished` made of it, the first time it is asked for."""
    from tests.finished import make

    root, known = tmp_path_factory.mktemp("made"), dict[str, Path]()

    def get(kind: str) -> Path:
        if kind not in known:
            torch.manual_seed(0)
            known[kind] = make(kind, root / kind)
        return known[kind]

    return get


@pytest.fixture
def finished(made: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Kind -> a copy of it that a test may change."""

    def copy(kind: str = "experts") -> Path:
        return Path(shutil.copytree(made(kind), tmp_path / kind))

    return copy
