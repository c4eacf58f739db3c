"""Opens a folder with the library it was made for and answers batches until its input ends."""

from collections.abc import Callable
from typing import Any

import torch
from job import Job, answers, is_causal, serve


def work(job: Job) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    library, causal = job.options["library"], is_causal(job)
    options: dict[str, Any] = {}
    if library == "openvino":
        from optimum.intel import OVModelForCausalLM, OVModelForSequenceClassification

        kind = OVModelForCausalLM if causal else OVModelForSequenceClassification
        exact = {"INFERENCE_PRECISION_HINT": "f32"} if job.options["exact"] else {}
        options["ov_config"] = exact | {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    elif library == "onnx":
        from optimum.onnxruntime import ORTModelForCausalLM, ORTModelForSequenceClassification

        kind = ORTModelForCausalLM if causal else ORTModelForSequenceClassification
        options["file_name"] = next(job.checkpoint.glob("*.onnx")).name
    else:
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        kind = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    model = kind.from_pretrained(job.checkpoint, **options)
    return lambda batch: answers(model, batch)


serve(work)
