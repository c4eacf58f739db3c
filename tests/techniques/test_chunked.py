"""The chunked linear form against autograd of the naive one, and what the model around the head must still do."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from hf_compress.errors import CompressError
from hf_compress.losses import losses
from hf_compress.techniques.chunked import Head, chunked_loss, head_of, online
from hf_compress.techniques.distillation import Distillation
from hf_compress.techniques.pruning import Pruning
from hf_compress.techniques.qat import QAT
from hf_compress.techniques.soft_targets import FromOutputs, Objective, Online, SoftTargets
from tests.models import tiny
from tests.training import collate, rows, trainer

VOCAB, WIDTH, POSITIONS = 37, 8, 11


def forward_kl(q: Tensor, p: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def jsd(q: Tensor, p: Tensor) -> Tensor:
    return forward_kl((p + q) / 2, p) / 2 + forward_kl((p + q) / 2, q) / 2


VALUES = {  # with each loss's default options
    "forward_kl": forward_kl,
    "reverse_kl": lambda q, p: forward_kl(p, q),
    "jsd": jsd,
    "jsd_normalized": lambda q, p: 4 * jsd(q, p),
    "skew_kl": lambda q, p: forward_kl(0.1 * p + 0.9 * q, p),
    "skew_reverse_kl": lambda q, p: forward_kl(0.1 * q + 0.9 * p, q),
    "total_variation": lambda q, p: (p - q).abs().sum(-1) / 2,
    "alpha_beta": lambda q, p: -20 * (p**0.1 * q**0.5 - p**0.6 / 6 - q**0.6 * 5 / 6).sum(-1),
}


def test_every_loss_has_its_formula_here() -> None:
    assert set(VALUES) == {entry.name for entry in losses if entry.traits["kind"] == "logits"}


def naive(student: Tensor, teacher: Tensor, labels: Tensor, chosen: Tensor, soft: SoftTargets) -> Tensor:
    """0.7 x the loss + 0.3 x cross-entropy, as autograd differentiates their formulas, in fp64."""
    student, teacher = student.double(), teacher.double()
    teacher = (1 - soft.share) * student.detach() + soft.share * teacher
    q, p = ((x[chosen] / soft.temperature).softmax(-1) for x in (student, teacher))
    scale = soft.temperature ** losses.entry(soft.loss).traits["order"]
    value = scale * VALUES[soft.loss](q, p).sum()
    return (0.7 * value + 0.3 * F.cross_entropy(student[chosen], labels[chosen], reduction="sum")).float()


@pytest.mark.parametrize("size", [1, 4, POSITIONS, POSITIONS + 1, None])
@pytest.mark.parametrize("loss", VALUES)
@pytest.mark.parametrize(("cap", "share"), [(None, 1.0), (5.0, 1.0), (5.0, 0.4)])
def test_value_and_gradients_equal_the_naive_ones(
    loss: str, size: int | None, cap: float | None, share: float
) -> None:
    hidden = torch.randn(1, POSITIONS, WIDTH, requires_grad=True)
    taught = torch.randn(1, POSITIONS, 2 * WIDTH)  # another width
    ours, theirs = nn.Linear(WIDTH, VOCAB), nn.Linear(2 * WIDTH, VOCAB, bias=False)
    labels, chosen = torch.randint(0, VOCAB, (POSITIONS,)), torch.tensor([0, 2, 3, 5, 6, 7, 10])
    soft = SoftTargets(loss, 2.0, share=share)

    def shaped(x: Tensor) -> Tensor:
        return cap * torch.tanh(1.5 * x / cap) if cap else 1.5 * x

    expected = naive(shaped(ours(hidden[0])), theirs(taught[0]), labels, chosen, soft)
    parameters = [hidden, ours.weight, ours.bias]
    wanted = torch.autograd.grad(expected, parameters)
    objective = Objective(soft, [online(Head(theirs), taught)], 0.7, 0.3, labels)
    found, sums = chunked_loss(Head(ours, 1.5, cap), hidden, chosen, objective, size)
    got = [gradient / 3 for gradient in torch.autograd.grad(found * 3, parameters)]
    torch.testing.assert_close(found, expected, rtol=5e-5, atol=1e-5)  # alpha_beta's three terms nearly cancel
    torch.testing.assert_close(0.7 * sums[1] + 0.3 * sums[0], expected, rtol=5e-5, atol=1e-5)
    torch.testing.assert_close(got, list(wanted), atol=2e-6, rtol=1e-5)


def test_gradients_from_given_outputs_equal_the_naive_ones() -> None:
    student, teacher, other = (torch.randn(POSITIONS, VOCAB) for _ in range(3))
    student.requires_grad_()
    labels, chosen, soft = (
        torch.randint(0, VOCAB, (POSITIONS,)),
        torch.arange(0, POSITIONS, 2),
        SoftTargets("jsd", 2.0),
    )
    first, second = (naive(student, one, labels, chosen, soft) for one in (teacher, other))
    expected = 0.2 * first + 0.8 * second
    (wanted,) = torch.autograd.grad(expected, student)
    teachers = [Online(lambda part: teacher[part], 0.2), Online(lambda part: other[part], 0.8)]
    objective = Objective(soft, teachers, 0.7, 0.3, labels)
    found, _ = FromOutputs.apply(student, chosen, objective)
    (got,) = torch.autograd.grad(found, student)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_blocks_of_a_chunk_add_up(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed at a time is a matter of a CPU's cache: here 1 or 3 of the rows of a chunk, two teachers."""
    hidden, labels = torch.randn(1, POSITIONS, WIDTH, requires_grad=True), torch.randint(0, VOCAB, (POSITIONS,))
    head, first, second = (nn.Linear(WIDTH, VOCAB) for _ in range(3))
    chosen = torch.tensor([0, 2, 3, 5, 6, 7, 10])

    def both(whole: bool) -> list[Tensor]:
        taught = [online(Head(one, 0.5, 3.0), hidden.detach(), share) for one, share in ((first, 0.3), (second, 0.7))]
        objective = Objective(SoftTargets("jsd", 2.0), taught, 0.7, 0.3, labels, measure=True)
        if whole:
            outputs = 3 * torch.tanh(head(hidden[0]) / 3)
            total, sums = FromOutputs.apply(outputs, chosen, objective)
        else:
            total, sums = chunked_loss(Head(head, 1.0, 3.0), hidden, chosen, objective, 5)
        return [total, sums, *torch.autograd.grad(total, [hidden, head.weight, head.bias])]

    expected = both(True)
    for module in ("chunked", "soft_targets"):
        monkeypatch.setattr(f"hf_compress.techniques.{module}.BLOCK_BYTES", 4 * VOCAB * rows)
    for whole in (True, False):
        torch.testing.assert_close(both(whole), expected, atol=1e-5, rtol=1e-4)


