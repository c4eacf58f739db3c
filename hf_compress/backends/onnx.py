"""ONNX Runtime: an int8 file for CPUs, beside the plain checkpoint."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_compress.calibration import Batch
from hf_compress.errors import CompressError, require
from hf_compress.families import family_of

EXPORT_TOLERANCE = 1e-3  # relative to the largest logit, fp32 file against torch
PROBES = ((2, 7), (3, 21))  # (batch, length) at which answers are compared; the export is traced at another
INPUTS = ("input_ids", "attention_mask")
MASKED = -50.0  # added to a score of padding: it weighs e^-50 then, and is far from denormal numbers (below e^-87)
COSTLY = ("MatMul", "Gemm", "Gather", "LayerNormalization", "Softmax", "Erf", "Gelu", "Tanh")


class _Logits(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


def export_onnx(
    model: PreTrainedModel,
    folder: Path,
    *,
    quantize: str | None = "int8",
    plain: bool = False,
    batches: Sequence[Batch] = (),
) -> dict[str, Any]:
    """Write ``folder/onnx/model_quantized.onnx`` (int8, int8-static) or ``model.onnx`` (fp32): (input_ids,
    attention_mask) -> logits, any batch and length.

    int8 is onnxruntime's dynamic quantization: int8 weights (embeddings too), one scale for each output channel of a
    matrix, activations rounded as they come. Weights keep to -64 .. 64: without VNNI instructions a CPU adds two
    products in 16 bits, and the whole range overflows there (1.8 of the largest logit, on a random model).
    int8-static: each activation has one fixed range, the one seen in `batches`; weights as with int8. Outliers make
    that coarser than a range for each input (facts: dynamic_error, static_error, relative errors on `batches`), and
    without VNNI it is no faster: for runtimes that take nothing else.
    plain: the exporter's graph, one scale for a whole matrix and the whole range, what a person gets without this
    library; else attention is exported in its eager form (fewer nodes) and eased for onnxruntime (see `_ease`):
    together about 1.7x faster at batch 32.
    The fp32 export is compared with torch at shapes it was not traced at, with padding. Facts: bytes, the relative
    errors of the logits, int8_nodes and fp32_nodes (kind -> how many).

    Raises:
        CompressError: onnx libraries missing; nothing to calibrate on; an architecture whose export is wrong or not
        checked; logits that differ.
    """
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, extra="onnx", what="export to ONNX")
    check(quantize)
    if quantize == "int8-static" and not batches:
        raise CompressError(
            "static ranges are those of activations on real text, and there is none",
            where="export.quantize",
            next_step="add a data: section, or use quantize: int8",
        )
    if why := refusal(model.config):
        raise CompressError(why, where="export", next_step="export encoders, or leave this stage out")
    model = copy.deepcopy(model).float().cpu()  # the caller keeps its dtype and device
    target = folder / "onnx"
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        exported = Path(scratch) / "model.onnx"
        if not plain:
            model.set_attn_implementation("eager")
        _export(model, exported)
        if not plain:
            _ease(exported)
        fp32_error = max(_difference(model, exported, shape) for shape in PROBES)
        if fp32_error > EXPORT_TOLERANCE:
            raise CompressError(
                f"the exported graph differs from torch by {fp32_error:.1e} of the largest logit",
                where="export",
                next_step="report the architecture; do not ship this file",
            )
        final = target / ("model.onnx" if quantize is None else "model_quantized.onnx")
        compared: dict[str, float] = {}
        if quantize is None:
            final.write_bytes(exported.read_bytes())
        else:
            _dynamic(exported, final, plain=plain)
        if quantize == "int8-static":
            compared["dynamic_error"] = _error_on(model, final, batches)
            _static(exported, final, batches)
            compared["static_error"] = _error_on(model, final, batches)
    facts = (
        compared
        | _nodes(final)
        | {
            "file": final.name,
            "bytes": final.stat().st_size,
            "fp32_error": fp32_error,
            "error": max(_difference(model, final, s) for s in PROBES),
        }
    )
    (target / "export.json").write_text(json.dumps(facts, indent=2))
    return facts


def refusal(config: PreTrainedConfig) -> str:
    """Why a model of this config is not exported; "" when it is."""
    name = family_of(config).name
    if name == "bert":
        return ""
    return f"format onnx is for encoders: a file of a {name} model without its cache would not serve" + (
        "" if family_of(config).experts else " (`format: optimum-onnx`, after `hf-compress env add onnx`, writes one)"
    )


def check(quantize: str | None) -> None:
    """Raise a CompressError for a quantization that there is not."""
    if quantize not in (None, "int8", "int8-static"):
        raise CompressError(
            f"unknown ONNX quantization {quantize!r}",
            where="export.quantize",
            next_step="int8 (dynamic), int8-static, or leave it empty for fp32",
        )


def _dynamic(exported: Path, final: Path, *, plain: bool) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    how = {} if plain else {"per_channel": True, "reduce_range": True}
    quantize_dynamic(exported, final, weight_type=QuantType.QInt8, **how)


def _static(exported: Path, final: Path, batches: Sequence[Batch]) -> None:
    """Matrices of weights and embeddings only, as `_dynamic`: products of two activations stay in fp32."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.left, None)
            return None if batch is None else {name: batch[name].numpy() for name in INPUTS}

    quantize_static(
        exported,
        final,
        Reader(),
        quant_format=QuantFormat.QOperator,
        op_types_to_quantize=["MatMul", "Gemm", "Gather"],
        per_channel=True,
        reduce_range=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        extra_options={"MatMulConstBOnly": True},
    )


