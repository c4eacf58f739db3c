"""One-shot pruning: exact counts, true statistics on the compressed prefix, resuming, and the same result from a
streamed checkpoint."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_compress.backends import backends, quantize
from hf_compress.coverage import coverage
from hf_compress.criteria import Statistics
from hf_compress.errors import CompressError
from hf_compress.grids import Grid, fake_quantize, scales
from hf_compress.oneshot import (
    OneshotReport,
    Solved,
    Solver,
    compress_blocks,
    compress_checkpoint,
    empty_model,
    prune,
    run_blocks,
    solvers,
)
from hf_compress.oneshot import engine as engine_module
from hf_compress.oneshot.checkpoint import MARKER, _Streamed
from hf_compress.oneshot.engine import Notes
from hf_compress.oneshot.memory import InMemory
from hf_compress.source import ModelSource
from hf_compress.stages import Quantize, Work
from hf_compress.techniques.qat import QAT
from hf_compress.weights import blocks_of, weights
from tests.models import CONFIGS, tiny
from tests.training import collate, rows, trainer


def batches(size: int = 4) -> list[dict[str, torch.Tensor]]:
    data = rows(16)
    made = [collate([data[i] for i in range(start, start + size)]) for start in range(0, 16, size)]
    return [{k: b[k] for k in ("input_ids", "attention_mask")} for b in made]


def by_criterion(criterion: str = "wanda", sparsity: float = 0.5) -> Solver:
    return solvers["criterion"](criterion=criterion, sparsity=sparsity)


def record(model, given, needs=("input_norm", "hessian"), *, staged=False) -> dict[str, Statistics]:
    """Statistics as the solver sees them, nothing changed."""
    seen: dict[str, Statistics] = {}

    def solver(group, statistics):
        seen.update((weight.name, statistics) for weight in group)
        return [Solved(weight.matrix.clone()) for weight in group]

    run_blocks(model, given, Solver(solver, needs, staged), InMemory(model, None, ""))
    return seen


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_of_every_family_is_pruned_exactly(name: str) -> None:
    model = tiny(name)
    report = prune(model, batches(), method="criterion", sparsity=0.5)
    assert set(report.touched) == {w.name for w in weights(model)}
    for weight in weights(model):
        assert ((weight.matrix == 0).sum(1) == weight.shape[1] // 2).all(), weight.name


def test_two_of_four_and_magnitude() -> None:
    model = tiny("llama")
    prune(model, batches(), method="criterion", criterion="magnitude", sparsity=0.5, pattern="2:4")
    assert all(((w.matrix.reshape(-1, 4) != 0).sum(1) == 2).all() for w in weights(model))


def test_statistics_are_the_inputs_without_padding() -> None:
    model, given = tiny("llama"), batches()
    inputs: list[torch.Tensor] = []
    hook = blocks_of(model)[1].mlp.down_proj.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    with torch.no_grad():
        for batch in given:
            model(**batch)
    hook.remove()
    rows_seen = torch.cat([x[b["attention_mask"].bool()] for x, b in zip(inputs, given, strict=True)])
    found = record(model, given)["model.layers.1.mlp.down_proj.weight"]
    assert found.tokens == len(rows_seen)
    torch.testing.assert_close(found.input_norm, rows_seen.norm(dim=0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.hessian, rows_seen.T @ rows_seen, rtol=1e-3, atol=1e-2)


def test_expert_statistics_are_weighted_as_the_router_weights() -> None:
    model, given = tiny("deepseek_v3"), batches(16)
    seen = {}
    hook = blocks_of(model)[1].mlp.experts.register_forward_pre_hook(lambda m, args: seen.update(args=args))
    with torch.no_grad():
        model(**given[0])
    hook.remove()
    hidden, chosen, gates = seen["args"]
    keep = given[0]["attention_mask"].flatten().bool()
    found = record(model, given, ("input_norm",))
    experts = blocks_of(model)[1].mlp.experts
    for expert in range(4):
        gate = (gates * (chosen == expert)).sum(1)[keep]
        x = hidden[keep] * gate[:, None]
        torch.testing.assert_close(
            found[f"model.layers.1.mlp.experts.gate_up_proj.{expert}"].input_norm, x.norm(dim=0), rtol=1e-4, atol=1e-4
        )
        first, second = (hidden[keep] @ experts.gate_up_proj[expert].T).chunk(2, -1)
        inner = torch.nn.functional.silu(first) * second * gate[:, None]
        torch.testing.assert_close(
            found[f"model.layers.1.mlp.experts.down_proj.{expert}"].input_norm, inner.norm(dim=0), rtol=1e-3, atol=1e-3
        )


def test_the_second_block_sees_the_compressed_first() -> None:
    given, second = batches(), "model.layers.1.self_attn.q_proj.weight"
    pruned, seen = tiny("llama"), {}

    def solver(group, statistics):
        seen.update((weight.name, statistics) for weight in group)
        return [Solved(weight.matrix * 0 if weight.block == 0 else weight.matrix.clone()) for weight in group]

    run_blocks(pruned, given, Solver(solver, ("input_norm",)), InMemory(pruned, None, ""))
    assert torch.allclose(seen[second].input_norm, record(pruned, given)[second].input_norm, rtol=1e-4)
    assert not torch.allclose(seen[second].input_norm, record(tiny("llama"), given)[second].input_norm, rtol=1e-2)


def test_order_and_size_of_batches_change_no_mask() -> None:
    masks = []
    for given in (batches(4), batches(4)[::-1], batches(16)):
        model = tiny("deepseek_v2")
        prune(model, given, method="criterion", sparsity=0.5)
        masks.append([w.matrix == 0 for w in weights(model)])
    for other in masks[1:]:
        assert all(torch.equal(a, b) for a, b in zip(masks[0], other, strict=True))


def test_killed_at_a_block_and_resumed_equals_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, again = tiny("deepseek_v3"), tiny("deepseek_v3")
    prune(whole, batches(), method="criterion", sparsity=0.5)
    kill = InMemory.save

    def save_and_die(self: InMemory, block: int, notes: Notes) -> None:
        kill(self, block, notes)
        raise KeyboardInterrupt

    monkeypatch.setattr(InMemory, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        prune(again, batches(), method="criterion", sparsity=0.5, resume_dir=tmp_path)
    monkeypatch.undo()
    fresh = tiny("deepseek_v3")
    prune(fresh, batches(), method="criterion", sparsity=0.5, resume_dir=tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), whole.state_dict().values(), strict=True)
    )
    with pytest.raises(CompressError, match="another run"):
        prune(tiny("deepseek_v3"), batches(), method="criterion", sparsity=0.6, resume_dir=tmp_path)
    with pytest.raises(CompressError, match="another run"):
        prune(tiny("deepseek_v3", seed=5), batches(), method="criterion", sparsity=0.5, resume_dir=tmp_path)
    less = batches()
    less[0]["attention_mask"][0, 0] = 0
    with pytest.raises(CompressError, match="another run"):
        prune(tiny("deepseek_v3"), less, method="criterion", sparsity=0.5, resume_dir=tmp_path)
    again = tiny("deepseek_v3")
    weights(again, ["expert"])[3].matrix.detach()[0, 0] += 1
    with pytest.raises(CompressError, match="another run"):
        prune(again, batches(), method="criterion", sparsity=0.5, resume_dir=tmp_path)


def few_experts(model: PreTrainedModel) -> None:
    """Two experts that no token reaches."""
    blocks_of(model)[1].mlp.gate.e_score_correction_bias[:] = torch.tensor([0.0, 0.0, -9.0, -9.0])


@pytest.mark.parametrize("streamed", [False, True])
def test_what_was_noted_of_finished_blocks_survives_a_kill(
    streamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starved experts, in the block before the kill, and matrices that saw few tokens."""
    model, kind = tiny("deepseek_v3", num_hidden_layers=3), _Streamed if streamed else InMemory
    few_experts(model)
    model.save_pretrained(tmp_path / "source")
    solver, few = solvers["least_squares"](sparsity=0.5), batches(4)[:2]
    whole = compress_checkpoint(tmp_path / "source", tmp_path / "whole", few, solver)[0]

    def run() -> OneshotReport:
        if streamed:
            return compress_checkpoint(tmp_path / "source", tmp_path / "target", few, solver)[0]
        fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "source", experts_implementation="eager")
        return compress_blocks(fresh, few, solver, resume_dir=tmp_path / "blocks")

    load, kill = kind.load, pytest.MonkeyPatch()
    kill.setattr(kind, "load", lambda self, block: load(self, block) if block < 2 else (_ for _ in ()).throw(OSError))
    with pytest.raises(OSError):
        run()
    kill.undo()
    report = run()
    assert len(whole.starved) > 2
    assert {int(name.split(".")[2]) for name in whole.scarce} == {0, 1, 2}
    assert report.starved == whole.starved
    assert report.scarce == whole.scarce


