"""The fresh process of `verify`: opens checkpoints while importing hf_compress is impossible, and says what it found.

Run as a script: tolerance, then folders; "names" instead of it for folders that no memory here holds, of which names
and shapes are compared alone. Nothing imports this file.
"""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file


class Blocked:
    """First in the search for modules, so that a checkpoint that needs hf_compress fails here."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == "hf_compress":
            raise ModuleNotFoundError("hf_compress is blocked: the checkpoint must open without it")


sys.meta_path.insert(0, Blocked())
FEEDS = runpy.run_path(str(Path(__file__).parent / "environments" / "workers" / "feeds.py"))["feeds"]
transformers.logging.set_verbosity_error()


def examine(folder: Path, tolerance: float | None) -> tuple[list[str], dict[str, Any]]:
    """Problems (none: it is as it was saved) and measured facts of one folder."""
    problems: list[str] = []
    facts: dict[str, Any] = {}
    scratch = "training_args.bin"  # a Trainer's own: never opened by from_pretrained, and not published
    pickles = [p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".pkl"} and p.name != scratch]
    if pickles:
        problems.append("pickle files: " + ", ".join(pickles))
    config = json.loads((folder / "config.json").read_text())
    expected = load_file(folder / "verify" / "expectation.safetensors") if tolerance is not None else {}
    # with what the answers were recorded: in bfloat16 a GPU, or grouped experts, differ by more than 1e-3
    routed = config.get("num_experts_per_tok") is not None and not torch.cuda.is_available()
    eager = expected["eager_experts"].item() if "eager_experts" in expected else routed
    options: dict[str, Any] = {"experts_implementation": "eager"} if eager else {}
    if torch.cuda.is_available() and "cuda" in expected:
        options["device_map"] = {"": "cuda" if expected["cuda"] else "cpu"}
    stored = config.get("quantization_config") or {}
    if stored.get("quant_method") == "gptq":  # compare the stored weights, not the kernel of this machine
        options["quantization_config"] = transformers.GPTQConfig(bits=stored["bits"], backend="torch")
    if tolerance is None:
        options["device_map"] = "meta"
    kind = getattr(transformers, config["architectures"][0])
    model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(name):
            problems.append(f"{name}: {sorted(map(str, info[name]))[:3]}")
    if tolerance is None:
        return problems, facts
    model.eval()
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False  # compare the stored weights, not the repacked kernel
    head = model.get_output_embeddings() if config.get("tie_word_embeddings") else None
    if head is not None and head.weight.data_ptr() != model.get_input_embeddings().weight.data_ptr():
        problems.append("the output embedding is no longer tied to the input embedding")
    asked = {name: expected[name].to(model.device) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = model(**asked).logits.float().cpu()
    want = expected["logits"].float()
    if not torch.isfinite(logits).all():
        problems.append("logits are not finite")
    elif logits.shape != want.shape:
        problems.append(f"logits have shape {tuple(logits.shape)}, expected {tuple(want.shape)}")
    else:
        facts["logits_difference"] = float((logits - want).abs().max() / want.abs().max())
        if not facts["logits_difference"] <= tolerance:  # NaN too
            problems.append(f"logits differ by {facts['logits_difference']:.1e} of the largest, above {tolerance:g}")
    state = model.state_dict()
    for key in expected:
        if key.startswith("zeros."):
            name = key[len("zeros.") :]
            if name in state and int((state[name] == 0).sum()) < int(expected[key]):
                problems.append(f"{name} has {int((state[name] == 0).sum())} zeros, expected {int(expected[key])}")
    if model.can_generate():
        model.generate(**{name: rows[:1] for name, rows in asked.items()}, max_new_tokens=4, do_sample=False)
        facts["generates"] = True
    for path in sorted((folder / "onnx").glob("*.onnx")) if (folder / "onnx").is_dir() else []:
        from onnxruntime import InferenceSession

        facts_of_export = json.loads((folder / "onnx" / "export.json").read_text())
        session = InferenceSession(path, providers=["CPUExecutionProvider"])
        rows = [expected[name].numpy() for name in ("input_ids", "attention_mask")]
        (got,) = session.run(["logits"], FEEDS(session, *rows))
        want_onnx = expected["onnx_logits"].numpy()
        facts["onnx_difference"] = float(abs(got - want_onnx).max() / abs(want_onnx).max())
        if not facts["onnx_difference"] <= tolerance:
            problems.append(
                f"{path.name} differs by {facts['onnx_difference']:.1e} from what was exported, above {tolerance:g}"
            )
        facts["onnx_error"] = facts_of_export["error"]
    facts["class"], facts["parameters"] = type(model).__name__, sum(p.numel() for p in model.parameters())
    return problems, facts


report = {}
for folder in sys.argv[2:]:
    try:
        report[folder] = examine(Path(folder), None if sys.argv[1] == "names" else float(sys.argv[1]))
    except Exception as error:  # whatever goes wrong in a plain load is the finding
        report[folder] = ([f"{type(error).__name__}: {str(error)[:300]}"], {})
print("REPORT" + json.dumps(report))