def test_bfloat16_outputs_are_compared_in_fp32() -> None:
    """In bfloat16 a divergence of near distributions is rounding, and may be negative."""
    student = (8 * torch.randn(POSITIONS, VOCAB)).to(torch.bfloat16)
    teacher = (student + 0.05 * torch.randn(POSITIONS, VOCAB)).to(torch.bfloat16)
    every, soft = torch.arange(POSITIONS), SoftTargets("jsd")
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        outputs, taught = student.to(dtype).requires_grad_(), teacher.to(dtype)
        total, _ = FromOutputs.apply(outputs, every, Objective(soft, [Online(lambda part, t=taught: t[part])]))
        found.append([total, torch.autograd.grad(total, outputs)[0].float()])
    assert found[0][0] == found[1][0] > 0
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-2, atol=1e-6)


def test_nothing_to_learn_gives_zero_and_zero_gradients() -> None:
    hidden, head = torch.randn(1, POSITIONS, WIDTH, requires_grad=True), nn.Linear(WIDTH, VOCAB, bias=False)
    objective = Objective(SoftTargets("forward_kl"), [online(Head(head), hidden.detach())])
    found, _ = chunked_loss(Head(head), hidden, torch.tensor([], dtype=torch.long), objective, None)
    gradients = torch.autograd.grad(found, [hidden, head.weight])
    assert found == 0
    assert all(g.abs().max() == 0 for g in gradients)


@pytest.mark.parametrize(("rows", "largest"), [(1, 1), (256, 256), (300, 128), (1600, 200), (9000, 512)])
def test_chunks_are_an_eighth_within_bounds(rows: int, largest: int) -> None:
    head, hidden, seen = nn.Linear(4, 7, bias=False), torch.randn(1, rows, 4), list[int]()

    def outputs(part: Tensor) -> Tensor:
        seen.append(len(part))
        return hidden[0, part] @ head.weight.T

    chunked_loss(Head(head), hidden, torch.arange(rows), Objective(SoftTargets("forward_kl"), [Online(outputs)]), None)
    assert (max(seen), sum(seen)) == (largest, rows)