def test_starved_experts_are_named_and_fall_back_to_their_layer() -> None:
    model = tiny("deepseek_v3")
    router = blocks_of(model)[1].mlp.gate
    router.e_score_correction_bias[:] = torch.tensor([0.0, 0.0, -9.0, -9.0])
    report = prune(model, batches(), method="criterion", sparsity=0.5)
    assert {n.rsplit(".", 1)[1] for n, tokens in report.starved.items() if tokens == 0} == {"2", "3"}
    assert (weights(model, ["expert"])[3].matrix == 0).float().mean() == 0.5


def test_batches_may_hold_labels() -> None:
    model = tiny("llama")
    given = [batch | {"labels": torch.zeros(len(batch["input_ids"]), dtype=torch.long)} for batch in batches(16)]
    prune(model, given, sparsity=0.5)
    assert all((w.matrix == 0).float().mean() == 0.5 for w in weights(model))


@pytest.mark.parametrize("method", ["criterion", "alps"])
def test_nan_is_named_where_it_is_first_read(method: str) -> None:
    model = tiny("llama")
    blocks_of(model)[1].post_attention_layernorm.weight.data[0] = torch.nan
    with pytest.raises(CompressError, match=r"not finite[\s\S]*(block 1|layers\.1\.mlp)"):
        prune(model, batches(), method=method, sparsity=0.5)


