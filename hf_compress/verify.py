"""Does a finished folder open without hf_compress? Asked in a fresh process that cannot import it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from hf_compress.errors import CompressError
from hf_compress.weights import weights

EXPECTATION = "expectation.safetensors"
TOLERANCE = 1e-3  # of the largest logit: another process may sum in another order

_CHILD = '''
import json, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_compress":
            raise ModuleNotFoundError("hf_compress is blocked: the checkpoint must open without it")
sys.meta_path.insert(0, Blocked())
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file
transformers.logging.set_verbosity_error()

def examine(folder, tolerance):
    problems, facts = [], {}
    pickles = [p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".pkl"}]
    if pickles:
        problems.append("pickle files: " + ", ".join(pickles))
    config = json.loads((folder / "config.json").read_text())
    model, info = getattr(transformers, config["architectures"][0]).from_pretrained(folder, output_loading_info=True)
    for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(name):
            problems.append(f"{name}: {sorted(map(str, info[name]))[:3]}")
    model.eval()
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False  # compare the stored weights, not the repacked kernel
    if config.get("tie_word_embeddings") and model.get_output_embeddings() is not None:
        if model.get_output_embeddings().weight.data_ptr() != model.get_input_embeddings().weight.data_ptr():
            problems.append("the output embedding is no longer tied to the input embedding")
    expected = load_file(folder / "expectation.safetensors")
    with torch.no_grad():
        logits = model(input_ids=expected["input_ids"], attention_mask=expected["attention_mask"]).logits.float()
    want = expected["logits"].float()
    if not torch.isfinite(logits).all():
        problems.append("logits are not finite")
    elif logits.shape != want.shape:
        problems.append(f"logits have shape {tuple(logits.shape)}, expected {tuple(want.shape)}")
    else:
        facts["logits_difference"] = float((logits - want).abs().max() / want.abs().max())
        if facts["logits_difference"] > tolerance:
            problems.append(f"logits differ by {facts['logits_difference']:.1e} of the largest, above {tolerance:g}")
    state = model.state_dict()
    for key in expected:
        if key.startswith("zeros."):
            name = key[len("zeros."):]
            if name in state and int((state[name] == 0).sum()) < int(expected[key]):
                problems.append(f"{name} has {int((state[name] == 0).sum())} zeros, expected {int(expected[key])}")
    if model.can_generate():
        model.generate(expected["input_ids"][:1], attention_mask=expected["attention_mask"][:1], max_new_tokens=4, do_sample=False)
        facts["generates"] = True
    for path in sorted((folder / "onnx").glob("*.onnx")) if (folder / "onnx").is_dir() else []:
        from onnxruntime import InferenceSession
        facts_of_export = json.loads((folder / "onnx" / "export.json").read_text())
        (got,) = InferenceSession(path, providers=["CPUExecutionProvider"]).run(
            None, {"input_ids": expected["input_ids"].numpy(), "attention_mask": expected["attention_mask"].numpy()})
        want_onnx = expected["onnx_logits"].numpy()
        facts["onnx_difference"] = float(abs(got - want_onnx).max() / abs(want_onnx).max())
        if not facts["onnx_difference"] <= tolerance:
            problems.append(f"{path.name} differs by {facts['onnx_difference']:.1e} from what was exported, above {tolerance:g}")
        facts["onnx_error"] = facts_of_export["error"]
    facts["class"], facts["parameters"] = type(model).__name__, sum(p.numel() for p in model.parameters())
    return problems, facts

report = {}
for folder in sys.argv[2:]:
    try:
        report[folder] = examine(Path(folder), float(sys.argv[1]))
    except Exception as error:  # whatever goes wrong in a plain load is the finding
        report[folder] = ([f"{type(error).__name__}: {str(error)[:300]}"], {})
print("REPORT" + json.dumps(report))
'''


def write_expectation(model: PreTrainedModel, folder: Path) -> None:
    """Record, beside the checkpoint, what the model in memory answers to a fixed probe, its zeros, and what the ONNX file answers.

    ``expectation.safetensors``: input_ids (2, 16), attention_mask, logits, zeros.NAME (the count of exact zeros of each pruned parameter).
    """
    made = torch.Generator().manual_seed(1)
    ids = torch.randint(5, model.config.vocab_size, (2, 16), generator=made)
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    with torch.no_grad():
        tensors = {"input_ids": ids, "attention_mask": mask, "logits": model(input_ids=ids, attention_mask=mask).logits.float().contiguous()}
    for parameter, whole in {w.parameter: w.whole for w in weights(model)}.items():
        zeros = int((whole == 0).sum()) if whole.is_floating_point() else 0
        if zeros > 0.01 * whole.numel():
            tensors[f"zeros.{parameter}"] = torch.tensor(zeros)
    files = sorted((folder / "onnx").glob("*.onnx"))
    if files:
        from onnxruntime import InferenceSession

        (got,) = InferenceSession(files[0], providers=["CPUExecutionProvider"]).run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        tensors["onnx_logits"] = torch.from_numpy(got)
    save_file(tensors, folder / EXPECTATION)


def verify(*folders: Path, tolerance: float = TOLERANCE) -> dict[str, dict[str, Any]]:
    """Open each folder in one fresh process where importing hf_compress fails; folder -> facts.

    Checks: plain from_pretrained with the class the config names; no missing, unexpected or mismatched key; no pickle file; finite logits within
    `tolerance` of the largest, of what the model in memory gave; zeros still zero; ties still tied; generate works; ONNX opens and agrees.

    Raises:
        CompressError: naming every problem found.
    """
    for folder in folders:
        for name in ("config.json", EXPECTATION):
            if not (folder / name).exists():
                raise CompressError(f"no {name} here", where=str(folder), next_step="verify takes a folder that `hf-compress run` finished")
    done = subprocess.run([sys.executable, "-c", _CHILD, str(tolerance), *map(str, folders)], capture_output=True, text=True)
    line = next((x for x in done.stdout.splitlines() if x.startswith("REPORT")), None)
    if line is None:
        raise CompressError("the process that opens the checkpoint died", where=str(folders[0]), next_step=done.stderr.strip()[-500:])
    report = json.loads(line.removeprefix("REPORT"))
    problems = [f"{folder}: {problem}" for folder, (found, _) in report.items() for problem in found]
    if problems:
        raise CompressError("the checkpoint does not reload as it should", where="; ".join(problems), next_step="do not publish it; report how it was made")
    return {folder: facts for folder, (_, facts) in report.items()}