def test_bfloat16_heads_multiply_in_bfloat16_and_sum_in_fp32() -> None:
    head = nn.Linear(64, VOCAB, bias=False).to(torch.bfloat16)
    hidden = torch.randn(1, 512, 64).to(torch.bfloat16).requires_grad_()
    labels, every = torch.randint(0, VOCAB, (512,)), torch.arange(512)
    objective = Objective(SoftTargets("forward_kl"), [], 0.0, 1.0, labels)
    found, _ = chunked_loss(Head(head), hidden, every, objective, 4)
    got = torch.autograd.grad(found, [hidden, head.weight])
    exact = head.weight.detach().double().requires_grad_()
    wide = hidden.detach().double().requires_grad_()
    expected = F.cross_entropy(wide[0] @ exact.T, labels, reduction="sum")
    wanted = torch.autograd.grad(expected, [wide, exact])
    assert [g.dtype for g in got] == [torch.bfloat16, torch.bfloat16]
    for ours, theirs in zip(got, wanted, strict=True):
        # 128 chunks summed in bfloat16 would be off by several per cent
        assert (ours.double() - theirs).norm() / theirs.norm() < 6e-3


def weights_after(student: Any, teacher: Any, folder: Path, **options: Any) -> dict[str, Tensor]:
    args = {"optim": "sgd", "max_grad_norm": 0, "max_steps": 2, "task_weight": 0.5}
    run = trainer(student, folder, [Distillation(teacher, **options)], **args)
    run.train()
    logged = {k: v for entry in run.state.log_history for k, v in entry.items() if k in ("loss_task", "loss_distill")}
    return {k: v.clone() for k, v in run.model.state_dict().items()} | {k: torch.tensor(v) for k, v in logged.items()}


def test_masks_and_fake_quantization_beside_it(tmp_path: Path) -> None:
    found = []
    for chunked in (True, False):
        techniques = [Distillation(tiny("llama", seed=1), chunked=chunked), Pruning(0.5, schedule="oneshot"), QAT(8)]
        run = trainer(tiny("llama"), tmp_path, techniques, optim="sgd", max_grad_norm=0, max_steps=2)
        run.train()
        found.append({k: v.clone() for k, v in run.model.state_dict().items()})
    torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=1e-4)
    assert (found[0]["model.layers.0.mlp.down_proj.weight"] == 0).float().mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("name", "tied"), [("llama", False), ("llama", True), ("gpt2", True), ("deepseek_v3", False)])
def test_training_is_that_of_whole_logits(name: str, tied: bool, tmp_path: Path) -> None:
    size = "n_embd" if name == "gpt2" else "hidden_size"

    def run(chunked: bool) -> dict[str, Tensor]:
        student, teacher = tiny(name, tie_word_embeddings=tied), tiny(name, seed=1, **{size: 128})
        return weights_after(student, teacher, tmp_path, chunked=chunked, chunk_size=7 if chunked else None)

    torch.testing.assert_close(run(True), run(False), atol=2e-5, rtol=1e-4)


GEMMA = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 32}
GEMMA |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.2}