@pytest.mark.parametrize("name", ["llama", "qwen2_moe", "deepseek_v2", "deepseek_v3"])
def test_streamed_checkpoint_equals_memory(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    model.save_pretrained(tmp_path / "source", max_shard_size="100KB")
    report, touched = compress_checkpoint(tmp_path / "source", tmp_path / "target", batches(), by_criterion())
    prune(model, batches(), method="criterion", sparsity=0.5)
    assert touched.share == 1.0
    assert len(report.touched) == len(weights(model))
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "target", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_codes_that_were_tuned_are_the_same_streamed_and_after_a_kill(name: str, tmp_path: Path) -> None:
    source, solver = tmp_path / "source", solvers["gptq"](grid=Grid(3, 32), epochs=1)
    tiny(name, num_hidden_layers=3).save_pretrained(source)

    def opened(folder: Path) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()

    def in_memory() -> tuple[PreTrainedModel, OneshotReport]:
        model = opened(source)
        return model, compress_blocks(model, batches(), solver, resume_dir=tmp_path / "blocks")

    model = opened(source)
    report = compress_blocks(model, batches(), solver)
    for kind, run in (
        (InMemory, in_memory),
        (_Streamed, lambda: compress_checkpoint(source, tmp_path / "t", batches(), solver)),
    ):
        load, kill = kind.load, pytest.MonkeyPatch()
        with kill.context() as patch:
            patch.setattr(kind, "load", lambda self, block, load=load: load(self, block) if block < 2 else 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run()
        again, found = run()
        if kind is InMemory:
            assert found.scales.keys() == report.scales.keys()
            assert all(torch.equal(found.scales[key], scale) for key, scale in report.scales.items())
        else:
            again = opened(tmp_path / "t")
        for key, value in model.state_dict().items():
            torch.testing.assert_close(again.state_dict()[key], value, rtol=0, atol=0, msg=f"{kind.__name__} {key}")


def test_streaming_holds_one_block_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("deepseek_v3", num_hidden_layers=4).save_pretrained(tmp_path / "source")
    live, solved = [], []
    gather = engine_module.StageStatistics

    def watch(stage, *others):
        assert holder["model"].get_input_embeddings().weight.is_meta  # it has run for the last time
        live.append(len({w.block for w in weights(holder["model"]) if not w.whole.is_meta}))
        solved.append(stage[0].first.block)
        if stage[0].first.block == 2 and len(solved) == 3:
            raise KeyboardInterrupt
        return gather(stage, *others)

    holder, run = {}, engine_module.run_blocks
    monkeypatch.setattr(
        "hf_compress.oneshot.checkpoint.run_blocks",
        lambda model, *a, **k: (holder.update(model=model), run(model, *a, **k))[1],
    )
    monkeypatch.setattr(engine_module, "StageStatistics", watch)
    with pytest.raises(KeyboardInterrupt):
        compress_checkpoint(tmp_path / "source", tmp_path / "target", batches(), by_criterion())
    assert not (tmp_path / "target").exists()
    compress_checkpoint(tmp_path / "source", tmp_path / "target", batches(), by_criterion())
    assert set(live) == {1}
    assert solved == [0, 1, 2, 2, 3]


def test_a_streamed_run_killed_at_its_very_end_is_finished_by_the_next(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "source")
    source, target = tmp_path / "source", tmp_path / "target"
    compress_checkpoint(source, target, batches(), by_criterion())
    done = {file.name: file.read_bytes() for file in target.iterdir()}
    with pytest.raises(CompressError, match="exists"):
        compress_checkpoint(source, target, batches(), by_criterion())
    unlink = Path.unlink

    def die(self: Path, missing_ok: bool = False) -> None:
        if self.name == MARKER:
            raise KeyboardInterrupt
        unlink(self, missing_ok)

    shutil.rmtree(target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", die)
        with pytest.raises(KeyboardInterrupt):
            compress_checkpoint(source, target, batches(), by_criterion())
    with pytest.raises(CompressError, match="other options"):
        compress_checkpoint(source, target, batches(), by_criterion(sparsity=0.25))
    compress_checkpoint(source, target, batches(), by_criterion())
    assert {file.name: file.read_bytes() for file in target.iterdir()} == done


def test_blocks_of_other_weights_in_the_same_folder_are_not_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny("llama").save_pretrained(tmp_path / "source")
    monkeypatch.setattr(_Streamed, "finish", lambda self, source: (_ for _ in ()).throw(OSError))
    with pytest.raises(OSError):
        compress_checkpoint(tmp_path / "source", tmp_path / "target", batches(), by_criterion())
    monkeypatch.undo()
    tiny("llama", seed=5).save_pretrained(tmp_path / "source")
    with pytest.raises(CompressError, match="other options"):
        compress_checkpoint(tmp_path / "source", tmp_path / "target", batches(), by_criterion())
    (tmp_path / "target.part" / MARKER).unlink()
    compress_checkpoint(tmp_path / "source", tmp_path / "target", batches(), by_criterion())
    again = tiny("llama", seed=5)
    prune(again, batches(), method="criterion", sparsity=0.5)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "target").state_dict()
    assert all(torch.equal(written[name], value) for name, value in again.state_dict().items())


def test_what_is_outside_the_blocks_is_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_compress.oneshot.checkpoint.PIECE", 1)
    model = tiny("llama")
    model.save_pretrained(tmp_path / "source")
    compress_checkpoint(tmp_path / "source", tmp_path / "target", batches(), by_criterion())
    assert len(list((tmp_path / "target").glob("model-rest-*"))) == 3  # embeddings, norm, head
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_streamed_coverage_says_what_was_skipped_and_keeps_ties(tmp_path: Path) -> None:
    model = tiny("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "source")
    only = [w.name for w in weights(model) if "k_proj" not in w.name]
    _, touched = compress_checkpoint(tmp_path / "source", tmp_path / "t", batches(), by_criterion(), only=only)
    skipped = {w.name: "skipped by the recipe" for w in weights(model) if "k_proj" in w.name}
    assert touched == coverage(model, only, skipped)


def test_fp8_sources_are_dequantized_and_truncated_shards_named(tmp_path: Path) -> None:
    model = tiny("deepseek_v3").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors, key = load_file(file), "model.layers.1.mlp.experts.2.up_proj.weight"
    tensors[f"{key}_scale_inv"] = torch.tensor([[0.5]])
    tensors[key] = (tensors[key].float() / 0.5).to(torch.float8_e4m3fn)
    expected = (tensors[key].float() * 0.5).to(torch.bfloat16)
    save_file(tensors, file, {"format": "pt"})
    compress_checkpoint(tmp_path / "source", tmp_path / "target", [], by_criterion("magnitude", 0.25))
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "target").state_dict()[
        "model.layers.1.mlp.experts.gate_up_proj"
    ][2, 64:]
    assert torch.equal(written[written != 0], expected[written != 0])
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(CompressError, match="shard"):
        compress_checkpoint(tmp_path / "source", tmp_path / "other", batches(), by_criterion())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek_v3"])
def test_round_to_nearest_is_on_the_grid_and_keeps_zeros(name: str, dtype: torch.dtype, bits: int) -> None:
    model, grid = tiny(name).to(dtype), Grid(bits, 32)
    prune(model, [], method="criterion", criterion="magnitude", sparsity=0.5)
    before = {w.name: w.matrix.clone() for w in weights(model)}
    compress_blocks(model, [], solvers["rtn"](grid=grid))
    for weight in weights(model):
        old, new = before[weight.name], weight.matrix
        scale = scales(old, grid)
        assert not torch.equal(new, old)
        assert (new[old == 0] == 0).all()
        slack = 0.5 if dtype == torch.float32 else 1.0  # bfloat16 rounds the scale, and code * scale
        off = grid.groups(new.float() - old.float()).abs() / scale[..., None].float()
        assert off.max() <= slack + 1e-4, weight.name
        assert torch.equal(fake_quantize(new, scale, grid), new)
        if dtype == torch.float32 or bits == 4:  # bfloat16 does not hold 127 * scale
            assert torch.equal(scales(new, grid), scale)  # so a container finds the same grid


def test_weights_that_are_not_finite_are_named_not_rounded() -> None:
    model = tiny("llama")
    blocks_of(model)[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(CompressError, match=r"layers\.1\.mlp\.up_proj"):
        compress_blocks(model, [], solvers["rtn"](grid=Grid(4)))


def test_a_calibrating_solver_without_batches_is_refused() -> None:
    with pytest.raises(CompressError, match="nothing to calibrate"):
        prune(tiny("llama"), [], method="criterion", sparsity=0.5)


@pytest.mark.parametrize(
    ("name", "options"), [("deepseek_v3", {"bits": 4, "group_size": 32}), ("llama", {"bits": 8, "activations": 8})]
)
def test_streamed_into_a_container_equals_the_backend_in_memory(
    name: str, options: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(name)
    model.save_pretrained(tmp_path / "source")
    backend = backends["compressed-tensors"]
    backend(model, None, tmp_path / "memory", **options)
    packing = backends.entry("compressed-tensors").traits["packing"](empty_model(tmp_path / "source"), **options)
    solver = solvers["rtn"](grid=Grid(options["bits"], options.get("group_size")))
    read, decoded = packing.decode, []

    def stop_in_the_second_block(group, statistics):
        if group[0].block == 1:
            raise KeyboardInterrupt
        return solver.solve(group, statistics)

    stopping = Solver(stop_in_the_second_block, options=solver.options)
    with pytest.raises(KeyboardInterrupt):
        compress_checkpoint(tmp_path / "source", tmp_path / "streamed", [], stopping, container=packing)
    monkeypatch.setattr(packing, "decode", lambda key, stored: (decoded.append(key), read(key, stored))[1])
    _, covered = compress_checkpoint(tmp_path / "source", tmp_path / "streamed", [], solver, container=packing)
    assert covered.share == 1.0
    assert any("layers.0." in key for key in decoded)  # the finished block was read back from its codes
    kind = type(model)
    ids = torch.arange(5, 37).reshape(2, 16)
    one, two = (kind.from_pretrained(tmp_path / f).eval()(ids).logits for f in ("memory", "streamed"))
    assert torch.equal(one, two)
    total = {f: sum(p.stat().st_size for p in (tmp_path / f).glob("*.safetensors")) for f in ("memory", "streamed")}
    assert total["streamed"] < total["memory"] * 1.1


def test_what_the_container_leaves_as_it_is_is_left_when_streamed(tmp_path: Path) -> None:
    model = tiny("llama", intermediate_size=96)
    model.save_pretrained(tmp_path / "source")
    stage = Quantize("compressed-tensors", 4, 64, method="hqq", streaming=True, min_coverage=0.5)
    done = stage.run(Work(ModelSource(str(tmp_path / "source")), "causal-lm", None, None, tmp_path))
    assert done.coverage is not None
    assert {why: len(names) for why, names in done.coverage.skipped.items()}[
        "group_size 64 does not divide its 96 inputs"
    ] == 2
    assert done.facts["weights"] == 12
    again = type(model).from_pretrained(done.saved)
    dense, left = {w.name: w.matrix for w in weights(model)}, [w for w in weights(again) if "down_proj" in w.name]
    assert len(left) == 2
    assert all(torch.equal(weight.matrix, dense[weight.name]) for weight in left)


def half_scale(bits: int, group_size: int) -> Solver:
    """A grid that absmax would not find: half its scale, so the largest weights are clipped."""
    grid = Grid(bits, group_size)

    def solve(group, statistics):
        found = [(weight.matrix, scales(weight.matrix, grid) / 2) for weight in group]
        return [Solved(fake_quantize(m, s, grid) * 0.999, s) for m, s in found]  # no weight is at the largest code

    return Solver(solve, options={"solver": "half"})


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "qwen3_moe"])
def test_scales_a_solver_chose_reach_the_container_in_memory_resumed_and_streamed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"bits": 4, "group_size": 32}
    tiny(name).save_pretrained(tmp_path / "source")
    model, again = tiny(name), tiny(name)
    report = compress_blocks(model, [], half_scale(**options), resume_dir=tmp_path / "blocks")
    assert set(report.scales) == {w.name for w in weights(model)}
    resumed = compress_blocks(again, [], half_scale(**options), resume_dir=tmp_path / "blocks")
    assert all(torch.equal(resumed.scales[n], s) for n, s in report.scales.items())
    quantize(model, tmp_path / "memory", backend="compressed-tensors", scales=report.scales, **options)
    packing = backends.entry("compressed-tensors").traits["packing"](empty_model(tmp_path / "source"), **options)
    compress_checkpoint(tmp_path / "source", tmp_path / "streamed", [], half_scale(**options), container=packing)
    stored = load_file(tmp_path / "memory" / "model.safetensors")
    streamed = {k: v for f in (tmp_path / "streamed").glob("*.safetensors") for k, v in load_file(f).items()}
    for weight in weights(model):
        found = torch.cat([stored[f"{key}_scale"] for key in weight.stored])
        assert torch.equal(found, report.scales[weight.name])
        assert all(torch.equal(stored[f"{k}_packed"], streamed[f"{k}_packed"]) for k in weight.stored)
        assert all(torch.equal(stored[f"{k}_scale"], streamed[f"{k}_scale"]) for k in weight.stored)


def test_what_transformers_does_not_load_is_not_streamed_either(tmp_path: Path) -> None:
    """DeepSeek's multi-token prediction: a block beyond the last."""
    tiny("deepseek_v3").save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    extra = {
        "model.layers.61.mlp.experts.0.up_proj.weight": torch.ones(4, 4),
        "model.layers.61.eh_proj.weight": torch.ones(2),
    }
    save_file(load_file(file) | extra, file, {"format": "pt"})
    report, _ = compress_checkpoint(tmp_path / "source", tmp_path / "target", batches(), by_criterion())
    assert report.dropped == sorted(extra)
    assert "model.layers.61.eh_proj.weight" in report.facts()["notes"][0]
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "target", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    stored = {key for path in (tmp_path / "target").glob("*.safetensors") for key in load_file(path)}
    assert not stored & extra.keys()
    assert not compress_blocks(tiny("deepseek_v3"), batches(), by_criterion()).facts().get("notes")


def test_a_model_that_is_not_whole_on_one_device_is_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    blocks_of(model)[1].to("meta")  # as device_map leaves what it offloads
    for work in (
        lambda: compress_blocks(model, batches(), by_criterion()),
        lambda: quantize(model, tmp_path / "out"),
        lambda: trainer(model, tmp_path, [QAT(8)]),
    ):
        with pytest.raises(CompressError, match="several devices, or is offloaded: cpu, meta"):
            work()


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_weights_that_are_not_finite_are_named_before_the_text_is_blamed(method: str) -> None:
    model = tiny("llama")
    model.model.layers[1].self_attn.o_proj.weight.data[0, 0] = torch.nan
    solver = solvers[method](grid=Grid(4, 32))
    with pytest.raises(CompressError, match=r"weights are not finite\s+where: model.layers.1.self_attn.o_proj.weight"):
        compress_blocks(model, batches(), solver)
