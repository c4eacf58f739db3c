"""How to use the model: code that runs as it stands, once what it names is installed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
    if "tokenizer_config.json" not in files:
        return [Snippet("With transformers, on token ids", needs, _ids(facts["task"], place))]
    found = [
        Snippet("With a pipeline", needs, _PIPELINE[facts["task"]].format(place=place)),
        Snippet("With transformers", needs, _TORCH.format(auto=AUTO[facts["task"]], place=place)),
    ]
    onnx = sorted(name for name in files if name.startswith("onnx/") and name.endswith(".onnx"))
    for name in onnx:
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
