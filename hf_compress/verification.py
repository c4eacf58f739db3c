"""Does a finished folder open without hf_compress? Asked in a fresh process that cannot import it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from hf_compress.environments import clean_environment, python_for
from hf_compress.environments.worker import reopened
from hf_compress.environments.workers.feeds import feeds
from hf_compress.errors import CompressError
from hf_compress.families import family_of
from hf_compress.files import sha256
from hf_compress.weights import is_packed, weights

EXPECTATION = "verify/expectation.safetensors"
HASHES = "verify/SHA256SUMS"
SCRATCH = ("_", "checkpoint-", "training_args.bin", "trainer_state.json", "runs/", "hub-step/")  # a Trainer's own
RENDERED = ("README.md", "recipe.yaml", "hf_compress.json", "plots/", ".eval_results/")  # made again from the facts
TOLERANCE = 1e-3  # of the largest logit: another process may sum in another order

_CHILD = Path(__file__).with_name("reload_check.py")


def write_expectation(model: PreTrainedModel, folder: Path) -> None:
    """Record in `folder` what the model in memory answers to a fixed probe, before it is ever reloaded.

    ``verify/expectation.safetensors``: input_ids (2, 16), attention_mask, logits; zeros.NAME, the count of exact
    zeros of each pruned parameter; cuda, whether a GPU answered; eager_experts, whether experts ran one by one.
    """
    ids, mask = probe(model.config.vocab_size)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
    tensors = {"input_ids": ids, "attention_mask": mask, "logits": logits.float().cpu().contiguous()}
    tensors["cuda"] = torch.tensor(model.device.type == "cuda")
    if family_of(model.config).experts is not None:
        tensors["eager_experts"] = torch.tensor(getattr(model.config, "_experts_implementation", "") == "eager")
    for parameter, whole in {w.parameter: w.whole for w in weights(model)}.items():
        zeros = 0 if is_packed(whole) else int((whole == 0).sum())
        if zeros > 0.01 * whole.numel():
            tensors[f"zeros.{parameter}"] = torch.tensor(zeros)
    (folder / EXPECTATION).parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / EXPECTATION)


def write_onnx_expectation(folder: Path) -> None:
    """Record beside it what the ONNX file in ``folder/onnx`` answers to the same probe."""
    from onnxruntime import InferenceSession

    (file,) = (folder / "onnx").glob("*.onnx")
    expected = load_file(folder / EXPECTATION)
    session = InferenceSession(file, providers=["CPUExecutionProvider"])
    (got,) = session.run(["logits"], feeds(session, *(expected[k].numpy() for k in ("input_ids", "attention_mask"))))
    save_file(expected | {"onnx_logits": torch.from_numpy(got)}, folder / EXPECTATION)


def model_files(folder: Path) -> list[str]:
    """Relative paths of what makes up the model: all but what is made from the facts, and a Trainer's scratch."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return [name for name in names if name != HASHES and not name.startswith((*RENDERED, *SCRATCH))]


def write_hashes(folder: Path) -> None:
    """Record the SHA-256 of every file that makes up the model, as ``sha256sum -c verify/SHA256SUMS`` reads them."""
    (folder / HASHES).parent.mkdir(exist_ok=True)
    (folder / HASHES).write_text("".join(f"{sha256(folder / name)}  {name}\n" for name in model_files(folder)))


def changed_files(folder: Path) -> list[str]:
    """What is not as it was saved, in words; [] when all is, or when no hashes were recorded.

    A weight file that was not there then counts too.
    """
    if not (folder / HASHES).is_file():
        return []
    lines = (line.split("  ", 1) for line in (folder / HASHES).read_text().splitlines())
    recorded = {name: digest for digest, name in lines}
    inside = {name: not Path(name).is_absolute() and ".." not in Path(name).parts for name in recorded}
    wrong = [f"{name}: its record leads out of the folder" for name, within in inside.items() if not within]
    for name, digest in recorded.items():
        if inside[name] and not (folder / name).is_file():
            wrong.append(f"{name} is missing")
        elif inside[name] and sha256(folder / name) != digest:
            wrong.append(f"{name} has changed since it was saved")
    added = {p.name for p in folder.glob("*.safetensors")} - recorded.keys()
    return wrong + [f"{name} was not there when it was saved" for name in sorted(added)]


