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

import pytest
import torch
import transformers

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
