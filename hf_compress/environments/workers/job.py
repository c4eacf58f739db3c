"""What the worker scripts share. They run in another environment: nothing here imports hf_compress, and all that comes
in is a checkpoint folder and a request.

    main(work)      work: Job -> facts, the one call at the end of a script that makes something
    serve(work)     work: Job -> (batch -> logits), of a script that opens a folder and answers

Lines of JSON go to the real stdout: {"say"}, {"error", "next"}, {"facts"}; what libraries print goes to stderr.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_out = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)

import torch  # noqa: E402  (after it libraries print where they like)
from safetensors.torch import load_file, save_file  # noqa: E402

TOLERANCE = 1e-3  # of the largest logit, between two runtimes of the same fp32 weights


@dataclass
class Job:
    """checkpoint: folder to read (the worker's own copy). target: folder to write, empty. options: as the caller
    gave them. tensors: ``probe.input_ids``, ``probe.attention_mask``, ``probe.logits`` (the dense model's, fp32);
    ``calibration.N.input_ids`` and ``.attention_mask``."""

    checkpoint: Path
    target: Path
    options: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @property
    def probe(self) -> dict[str, torch.Tensor]:
        return {name: self.tensors[f"probe.{name}"] for name in ("input_ids", "attention_mask")}

    @property
    def calibration(self) -> list[dict[str, torch.Tensor]]:
        """Rows of one sequence, without their padding."""
        rows = []
        for number in range(sum(name.endswith(".input_ids") for name in self.tensors) - 1):
            ids, mask = (self.tensors[f"calibration.{number}.{name}"] for name in ("input_ids", "attention_mask"))
            for row, keep in zip(ids, mask.bool()):
                rows.append({"input_ids": row[keep][None], "attention_mask": mask.new_ones(1, int(keep.sum()))})
        return rows


class Refused(Exception):
    """What a person can mend; goes to them as it is."""

    def __init__(self, what: str, next_step: str = "") -> None:
        super().__init__(what)
        self.next_step = next_step


def say(text: str) -> None:
    send({"say": text})


def send(message: dict[str, Any]) -> None:
    _out.write(json.dumps(message) + "\n")


def main(work: Callable[[Job], dict[str, Any]]) -> None:
    """Read the request that the first argument names, do it, answer."""
    _explained(lambda job: send({"facts": work(job)}))


def serve(work: Callable[[Job], Callable[[dict[str, torch.Tensor]], torch.Tensor]]) -> None:
    """Open the folder, then answer ``asked.safetensors`` with ``answer.safetensors`` for each line on stdin."""

    def answer(job: Job) -> None:
        predict = work(job)
        send({"ready": True})
        for _ in sys.stdin:
            batch = load_file(job.target / "asked.safetensors")
            wall, cpu = time.perf_counter(), time.process_time()
            logits = predict(batch)
            seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
            save_file({"logits": logits.contiguous()}, job.target / "answer.safetensors")
            send({"seconds": seconds})

    _explained(answer)


def _explained(work: Callable[[Job], None]) -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    try:
        torch.set_num_threads(request["threads"])
        tensors = load_file(request["tensors"]) if request["tensors"] else {}
        work(Job(Path(request["checkpoint"]), Path(request["target"]), request["options"], tensors))
    except Refused as error:
        send({"error": str(error), "next": error.next_step})
        sys.exit(1)
    except Exception as error:
        traceback.print_exc()
        text = next((line for line in str(error).splitlines() if line.strip()), "")
        send({"error": f"{type(error).__name__}: {text}"[:500], "next": ""})
        sys.exit(1)


def read_as_older(folder: Path) -> None:
    """Rewrite config.json of a transformers 5 checkpoint with the names that transformers 4 reads.

    It would not complain about those it does not know: RoPE would silently turn at its default frequency.
    """
    import transformers

    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters", None)
    if int(transformers.__version__.split(".")[0]) >= 5 or not rope:
        return
    config["rope_theta"] = rope.pop("rope_theta", 10000.0)
    config["partial_rotary_factor"] = rope.pop("partial_rotary_factor", 1.0)
    config["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    path.write_text(json.dumps(config, indent=2))


def is_causal(job: Job) -> bool:
    """Whether it is a causal language model, not a classifier; by its architecture's name."""
    config = json.loads((job.checkpoint / "config.json").read_text())
    return bool(config["architectures"][0].endswith(("ForCausalLM", "LMHeadModel")))


def open_dense(job: Job) -> Any:
    """The checkpoint in torch, fp32; it must answer here as it did where it was saved.

    Raises:
        Refused: this transformers does not know it, or reads it as another model.
    """
    import transformers

    read_as_older(job.checkpoint)
    config = json.loads((job.checkpoint / "config.json").read_text())
    name = config["architectures"][0]
    older = "the library does not know this architecture yet; leave the stage out"
    if not hasattr(transformers, name):
        raise Refused(f"transformers {transformers.__version__} has no {name}", older)
    try:
        model, info = getattr(transformers, name).from_pretrained(
            job.checkpoint, dtype=torch.float32, output_loading_info=True
        )
    except (RuntimeError, ValueError, KeyError) as error:
        text = " ".join(str(error).split())[:200]
        raise Refused(f"transformers {transformers.__version__} does not open it: {text}", older) from error
    wrong = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info.get(kind) or ()]
    if wrong:
        raise Refused(f"transformers {transformers.__version__} reads it with other keys, e.g. {wrong[0]}", older)
    model = model.eval()
    require_same(job, answers(model, job.probe), f"transformers {transformers.__version__}")
    return model


@torch.no_grad()
def answers(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits in fp32, on the CPU. Runtimes of other libraries take the arguments their exported graph has."""
    logits = model(**batch).logits
    return torch.as_tensor(logits).float().cpu()


def record(job: Job, got: torch.Tensor) -> torch.Tensor:
    """Write down what the finished folder answers, to be compared with by whoever opens it again: `got`."""
    tensors = job.probe | {"logits": got}
    save_file({k: v.contiguous() for k, v in tensors.items()}, job.target / "expectation.safetensors")
    return got


def difference(job: Job, got: torch.Tensor) -> dict[str, float]:
    """How far from the dense model, where the probe holds no padding: largest difference of the logits over the
    largest logit, and mean KL(dense || got)."""
    want = job.tensors["probe.logits"]
    if got.dim() == 3:
        real = job.probe["attention_mask"].bool()
        got, want = got[real], want[real]
    logs, dense = got.log_softmax(-1), want.log_softmax(-1)
    kl = float((dense.exp() * (dense - logs)).sum(-1).mean())
    return {"relative_error": float((got - want).abs().max() / want.abs().max()), "kl_to_dense": kl}


def require_same(job: Job, got: torch.Tensor, who: str) -> float:
    """Raise `Refused` unless the unquantized model answers there as the dense model does; the relative error."""
    error = difference(job, got)["relative_error"]
    if not error <= TOLERANCE:  # NaN too
        raise Refused(
            f"{who} computes something else from this checkpoint: its logits differ by {error:.1e} of the largest",
            "do not ship it; leave the stage out, and report the architecture",
        )
    return error
