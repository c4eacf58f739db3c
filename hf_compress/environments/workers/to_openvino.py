"""A checkpoint as OpenVINO's IR: fp32, int8 or int4 weights, or int8 with calibrated activations; through
optimum-intel."""

import json

from job import Job, Refused, answers, difference, main, open_dense, require_same, say

F32 = {"INFERENCE_PRECISION_HINT": "f32"}  # the CPU plugin would round everything to bfloat16


def work(job: Job) -> dict:
    import optimum.intel as intel

    config = json.loads((job.checkpoint / "config.json").read_text())
    causal = config["architectures"][0].endswith(("ForCausalLM", "LMHeadModel"))
    kind = intel.OVModelForCausalLM if causal else intel.OVModelForSequenceClassification
    say("reading the checkpoint")
    open_dense(job)
    say("converting to OpenVINO")
    try:
        model = kind.from_pretrained(job.checkpoint, export=True, load_in_8bit=False, ov_config=F32, compile=False)
    except ValueError as error:
        raise Refused(f"optimum-intel does not convert it: {error}", "leave the export out") from error
    fp32_error = require_same(job, answers(model, job.probe), "OpenVINO")
    how = job.options["quantize"]
    if how is not None:
        say(f"quantizing ({how})")
        quantizer = intel.OVQuantizer.from_pretrained(model)
        given = None
        if how == "int8-static":
            chosen = intel.OVQuantizationConfig(num_samples=len(job.calibration))
            given = [{k: v[0].tolist() for k, v in row.items()} for row in job.calibration]
        elif how == "int8":
            chosen = intel.OVWeightQuantizationConfig(bits=8)
        else:
            chosen = intel.OVWeightQuantizationConfig(bits=4, group_size=job.options["group_size"] or 32, all_layers=True)
        quantizer.quantize(
            calibration_dataset=given and as_dataset(given),
            ov_config=intel.OVConfig(quantization_config=chosen),
            save_directory=job.target,
        )
    else:
        model.save_pretrained(job.target)
    again = kind.from_pretrained(job.target, ov_config=F32)
    facts = {"fp32_error": fp32_error} | difference(job, answers(again, job.probe))
    return facts


def as_dataset(rows: list):
    from datasets import Dataset

    return Dataset.from_list(rows)


main(work)
