"""A checkpoint with its block matrices rounded by GPTQ, in gptqmodel's format; through optimum and transformers."""

import json
from typing import Any

from job import TOLERANCE, Job, Refused, answers, difference, is_causal, main, open_dense, record, say

PLAIN = "torch"  # the kernel that multiplies by what is stored; others round activations or sums to 16 bits


def work(job: Job) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPTQConfig

    if not job.calibration:
        raise Refused("GPTQ needs calibration text", "give the recipe a data: section")
    auto = AutoModelForCausalLM if is_causal(job) else AutoModelForSequenceClassification
    say("reading the checkpoint")
    open_dense(job)
    say(f"rounding on {len(job.calibration)} rows, block by block")
    asked = {k: job.options[k] for k in ("block_name_to_quantize", "modules_in_block_to_quantize")}
    config = GPTQConfig(
        bits=job.options["bits"],
        group_size=job.options["group_size"] or -1,
        desc_act=job.options["act_order"],
        act_group_aware=bool(job.options["group_size"]) and not job.options["act_order"],
        sym=job.options["symmetric"],
        damp_percent=job.options["damping"],
        dataset=[{k: v.tolist() for k, v in row.items()} for row in job.calibration],
        backend=PLAIN,
        model_seqlen=max(row["input_ids"].shape[1] for row in job.calibration),
        **asked,
    )
    model = auto.from_pretrained(job.checkpoint, dtype=job.options["dtype"], quantization_config=config)
    rounded = answers(model, job.probe)
    model.save_pretrained(job.target)
    described = json.loads((job.target / "config.json").read_text())
    described["quantization_config"] |= asked | {"dataset": None}  # which blocks: a reader would guess, or fail
    described["quantization_config"].pop("backend", None)
    (job.target / "config.json").write_text(json.dumps(described, indent=2))
    say("opening what was written")
    plain = GPTQConfig(bits=job.options["bits"], backend=PLAIN)
    again = auto.from_pretrained(job.target, quantization_config=plain).eval()
    read = record(job, answers(again, job.probe))
    error = float((read - rounded).abs().max() / rounded.abs().max())
    if not error <= TOLERANCE:
        raise Refused(f"what was written answers otherwise than what was rounded: {error:.1e} of the largest logit")
    say("opening it with the kernel this machine would choose")
    chosen = answers(auto.from_pretrained(job.target).eval(), job.probe)
    kernel = float((chosen - read).abs().max() / read.abs().max())
    made = [name for name, module in again.named_modules() if hasattr(module, "qweight")]
    return {"reopened_difference": error, "kernel_difference": kernel, "rounded": made} | difference(job, read)


main(work)
