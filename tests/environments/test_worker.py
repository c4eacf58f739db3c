"""A worker's folder is whole or not there, its words come through, and no process outlives the call."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from hf_compress.environments.worker import WORKERS, Answers, run_worker
from hf_compress.errors import CompressError

HEAD = f"import sys; sys.path.insert(0, {str(WORKERS)!r})\nfrom job import Refused, main, say, serve\n"
PYTHON = Path(sys.executable)


def script(folder: Path, body: str, end: str = "main(work)") -> Path:
    path = folder / "stub.py"
    path.write_text(HEAD + body + f"\n{end}\n")
    return path


def call(folder: Path, body: str, say=lambda _: None) -> dict:
    return run_worker(
        PYTHON,
        script(folder, body),
        checkpoint=folder,
        target=folder / "out",
        options={"bits": 4},
        tensors={"probe.input_ids": torch.arange(6).view(2, 3).T},
        say=say,
    )


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name not in ("stub.py", "marker"))


def test_facts_folder_progress_and_tensors_come_through(tmp_path: Path) -> None:
    said: list[str] = []
    body = (
        "def work(job):\n"
        "    print('noise of a library'); say('half way')\n"
        "    (job.target / 'made').write_text(str(job.options['bits']))\n"
        "    return {'sum': int(job.tensors['probe.input_ids'][:, 0].sum()), 'blocked': 'hf_compress' in sys.modules}"
    )
    assert call(tmp_path, body, said.append) == {"sum": 3, "blocked": False}
    assert said == ["half way"]
    assert (tmp_path / "out" / "made").read_text() == "4"
    assert left(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("raise Refused('no such layer', 'leave it out')", "no such layer[\\s\\S]*next: leave it out"),
        ("raise ValueError('wrong shape\\nmore')", "ValueError: wrong shape[\\s\\S]*Traceback"),
        ("sys.stderr.write('last words'); import os; os._exit(3)", "died .exit code 3.[\\s\\S]*last words"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "died .signal 9."),
        ("raise SystemExit(0)", "died .exit code 0."),
    ],
)
def test_errors_and_crashes_leave_nothing(line: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match=says):
        call(tmp_path, f"def work(job):\n    (job.target / 'half').touch()\n    {line}")
    assert left(tmp_path) == []


def test_ctrl_c_stops_the_worker_and_leaves_nothing(tmp_path: Path) -> None:
    body = (
        "import os, pathlib, signal, time\n"
        "def work(job):\n"
        "    signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "    (job.target / 'half').touch()\n"
        "    (job.checkpoint / 'marker').write_text(str(os.getpid()))\n"
        "    time.sleep(600)"
    )

    def interrupt() -> None:
        while not (tmp_path / "marker").exists() or not (tmp_path / "marker").read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            call(tmp_path, body)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not psutil.pid_exists(int((tmp_path / "marker").read_text()))
    assert left(tmp_path) == []


def test_a_folder_answers_until_it_is_closed(tmp_path: Path) -> None:
    body = "def work(job):\n    return lambda batch: batch['input_ids'].float() * job.options['times']"
    answers = Answers(PYTHON, script(tmp_path, body, "serve(work)"), tmp_path, {"times": 3})
    for batch in (torch.arange(4).view(2, 2), torch.arange(3).view(1, 3)):
        got = answers({"input_ids": batch, "attention_mask": torch.ones_like(batch)})
        torch.testing.assert_close(got, batch * 3.0)
        assert answers.seconds["wall"] > 0
    answers.close()
    broken = script(tmp_path, "def work(job):\n    raise Refused('it does not open')", "serve(work)")
    with pytest.raises(CompressError, match="it does not open"):
        Answers(PYTHON, broken, tmp_path)


def test_a_process_that_dies_between_answers_is_an_error(tmp_path: Path) -> None:
    body = "def work(job):\n    import os\n    return lambda batch: os._exit(7)"
    answers = Answers(PYTHON, script(tmp_path, body, "serve(work)"), tmp_path)
    ids = torch.ones(1, 2, dtype=torch.long)
    for _ in range(2):
        with pytest.raises(CompressError, match="exit code 7"):
            answers({"input_ids": ids, "attention_mask": ids})
    answers.close()


def test_rope_of_a_newer_config_is_read_by_an_older_transformers(tmp_path: Path) -> None:
    config = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}}
    code = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1])\n"
        "import transformers; transformers.__version__ = sys.argv[3]\n"
        "from job import read_as_older; read_as_older(pathlib.Path(sys.argv[2]))"
    )
    for number, want in (
        ("5.5.4", config),
        (
            "4.57.6",
            {
                "rope_theta": 5e5,
                "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
                "partial_rotary_factor": 1.0,
            },
        ),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        subprocess.run([sys.executable, "-c", code, str(WORKERS), str(tmp_path), number], check=True)
        assert json.loads((tmp_path / "config.json").read_text()) == want
