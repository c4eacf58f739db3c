"""Static int8: ranges come from text, its error is compared with dynamic, what stays in fp32 is counted."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import RobertaConfig, RobertaForSequenceClassification

from hf_compress.backends.onnx import export_onnx
from hf_compress.errors import CompressError
from hf_compress.recipe import parse
from hf_compress.verification import verify, write_expectation, write_onnx_expectation
from tests.models import CONFIGS, tiny


def batches(count: int = 4) -> list[dict[str, torch.Tensor]]:
    made = torch.Generator().manual_seed(0)
    found = []
    for rows in range(1, count + 1):
        ids = torch.randint(5, 128, (rows, 8 + rows), generator=made)
        mask = torch.ones_like(ids)
        mask[0, -2:] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def test_static_ranges_are_those_of_the_text_and_its_error_is_told(tmp_path: Path) -> None:
    model = tiny("bert")
    facts = export_onnx(model, tmp_path, quantize="int8-static", batches=batches())
    assert 0 < facts["dynamic_error"] < facts["static_error"] < 0.3
    assert facts["int8_nodes"]["QLinearMatMul"] == 12
    assert facts["fp32_nodes"]["MatMul"] == 4  # scores and values of attention: products of two activations
    assert "QLinearMatMul" not in facts["fp32_nodes"]
    graph = onnx.load(tmp_path / "onnx" / "model_quantized.onnx").graph
    values = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    weights = [n for n in graph.node if n.op_type == "QLinearMatMul"]
    assert all(values[n.input[4]].size == values[n.input[3]].shape[1] for n in weights)  # a scale for each channel
    assert max(int(abs(values[n.input[3]].astype(int)).max()) for n in weights) <= 64
    model.save_pretrained(tmp_path)
    write_expectation(model, tmp_path)
    write_onnx_expectation(tmp_path)
    assert verify(tmp_path)[str(tmp_path)]["onnx_difference"] < 1e-3


def test_dynamic_int8_counts_its_nodes_too_and_keeps_to_seven_bits(tmp_path: Path) -> None:
    facts = export_onnx(tiny("bert"), tmp_path)
    assert facts["int8_nodes"]["MatMulInteger"] == 14  # those of the blocks, the pooler and the head
    assert facts["fp32_nodes"]["MatMul"] == 4
    assert "static_error" not in facts
    graph = onnx.load(tmp_path / "onnx" / "model_quantized.onnx").graph
    values = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    for node in (n for n in graph.node if n.op_type == "MatMulInteger"):
        codes, zeros = values[node.input[1]], values[node.input[3]]
        assert abs(codes.astype(int)).max() <= 64  # eight bits overflow on a CPU without VNNI, unlike this one perhaps
        assert zeros.size == codes.shape[1]  # a scale for each channel


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_padding_weighs_nothing_and_is_no_denormal_number(kind: str, tmp_path: Path) -> None:
    model = tiny("bert")
    if kind == "roberta":  # whose positions count from the padding token on
        config = RobertaConfig(**CONFIGS["bert"] | {"pad_token_id": 1, "type_vocab_size": 1})
        model = RobertaForSequenceClassification(config).eval()
    assert export_onnx(model, tmp_path, quantize=None)["fp32_error"] < 1e-4  # some of the rows compared are padded
    graph = onnx.load(tmp_path / "onnx" / "model.onnx")
    weights = [n.output[0] for n in graph.graph.node if n.op_type == "Softmax"]
    graph.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in weights)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    (batch,) = batches(1)
    found = session.run(weights, {name: value.numpy() for name, value in batch.items()})
    assert len(found) == model.config.num_hidden_layers
    for each in found:
        assert (each[..., :-2] > 1e-9).all()
        assert (each[..., -2:] < 1e-15).all()
        assert (each[..., -2:] > np.finfo(np.float32).tiny).all()  # slow below: five times in onnxruntime's softmax


def test_static_needs_text_and_other_kinds_are_unknown(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match=r"there is none[\s\S]*data: section"):
        export_onnx(tiny("bert"), tmp_path, quantize="int8-static")
    for stage, reason in (
        ({"quantize": "int4"}, r"'int4'[\s\S]*export.quantize[\s\S]*static"),
        ({"samples": "x"}, "samples"),
    ):
        with pytest.raises(CompressError, match=reason):
            parse({"name": "x", "model": {"id": "unread"}, "stages": [{"export": stage}]})
