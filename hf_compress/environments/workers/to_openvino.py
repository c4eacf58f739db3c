"""A checkpoint as OpenVINO's IR: fp32, int8 or int4 weights, or int8 with calibrated activations; through
optimum-intel."""

from typing import Any

from job import Job, Refused, answers, difference, is_causal, main, open_dense, record, require_same, say

F32 = {"INFERENCE_PRECISION_HINT": "f32"}  # else the CPU plugin rounds everything to bfloat16


def work(job: Job) -> dict[str, Any]:
    import optimum.intel as intel

    kind = intel.OVModelForCausalLM if is_causal(job) else intel.OVModelForSequenceClassification
    say("reading the checkpoint")
    open_dense(job)
    say("converting to OpenVINO")
    try:
        model = kind.from_pretrained(job.checkpoint, export=True, load_in_8bit=False, ov_config=F32, compile=False)
    except ValueError as error:
        raise Refused(f"optimum-intel does not convert it: {error}", "leave the export out") from error
    fp32_error = require_same(job, answers(model, job.probe), "OpenVINO")
    how = job.options["quantize"]
    if how is None:
        model.save_pretrained(job.target)
    else:
        say(f"quantizing ({how})")
        rows = calibration(job, model.input_names) if how == "int8-static" else None
        chosen = {
            "int8": lambda: intel.OVWeightQuantizationConfig(bits=8),
            "int4": lambda: intel.OVWeightQuantizationConfig(bits=4, group_size=job.options["group_size"]),
            "int8-static": lambda: intel.OVQuantizationConfig(num_samples=len(job.calibration)),
        }[how]()
        intel.OVQuantizer.from_pretrained(model).quantize(
            calibration_dataset=rows,
            ov_config=intel.OVConfig(quantization_config=chosen),
            save_directory=job.target,
        )
    again = kind.from_pretrained(job.target, ov_config=F32)
    return {"file": "openvino_model.bin", "fp32_error": fp32_error} | difference(
        job, record(job, answers(again, job.probe))
    )


def calibration(job: Job, names: list[str]) -> Any:
    """The rows as a datasets.Dataset, with the token types that an encoder's graph takes."""
    from datasets import Dataset

    rows = [{name: row[name][0].tolist() for name in ("input_ids", "attention_mask")} for row in job.calibration]
    if "token_type_ids" in names:
        rows = [row | {"token_type_ids": [0] * len(row["input_ids"])} for row in rows]
    return Dataset.from_list(rows)


main(work)
