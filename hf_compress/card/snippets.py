"""How to use the model: code that runs as it stands, once what it names is installed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

COPIES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}  # folder beside the checkpoint -> who reads it
AUTO = {"causal-lm": "AutoModelForCausalLM", "text-classification": "AutoModelForSequenceClassification"}


@dataclass(frozen=True)
class Snippet:
    """title: one line before it. needs: packages to install. code: Python."""

    title: str
    needs: tuple[str, ...]
    code: str


def snippets(facts: dict[str, Any], *, place: str) -> list[Snippet]:
    """One for each container in the folder. place: id on the Hub, or "." for the folder one stands in."""
    files = facts["files"]
    container = facts["container"] or {}
    needs = ("torch", "transformers", *([container["needs"]] if container.get("needs") else []))
    if any(stage["kind"] == "cache" for stage in facts["stages"]):
        needs += ("hqq",)
    if "tokenizer_config.json" not in files:
        return [Snippet("With transformers, on token ids", needs, _ids(facts["task"], place))]
    found = [
        Snippet("With a pipeline", needs, _PIPELINE[facts["task"]].format(place=place)),
        Snippet("With transformers", needs, _TORCH.format(auto=AUTO[facts["task"]], place=place)),
    ]
    found += [_through_optimum(s["facts"], facts["task"], place) for s in facts["stages"] if s["facts"].get("format")]
    optimum = {f"onnx/{s['facts'].get('file')}" for s in facts["stages"] if s["facts"].get("format") == "optimum-onnx"}
    for name in sorted(name for name in files if name.startswith("onnx/") and name.endswith(".onnx")):
        if name in optimum:
            continue  # a decoder's graph takes a cache too: see the snippet above
        get = f'"{name}"' if place == "." else f'hf_hub_download("{place}", "{name}")'
        hub = "" if place == "." else "from huggingface_hub import hf_hub_download\n"
        found.append(
            Snippet(
                "With ONNX Runtime, on a CPU",
                ("onnxruntime", "transformers"),
                _ONNX.format(get=get, hub=hub, place=place),
            )
        )
    return found


def _through_optimum(export: dict[str, Any], task: str, place: str) -> Snippet:
    """For a copy that optimum wrote and reads, in an environment of its own."""
    folder, module, prefix, extra = (
        ("openvino", "optimum.intel", "OV", "optimum-intel[openvino]")
        if export["format"] == "openvino"
        else ("onnx", "optimum.onnxruntime", "ORT", "optimum-onnx[onnxruntime]")
    )
    kind = AUTO[task].replace("Auto", prefix)
    where = f'"{folder}"' if place == "." else f'"{place}", subfolder="{folder}"'
    file = f', file_name="{export["file"]}"' if prefix == "ORT" else ""
    code = (
        f"from {module} import {kind}\nfrom transformers import AutoTokenizer\n\n"
        f'inputs = AutoTokenizer.from_pretrained("{place}")("An example.", return_tensors="pt")\n'
        f"logits = {kind}.from_pretrained({where}{file})(**inputs).logits\n"
    )
    return Snippet(f"With {COPIES[folder]}, in an environment of its own", (f"'{extra}'",), code)


_PIPELINE = {
    "causal-lm": """from transformers import pipeline

write = pipeline("text-generation", model="{place}")
print(write("The film was", max_new_tokens=20, do_sample=False)[0]["generated_text"])
""",
    "text-classification": """from transformers import pipeline

classify = pipeline("text-classification", model="{place}")
print(classify("An example."))
""",
}
_TORCH = """import torch
from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{place}")
model = {auto}.from_pretrained("{place}")
with torch.no_grad():
    logits = model(**tokenizer("An example.", return_tensors="pt")).logits
"""
_ONNX = """{hub}from onnxruntime import InferenceSession
from transformers import AutoTokenizer

session = InferenceSession({get})
inputs = AutoTokenizer.from_pretrained("{place}")(["An example."], return_tensors="np")
(logits,) = session.run(None, {{name: inputs[name] for name in ("input_ids", "attention_mask")}})
"""


def _ids(task: str, place: str) -> str:
    auto = AUTO[task]
    return (
        f'import torch\nfrom transformers import {auto}\n\nmodel = {auto}.from_pretrained("{place}")\n'
        "with torch.no_grad():\n    logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits\n"
    )
