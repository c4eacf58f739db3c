"""Run a function of a test file on two CPU ranks."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

SCRIPT = """
import os, sys, torch
import torch.distributed as dist
from pathlib import Path
from {module} import *
folder = Path(sys.argv[1])
found = {call}
assert dist.get_world_size() == 2
torch.save(found, folder / f"{{os.environ['RANK']}}.pt")
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # torch's threads can abort a loaded machine's interpreter as it ends: after all that is tested
"""


def on_two_ranks(module: str, call: str, folder: Path) -> list[Any]:
    """What `call`, an expression with the names of `module` and `folder` in it, is on rank 0 and on rank 1; of
    tensors and plain values."""
    script = folder / "ranks.py"
    script.write_text(SCRIPT.format(module=module, call=call))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    done = subprocess.run(
        [*command, str(script), str(folder)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]