def other(kind: str, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    shape = GEMMA | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | changes
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape)).eval()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("cohere", {"logit_scale": 1.01}),  # near 1, and not 1
        ("granite", {"logits_scaling": 8.0}),
    ],
)
def test_what_a_model_does_after_its_head_is_followed(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    def run(chunked: bool) -> dict[str, Tensor]:
        return weights_after(
            other(kind, **changes),
            other(kind, 1, **changes),
            tmp_path,
            chunked=chunked,
            chunk_size=5 if chunked else None,
        )

    torch.testing.assert_close(run(True), run(False), atol=2e-5, rtol=1e-4)


def test_unknown_changes_after_the_head_are_refused() -> None:
    model = tiny("llama")
    plain = type(model).forward

    class Odd(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = plain(self, *args, **kwargs)
            out.logits = out.logits.abs()
            return out

    model.__class__ = Odd
    with pytest.raises(CompressError, match="not known here"):
        head_of(model)
    assert not model.lm_head.__dict__.get("forward")


def test_lora_on_the_head_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    for options in ({"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}):
        student = get_peft_model(tiny("llama"), LoraConfig(**({"target_modules": ["q_proj"]} | options)))
        with pytest.raises(CompressError, match="adapters"):
            trainer(student, tmp_path, [Distillation(tiny("llama", seed=1), chunked=True)])


def test_lora_elsewhere_trains_on_its_base(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    student = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj", "down_proj"], r=4))
    run = trainer(student, tmp_path, [Distillation("base", chunked=True)], task_weight=0.0)
    run.train()
    assert run.state.log_history[0]["loss_distill"] == pytest.approx(0, abs=1e-5)


class _Watch:
    """The largest last dimension x rows of any tensor that a block of code makes."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary, self.rows = vocabulary, 0

    def __enter__(self) -> "_Watch":
        from torch.utils._python_dispatch import TorchDispatchMode

        watch = self

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                out = func(*args, **(kwargs or {}))
                for made in out if isinstance(out, tuple | list) else (out,):
                    found = isinstance(made, Tensor) and made.dim() and made.shape[-1] == watch.vocabulary
                    if found and made.shape[-2:] != (64, watch.vocabulary):  # the head's weight, transposed
                        watch.rows = max(watch.rows, made.numel() // watch.vocabulary)
                return out

        self.mode = Mode()
        self.mode.__enter__()
        return self

    def __exit__(self, *found: Any) -> None:
        self.mode.__exit__(*found)


@pytest.mark.parametrize("chunked", [False, True])
def test_no_tensor_of_the_vocabulary_is_larger_than_a_chunk(chunked: bool, tmp_path: Path) -> None:
    """Training, and evaluation without metrics; with metrics the logits are wanted."""
    student, teacher = tiny("llama", vocab_size=333), tiny("llama", seed=1, vocab_size=333)
    run = trainer(student, tmp_path, [Distillation(teacher, chunked=chunked, chunk_size=3 if chunked else None)])
    with _Watch(333) as watch:
        run.train()
        metrics = run.evaluate()
    assert (watch.rows <= 3) == chunked, watch.rows
    assert {"eval_loss", "eval_kl", "eval_agreement"} <= set(run.state.log_history[-1])
    assert run.predict(run.eval_dataset).predictions.shape[-1] == 333
    assert metrics["eval_loss"] > 0


def test_evaluation_is_that_of_whole_logits(tmp_path: Path) -> None:
    found = []
    for chunked in (False, True):
        run = trainer(tiny("llama"), tmp_path, [Distillation(tiny("llama", seed=1), chunked=chunked)], task_weight=0.0)
        run.evaluate()
        found.append({k: v for k, v in run.state.log_history[-1].items() if k in ("eval_loss", "eval_kl")})
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_bf16_autocast_is_that_of_whole_logits(tmp_path: Path) -> None:
    """Where the model multiplies in bfloat16, so does the chunked head, and its fp32 weight gets an fp32 gradient."""
    with torch.autocast("cpu", torch.bfloat16):
        assert online(Head(nn.Linear(8, 9)), torch.randn(1, 4, 8)).outputs(torch.arange(4)).dtype == torch.bfloat16
    found = []
    for chunked in (True, False):
        student, teacher = tiny("llama"), tiny("llama", seed=1, hidden_size=128)
        run = trainer(
            student,
            tmp_path,
            [Distillation(teacher, chunked=chunked)],
            bf16=True,
            max_steps=1,
            optim="sgd",
            max_grad_norm=0,
        )
        before = student.lm_head.weight.detach().clone()
        run.train()
        found.append((run.state.log_history[0]["loss_distill"], run.model.lm_head.weight.detach() - before))
    assert found[0][0] == pytest.approx(found[1][0], rel=0.02)
    assert (found[0][1] - found[1][1]).norm() / found[1][1].norm() < 0.02


def test_encoder_decoder(tmp_path: Path) -> None:
    shape = {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    shape |= {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "dropout_rate": 0.0}

    def t5(seed: int) -> Any:
        torch.manual_seed(seed)
        return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **shape)).eval()

    found = [
        weights_after(t5(0), t5(1), tmp_path, chunked=chunked, chunk_size=5 if chunked else None)
        for chunked in (True, False)
    ]
    torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=1e-4)


def test_a_classifier_has_no_chunked_form(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="language models"):
        trainer(tiny("bert"), tmp_path, [Distillation(tiny("bert", seed=1), chunked=True)])


def test_batches_as_the_tests_make_them_have_padding() -> None:
    assert (collate([rows()[0], rows()[3]])["labels"] == -100).any()