def _nodes(path: Path) -> dict[str, dict[str, int]]:
    """How many nodes of each kind work on int8, and how many of those that cost time on fp32."""
    import onnx

    graph = onnx.load(path).graph
    packed = {i.name for i in graph.initializer if i.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)}
    int8, fp32 = Counter[str](), Counter[str]()
    for node in graph.node:
        if packed & set(node.input) and node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            int8[node.op_type] += 1
        elif node.op_type in COSTLY:
            fp32[node.op_type] += 1
    return {"int8_nodes": dict(sorted(int8.items())), "fp32_nodes": dict(sorted(fp32.items()))}


def _export(model: PreTrainedModel, path: Path) -> None:
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    ids, mask = _probe(model, (2, 16))
    program = torch.onnx.export(
        _Logits(model.eval()),
        (ids, mask),
        dynamo=True,
        input_names=["input_ids", "attention_mask"],
        output_names=["logits"],
        dynamic_shapes=({0: batch, 1: length}, {0: batch, 1: length}),
        verbose=False,
    )
    assert program is not None
    program.save(path)


def _ease(path: Path) -> None:
    """Two changes of the graph in `path` that keep its answers and spare onnxruntime's CPU kernels what is slow there.

    ``Sum`` for the ``Add`` that feeds a layer norm: Add + LayerNormalization are fused into a kernel that takes four
    times as long as the two apart (1.32: 14.8 against 3.3 ms of a 35 ms run); Sum, the same, is not looked for.

    `MASKED` for the lowest number that attention adds to the scores of padding: exp of that is no zero in its softmax
    but a denormal number, five times as slow to handle (half of 8 x 128 tokens padding: 78 against 60 ms a run).
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path)
    makers = {output: node for node in graph.graph.node for output in node.output}
    for node in graph.graph.node:
        maker = makers.get(node.input[0]) if node.op_type == "LayerNormalization" else None
        if maker is not None and maker.op_type == "Add":
            maker.op_type = "Sum"
    for stored in graph.graph.initializer:
        if stored.data_type == onnx.TensorProto.FLOAT and not stored.dims:
            value = numpy_helper.to_array(stored)
            if value <= np.finfo(np.float32).min:
                stored.CopyFrom(numpy_helper.from_array(np.full_like(value, MASKED), stored.name))
    onnx.save(graph, path)


def _probe(model: PreTrainedModel, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Rows of random tokens, all but the first padded from half of it."""
    made, mask = torch.Generator().manual_seed(0), torch.ones(shape, dtype=torch.long)
    ids = torch.randint(5, model.config.vocab_size, shape, generator=made)
    mask[1:, shape[1] // 2 :] = 0
    return ids.masked_fill(mask == 0, model.config.pad_token_id or 0), mask


@torch.no_grad()
def _error_on(model: PreTrainedModel, path: Path, batches: Sequence[Batch]) -> float:
    """Root mean square of the logits' difference over that of the logits, on text."""
    from onnxruntime import InferenceSession

    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    off = size = 0.0
    for batch in batches:
        want = model(**{name: batch[name] for name in INPUTS}).logits.double()
        (got,) = session.run(None, {name: batch[name].numpy() for name in INPUTS})
        off, size = off + float((torch.from_numpy(got) - want).square().sum()), size + float(want.square().sum())
    return float((off / size) ** 0.5)


@torch.no_grad()
def _difference(model: PreTrainedModel, path: Path, shape: tuple[int, int]) -> float:
    """Largest difference of the logits over the largest logit, at (batch, length); of token classifiers where there is
    a token."""
    from onnxruntime import InferenceSession

    ids, mask = _probe(model, shape)
    expected = model(input_ids=ids, attention_mask=mask).logits.float()
    (got,) = InferenceSession(path, providers=["CPUExecutionProvider"]).run(
        None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    )
    off = (torch.from_numpy(got) - expected).abs()
    read = mask == 1 if off.ndim == 3 else slice(None)
    return float(off[read].max() / expected[read].abs().max())


@contextlib.contextmanager
def _quiet() -> Any:
    """The exporter and the quantizer print progress and warn about internals of torch."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
