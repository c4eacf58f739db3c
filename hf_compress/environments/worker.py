"""Run a worker script in another environment: a checkpoint folder and options in, a folder and facts out."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_compress.environments import Say, clean_environment, environment
from hf_compress.errors import CompressError

EXPECTATION = "expectation.safetensors"  # what the worker that wrote a folder was answered by it
WORKERS = Path(__file__).with_name("workers")
_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


def run_worker(
    python: Path,
    script: Path,
    *,
    checkpoint: Path,
    target: Path,
    options: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """``run_worker(environment("openvino").require(what="export"), WORKERS / "to_openvino.py", ...)``: let the script
    write `target` (must not exist) and return its facts.

    It writes into a hidden sibling, which gets its name when the script has ended well; a crash, an error or Ctrl-C
    leaves neither the one nor the other, and no process.

    Raises:
        CompressError: what the script refused, or the last lines of one that died.
    """
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        with _started(python, script, checkpoint, part, options, tensors) as process:
            facts: dict[str, Any] = process.until("facts", say)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return facts


class Answers:
    """A folder that only another environment opens, as a function: batch of input_ids and attention_mask -> logits.

    The process stays until `close`. seconds: wall and CPU time of its last forward alone.

    Raises:
        CompressError: the folder does not open there, or the process died.
    """

    def __init__(self, python: Path, script: Path, folder: Path, options: Mapping[str, Any] | None = None) -> None:
        self._room = tempfile.TemporaryDirectory()
        self._open = _started(python, script, folder, Path(self._room.name), options or {}, {})
        self._process = self._open.__enter__()
        self.seconds = {"wall": 0.0, "cpu": 0.0}
        try:
            self._process.until("ready", lambda _: None)
        except BaseException:
            self.close()
            raise

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        room = Path(self._room.name)
        save_file({k: _apart(batch[k]) for k in ("input_ids", "attention_mask")}, room / "asked.safetensors")
        self._process.tell("answer")
        self.seconds = self._process.until("seconds", lambda _: None)
        return load_file(room / "answer.safetensors")["logits"]

    def close(self) -> None:
        self._open.__exit__(None, None, None)
        self._room.cleanup()


def _apart(tensor: Tensor) -> Tensor:
    """A copy: tensors that share memory cannot be saved together."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def open_elsewhere(library: str, folder: Path, *, exact: bool = False) -> Answers:
    """A folder of ``openvino``, ``onnx`` (through optimum) or ``gptq`` as a function, in the environment of that name.

    exact: OpenVINO in fp32; else as it runs by default, in bfloat16 where the CPU has it.
    """
    python = environment(library).require(what=f"opening {folder.name}/", where=str(folder))
    return Answers(python, WORKERS / "answer.py", folder, {"library": library, "exact": exact})


def reopened(library: str, folder: Path) -> float:
    """Open a folder that a worker wrote once more, in another process, and compare with the answers recorded in it:
    largest difference of the logits over the largest."""
    expected = load_file(folder / EXPECTATION)
    answers = open_elsewhere(library, folder, exact=True)
    try:
        got = answers(expected)
    finally:
        answers.close()
    return float((got - expected["logits"]).abs().max() / expected["logits"].abs().max())


class _Process:
    def __init__(self, process: subprocess.Popen[str], log: IO[str], name: str) -> None:
        self._process, self._log, self._name = process, log, name

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # `until` says what it died of
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def until(self, wanted: str, say: Say) -> Any:
        """Pass on what it says until it sends `wanted`."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            if "say" in message:
                say(message["say"])
            elif "error" in message:
                raise CompressError(
                    message["error"], where=self._name, next_step=message["next"] or f"its last words: {self._tail()}"
                )
            elif wanted in message:
                return message[wanted]
        code = self._process.wait()
        raise CompressError(
            f"the worker died ({f'signal {-code}' if code < 0 else f'exit code {code}'})",
            where=self._name,
            next_step=f"its last words: {self._tail()}",
        )

    def _tail(self) -> str:
        self._log.seek(0)
        return self._log.read().strip()[-800:] or "none"


@contextmanager
def _started(
    python: Path,
    script: Path,
    checkpoint: Path,
    target: Path,
    options: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> Iterator[_Process]:
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile("w+", errors="replace") as log:
        request = {
            "checkpoint": str(checkpoint),
            "target": str(target),
            "options": dict(options),
            "tensors": str(Path(scratch) / "tensors.safetensors") if tensors else None,
            "threads": torch.get_num_threads(),
        }
        if tensors:
            save_file({k: _apart(v) for k, v in tensors.items()}, Path(scratch) / "tensors.safetensors")
        (Path(scratch) / "request.json").write_text(json.dumps(request))
        process = subprocess.Popen(
            [str(python), str(script), str(Path(scratch) / "request.json")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=clean_environment() | _QUIET,
        )
        try:
            yield _Process(process, log, f"worker {script.stem}")
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with suppress(BrokenPipeError):  # what it did not read before it died
                    pipe.close()
