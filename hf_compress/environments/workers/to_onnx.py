"""A checkpoint as an ONNX file, decoders with their cache: fp32, or int8 with activations rounded as they come or on
calibrated scales; through optimum-onnx."""

import tempfile
from pathlib import Path
from typing import Any

from feeds import feeds
from job import Job, Refused, answers, difference, is_causal, main, open_dense, record, require_same, say


def work(job: Job) -> dict[str, Any]:
    from optimum.onnxruntime import ORTModelForCausalLM, ORTModelForSequenceClassification, ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    kind = ORTModelForCausalLM if is_causal(job) else ORTModelForSequenceClassification
    say("reading the checkpoint")
    open_dense(job)
    say("exporting to ONNX")
    try:
        model = kind.from_pretrained(job.checkpoint, export=True)
    except ValueError as error:
        raise Refused(f"optimum-onnx does not export it: {error}", "leave the export out") from error
    fp32_error = require_same(job, answers(model, job.probe), "ONNX Runtime")
    how = job.options["quantize"]
    if how is None:
        model.save_pretrained(job.target)
    else:
        static = how == "int8-static"
        with tempfile.TemporaryDirectory() as scratch:
            model.save_pretrained(scratch)
            quantizer = ORTQuantizer.from_pretrained(Path(scratch))
            chosen = AutoQuantizationConfig.avx512_vnni(is_static=static)
            ranges = calibrated(job, Path(scratch), chosen.operators_to_quantize) if static else None
            say(f"quantizing ({how})")
            quantizer.quantize(chosen, job.target, calibration_tensors_range=ranges)
    (file,) = job.target.glob("*.onnx")
    again = kind.from_pretrained(job.target, file_name=file.name)
    return {"file": file.name, "fp32_error": fp32_error} | difference(job, record(job, answers(again, job.probe)))


def calibrated(job: Job, folder: Path, operators: list[Any]) -> Any:
    """Smallest and largest value of each activation over the calibration rows. With onnxruntime's calibrator, since
    optimum's reader cannot feed a decoder its empty cache."""
    from onnxruntime import InferenceSession
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, create_calibrator

    session = InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    rows = iter(job.calibration)

    class Rows(CalibrationDataReader):
        def get_next(self) -> Any:
            row = next(rows, None)
            return row and feeds(session, row["input_ids"].numpy(), row["attention_mask"].numpy())

    say("calibrating")
    calibrator = create_calibrator(
        folder / "model.onnx",
        [getattr(operator, "value", operator) for operator in operators],
        augmented_model_path=str(folder / "augmented.onnx"),
        calibrate_method=CalibrationMethod.MinMax,
    )
    calibrator.collect_data(Rows())
    return calibrator.compute_data()


main(work)