def require_unchanged(*folders: str | Path) -> None:
    """Raise a CompressError naming every file that `changed_files` finds."""
    changed = [f"{folder}: {problem}" for folder in folders for problem in changed_files(Path(folder))]
    if changed:
        raise CompressError(
            "files are not as they were saved",
            where="; ".join(changed),
            next_step="copy or download the folder again; if you changed it on purpose, make it again",
        )


def probe(vocab_size: int, shape: tuple[int, int] = (2, 16)) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, (rows, tokens); the last quarter of the last row is padding."""
    ids = torch.randint(5, vocab_size, shape, generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[-1, shape[1] * 3 // 4 :] = 0
    return ids, mask


def verify(*folders: str | Path, tolerance: float = TOLERANCE) -> dict[str, dict[str, Any]]:
    """``verify("out")``: open each folder in one fresh process where importing hf_compress fails; folder -> facts.

    Checks: every file as its recorded hash says; plain from_pretrained with the class the config names; no missing,
    unexpected or mismatched key; no pickle file; finite logits within `tolerance` of the largest, of what the model in
    memory gave; zeros still zero; ties still tied; generate works; ONNX opens and agrees.

    Raises:
        CompressError: naming every problem found.
    """
    for folder in folders:
        for name in ("config.json", EXPECTATION):
            if not (Path(folder) / name).exists():
                raise CompressError(
                    f"no {name} here",
                    where=str(folder),
                    next_step="verify takes what `hf-compress run`, compress() or quantize() wrote",
                )
    require_unchanged(*folders)
    return _verified(folders, tolerance)


def verify_names(folder: Path) -> None:
    """Of a folder that is larger than memory: plain from_pretrained finds each tensor it wants, of its shape, and no
    other, and no pickle file. (Of containers that transformers can lay out without their values: plain folders and
    compressed-tensors, those that are written block by block. Of the latter's experts it looks at the codes alone, as
    transformers does.)

    Raises:
        CompressError: naming every problem found.
    """
    stored = json.loads((folder / "config.json").read_text()).get("quantization_config") or {}
    if stored.get("quant_method") in (None, "compressed-tensors"):
        _verified([folder], None)


def _verified(folders: Sequence[str | Path], tolerance: float | None) -> dict[str, dict[str, Any]]:
    report: dict[str, tuple[list[str], dict[str, Any]]] = {}
    readers = {folder: python_for(Path(folder)) for folder in folders}
    for python in dict.fromkeys(readers.values()):
        report |= _examined(python, [str(folder) for folder in folders if readers[folder] == python], tolerance)
    for folder, (found, facts) in report.items():
        if tolerance is not None and (Path(folder) / "openvino").is_dir():
            facts["openvino_difference"] = reopened("openvino", Path(folder) / "openvino")
            if not facts["openvino_difference"] <= tolerance:
                found.append(f"openvino differs by {facts['openvino_difference']:.1e} from what was exported")
    problems = [f"{folder}: {problem}" for folder, (found, _) in report.items() for problem in found]
    if problems:
        raise CompressError(
            "the checkpoint does not reload as it should",
            where="; ".join(problems),
            next_step="do not publish it; report how it was made",
        )
    return {folder: facts for folder, (_, facts) in report.items()}


def _examined(
    python: Path, folders: list[str], tolerance: float | None
) -> dict[str, tuple[list[str], dict[str, Any]]]:
    """What reload_check.py finds: folder -> (problems, facts)."""
    done = subprocess.run(
        [str(python), "-P", str(_CHILD), "names" if tolerance is None else str(tolerance), *folders],
        capture_output=True,
        text=True,
        env=None if python == Path(sys.executable) else clean_environment(),
    )
    line = next((x for x in done.stdout.splitlines() if x.startswith("REPORT")), None)
    if line is None:
        raise CompressError(
            "the process that opens the checkpoint died", where=folders[0], next_step=done.stderr.strip()[-500:]
        )
    found: dict[str, tuple[list[str], dict[str, Any]]] = json.loads(line.removeprefix("REPORT"))
    return found
