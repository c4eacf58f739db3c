"""What training gathers, what competes with what, cycles with rewinding, and the mistakes a person is told of."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hf_compress.criteria import Statistics, criteria
from hf_compress.errors import CompressError
from hf_compress.patterns import mask_of
from hf_compress.techniques.gathering import Gathered
from hf_compress.techniques.pruning import Pruning
from hf_compress.techniques.rewinding import Snapshot
from hf_compress.weights import Weight, blocks_of, weights
from tests.models import tiny
from tests.training import collate, rows, trainer

NO_DROPOUT = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


def zeros(model: Any) -> dict[str, float]:
    return {w.name: float((w.matrix == 0).float().mean()) for w in weights(model)}


def gathered(name: str, needs: tuple[str, ...], batches: list[dict[str, torch.Tensor]]) -> tuple[Any, Gathered]:
    """A model and what two steps without an optimizer leave in `Gathered`."""
    model = tiny(name, **NO_DROPOUT.get(name, {})).train()
    found = Gathered(model, weights(model), needs)
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        found.add_step()
    return model, found


def batches(count: int = 2) -> list[dict[str, torch.Tensor]]:
    data = rows(16)
    return [collate([data[4 * i + j] for j in range(4)]) for i in range(count)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek_v3"])
def test_gradients_are_averaged_squared_and_multiplied(name: str) -> None:
    model, found = gathered(name, ("gradient", "fisher", "movement"), batches())
    steps: list[dict[str, torch.Tensor]] = []
    for batch in batches():
        model.zero_grad()
        model(**batch).loss.backward()
        steps.append({w.name: w.of(w.whole.grad).clone() for w in weights(model)})
    for weight in weights(model):
        statistics = found.statistics(weight, 0)
        first, second = (step[weight.name] for step in steps)
        torch.testing.assert_close(statistics.gradient, (first + second) / 2)
        torch.testing.assert_close(statistics.fisher, (first**2 + second**2) / 2)
        torch.testing.assert_close(statistics.movement, -(first + second) * weight.matrix, atol=1e-6, rtol=1e-4)
    found.reset()
    assert set(found.state()) == {"steps", *(f"movement {w.parameter}" for w in weights(model))}


def test_movement_is_the_slope_of_the_loss_in_a_relaxed_mask() -> None:
    """d loss(W * m) / d m at m = 1 is (dL/dW) W, the score's change with its sign turned."""
    model, found = gathered("llama", ("movement",), batches(1))
    weight = weights(model)[3]
    moved = found.statistics(weight, 0).movement
    model = model.double()
    row, column = divmod(int(moved.abs().argmax()), weight.shape[1])
    losses = []
    for step in (1e-2, -1e-2):
        kept = weight.matrix[row, column].clone()
        with torch.no_grad():
            weight.matrix[row, column] *= 1 + step
            losses.append(float(model(**batches(1)[0]).loss))
            weight.matrix[row, column] = kept
    assert (losses[1] - losses[0]) / 2e-2 == pytest.approx(float(moved[row, column]), rel=1e-2)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_input_norms_are_of_tokens_that_are_not_padding(name: str) -> None:
    given = batches()
    if name == "bert":
        given = [b | {"labels": torch.tensor([0, 1, 0, 1])} for b in given]
    torch.manual_seed(0)
    model, found = gathered(name, ("input_norm",), given)
    down = next(
        w for w in weights(model) if w.block == 1 and w.name.endswith(("down_proj.weight", "output.dense.weight"))
    )
    seen: list[torch.Tensor] = []
    hook = down.module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    found.close()
    torch.manual_seed(0)
    for batch in given:
        model(**batch)
    hook.remove()
    kept = torch.cat([x[b["attention_mask"].bool()] for x, b in zip(seen, given, strict=True)])
    statistics = found.statistics(down, 0)
    assert statistics.tokens == len(kept)
    torch.testing.assert_close(statistics.input_norm, kept.norm(dim=0), rtol=1e-4, atol=1e-4)


def test_inputs_of_experts_are_weighted_by_their_gates() -> None:
    given = batches()
    model, found = gathered("deepseek_v3", ("input_norm",), given)
    found.close()
    seen: list[Any] = []
    experts = blocks_of(model)[1].mlp.experts
    hook = experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    for batch in given:
        model(**batch)
    hook.remove()
    for weight in weights(model, ["expert"]):
        square = torch.zeros(weight.shape[1])
        for (hidden, chosen, gates), batch in zip(seen, given, strict=True):
            gate = (gates * (chosen == weight.expert)).sum(1)[batch["attention_mask"].flatten().bool()]
            read = hidden[batch["attention_mask"].flatten().bool()]
            if weight.attribute == "down_proj":
                first, second = (read @ experts.gate_up_proj[weight.expert].T).chunk(2, -1)
                read = torch.nn.functional.silu(first) * second
            square += (read * gate[:, None]).square().sum(0).detach()
        torch.testing.assert_close(found.statistics(weight, 0).input_norm, square.sqrt(), rtol=1e-4, atol=1e-4)


def test_an_expert_that_no_token_reached_gets_its_layers_inputs() -> None:
    model = tiny("deepseek_v3").train()
    blocks_of(model)[1].mlp.gate.e_score_correction_bias[:] = torch.tensor([0.0, 0.0, 0.0, -9.0])
    found = Gathered(model, weights(model), ("input_norm",))
    model(**batches(1)[0])
    found.add_step()
    up = [w for w in weights(model, ["expert"]) if w.attribute == "gate_up_proj"]
    norms = [found.statistics(w, 0).input_norm for w in up]
    torch.testing.assert_close(norms[3].square(), sum(n.square() for n in norms[:3]), rtol=1e-4, atol=1e-4)
    assert found.statistics(up[3], 0).tokens > 0


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "taylor2", "gradient_activation", "wanda", "movement"])
def test_the_mask_is_that_of_the_criterion_over_the_steps_before_it(criterion: str, tmp_path: Path) -> None:
    """One-shot after two steps that change nothing: the mask is the one its statistics give."""
    pruning = Pruning(0.5, criterion=criterion, schedule="oneshot", begin="2 steps")
    run = trainer(tiny("llama"), tmp_path, [pruning], max_steps=3, learning_rate=0.0, optim="sgd")
    seen: list[Statistics] = []
    weight: Weight = weights(run.model)[4]
    dense = weight.matrix.clone()
    gather = pruning._gathered.statistics
    pruning._gathered.statistics = lambda w, seed: (  # type: ignore[method-assign]
        seen.append(copy.deepcopy(gather(w, seed))) if w.name == weight.name else None,
        gather(w, seed),
    )[1]
    run.train()
    entry = criteria.entry(criterion)
    expected = mask_of(entry.value(dense, seen[0]), sparsity=0.5, group=entry.traits["group"])
    assert torch.equal(weight.matrix != 0, expected)
    assert all(share == pytest.approx(0.5, abs=1e-3) for share in zeros(run.model).values())


def test_statistics_are_of_the_steps_since_the_last_masks(tmp_path: Path) -> None:
    pruning = Pruning(0.5, criterion="gradient_activation", begin="1 step", end="5 steps", every=2)
    run = trainer(tiny("llama"), tmp_path, [pruning], max_steps=6, train_sampling_strategy="sequential")
    steps, tokens = [], []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            steps.append(pruning._gathered.steps)
            tokens.append(pruning._gathered.statistics(pruning._weights[0], 0).tokens)

    run.add_callback(Watch())
    run.train()
    assert steps == [1, 1, 2, 1, 2, 1]  # masks are chosen before steps 1, 3 and 5
    size = 4 * (5 + 3 * 0) + 3 * (0 + 1 + 2 + 3)  # rows of 5, 8, 11 and 14 tokens in every batch
    assert tokens == [size * n for n in steps]


def test_global_shares_one_threshold(tmp_path: Path) -> None:
    run = trainer(tiny("llama"), tmp_path, [Pruning(0.5, group="global", schedule="oneshot")], learning_rate=0.0)
    weight = weights(run.model)[0]
    weight.matrix.mul_(0.01)  # all of it is below the others' threshold
    run.train()
    shares = zeros(run.model)
    assert shares[weight.name] == 1.0
    total = sum(w.matrix.numel() for w in weights(run.model))
    assert sum(int((w.matrix == 0).sum()) for w in weights(run.model)) == round(0.5 * total)


def test_owl_gives_blocks_their_own_sparsity_and_keeps_it_through_the_schedule(tmp_path: Path) -> None:
    model = tiny("llama")
    blocks_of(model)[0].mlp.up_proj.weight.data[:2] *= 20  # outliers
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append(zeros(model))

    run = trainer(model, tmp_path, [Pruning(0.5, budget="owl", every=1, schedule="linear")], max_steps=8)
    run.add_callback(Watch())
    run.train()
    first, second = ({s for n, s in seen[-1].items() if f"layers.{b}." in n} for b in (0, 1))
    assert max(first) == pytest.approx(0.42, abs=1e-3)
    assert min(second) == pytest.approx(0.58, abs=1e-3)
    names = list(seen[-1])
    assert seen[3][names[0]] / seen[3][names[-1]] == pytest.approx(0.42 / 0.58, abs=1e-2)
    assert run.techniques[0].facts()["sparsity"] == pytest.approx(0.5, abs=1e-3)
    logged = [entry["sparsity"] for entry in run.state.log_history if "loss" in entry]
    assert logged == sorted(logged)
    assert logged[0] < 0.3 < logged[-1] == pytest.approx(0.5, abs=1e-3)


def test_given_sparsities(tmp_path: Path) -> None:
    options = {"sparsities": {"down_proj": 0.25, r"layers\.0\..*q_proj": 0.0}, "skip": ["k_proj"]}
    run = trainer(tiny("llama"), tmp_path, [Pruning(0.5, every=1, **options)])
    run.train()
    for name, share in zeros(run.model).items():
        wanted = 0.25 if "down" in name else 0.0 if "k_proj" in name or "0.self_attn.q_proj" in name else 0.5
        assert share == wanted, name


class Steps(TrainerCallback):
    """Values and first moments before every step (after masks were chosen) and after it."""

    def __init__(self) -> None:
        self.before: list[dict[str, torch.Tensor]] = []
        self.moments: list[dict[str, torch.Tensor]] = []

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.before.append({n: p.detach().clone() for n, p in model.named_parameters()})
        states = {n: optimizer.state.get(p, {}) for n, p in model.named_parameters()}
        self.moments.append({n: s["exp_avg"].clone() for n, s in states.items() if "exp_avg" in s})


def test_after_each_cut_survivors_go_back_with_their_moments(tmp_path: Path) -> None:
    options = {"schedule": "iterative", "cycles": 3, "begin": "2 steps", "end": "6 steps", "rewind_to": "1 step"}
    model = tiny("llama")
    run = trainer(model, tmp_path, [Pruning(0.6, **options)], max_steps=8)
    watch = Steps()
    run.add_callback(watch)
    run.train()
    for event, sparsity in ((2, 0.2), (4, 0.4), (6, 0.6)):
        for name, value in watch.before[event].items():
            early, moment = watch.before[1][name], watch.moments[event][name]
            masked = name in {w.name for w in weights(model)}
            assert torch.equal(value[value != 0], early[value != 0]), (event, name)
            assert torch.equal(moment[value != 0], watch.moments[1][name][value != 0])
            if masked:
                assert (value == 0).sum() == round(sparsity * value.numel())
                assert (moment[value == 0] == 0).all()
    assert not torch.equal(watch.before[3]["model.norm.weight"], watch.before[1]["model.norm.weight"])


@pytest.mark.parametrize("optim", ["adafactor", "adamw_bnb_8bit", "sgd"])
def test_a_snapshot_comes_back_from_its_tensors_as_it_was(optim: str, tmp_path: Path) -> None:
    run = trainer(tiny("llama"), tmp_path, [], optim=optim, max_steps=2)
    run.train()
    taken, again = Snapshot(run.model), Snapshot(run.model)
    taken.take(run.optimizer)
    names = {p: n for n, p in run.model.named_parameters()}
    values = {n: p.detach().clone() for p, n in names.items()}
    moments = copy.deepcopy({n: run.optimizer.state[p] for p, n in names.items()})
    again.load(taken.state())
    with torch.no_grad():
        for parameter in names:
            parameter.zero_()
            run.optimizer.state[parameter] = {}
    again.restore(run.optimizer)
    for parameter, name in names.items():
        assert torch.equal(parameter, values[name])
        for key, moment in moments[name].items():
            if moment is not None:
                restored = run.optimizer.state[parameter][key]
                assert type(restored) is type(moment)
                same = torch.equal(restored, moment) if isinstance(moment, torch.Tensor) else restored == moment
                assert same, (name, key)


def test_cycles_without_rewinding_train_on(tmp_path: Path) -> None:
    run = trainer(tiny("llama"), tmp_path, [Pruning(0.6, schedule="iterative", cycles=2, end=0.5)], max_steps=4)
    watch = Steps()
    run.add_callback(watch)
    run.train()
    norm = [b["model.norm.weight"] for b in watch.before]
    assert not torch.equal(norm[2], norm[0])


def test_constant_keeps_uneven_zeros_and_refuses_a_dense_model(tmp_path: Path) -> None:
    model = tiny("llama")
    for index, weight in enumerate(weights(model)):
        weight.matrix[:, : (16 if index % 2 else 48)] = 0
    before = {w.name: w.matrix == 0 for w in weights(model)}
    run = trainer(model, tmp_path, [Pruning(0.3, schedule="constant")])
    run.train()
    assert all(torch.equal(w.matrix == 0, before[w.name]) for w in weights(model))
    with pytest.raises(CompressError, match=r"0\.0% of the weights are zero[\s\S]*oneshot"):
        trainer(tiny("llama"), tmp_path, [Pruning(0.5, schedule="constant")])
    for weight in weights(model):
        weight.matrix[:, :40] = 0
    with pytest.raises(CompressError, match="are not 2:4"):
        trainer(model, tmp_path, [Pruning(0.5, "2:4", schedule="constant")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"1 is not in \[0, 1\)[\s\S]*sparsity"),
        ({"sparsity": -0.2}, r"-0.2 is not in \[0, 1\)"),
        ({"pattern": "2:4", "sparsity": 0.6}, "sparsity of 0.5, not 0.6"),
        ({"pattern": "2of4"}, "unknown pattern"),
        ({"criterion": "magnitud"}, "did you mean 'magnitude'"),
        ({"criterion": "obs"}, "which training does not collect"),
        ({"schedule": "cubical"}, "did you mean 'cubic'"),
        ({"group": "rows"}, "did you mean 'row'"),
        ({"budget": "owls"}, "did you mean 'owl'"),
        ({"pattern": "2:4", "group": "row"}, "its own groups"),
        ({"pattern": "2:4", "budget": "owl"}, "same sparsity"),
        ({"group": "global", "budget": "owl"}, "leaves no budgets"),
        ({"budget": "owl", "sparsities": {"mlp": 0.2}}, "two budgets"),
        ({"budget": "owl", "sparsity": 0.95}, r"not all in \[0, 1\)"),
        ({"schedule": "iterative"}, "needs a number of cycles"),
        ({"cycles": 3}, "belong to the iterative schedule"),
        ({"rewind_to": 0.1}, "belong to the iterative schedule"),
        ({"initial_sparsity": 0.7}, "initial_sparsity"),
        ({"sparsity": 0.0, "sparsities": {"mlp": 0.5}}, "stays at 0"),
        ({"begin": 0.8, "end": 0.2}, "begin is after end"),
        ({"begin": 1.0, "end": 1.0}, "begins where the run ends"),
        ({"schedule": "constant", "begin": 0.1}, "from the first step"),
        ({"criterion": "taylor", "schedule": "oneshot"}, "looks at steps before the first mask"),
        ({"begin": "later"}, "no moment of a run"),
    ],
)
def test_options_that_cannot_work_are_refused_before_any_model(options: dict, message: str) -> None:
    with pytest.raises(CompressError, match=message):
        Pruning(**options).check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip": ["q_porj"]}, r"no weight matches 'q_porj'[\s\S]*prune.skip[\s\S]*did you mean 'q_proj'"),
        ({"sparsities": {"up_porj": 0.1}}, r"no weight matches 'up_porj'[\s\S]*did you mean 'up_proj'"),
        ({"skip": ["layers"]}, "every weight is skipped"),
        ({"pattern": "1:3", "sparsity": 1 - 1 / 3}, r"3 does not divide 64 inputs[\s\S]*layers.0.self_attn.q_proj"),
        ({"pattern": "5x1"}, r"5 does not divide 64 outputs[\s\S]*layers.0.self_attn.q_proj"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused_before_training(
    options: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CompressError, match=message):
        trainer(tiny("llama"), tmp_path, [Pruning(**options)])


def test_frozen_weights_have_no_gradients_to_rank_by(tmp_path: Path) -> None:
    model = tiny("llama")
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    with pytest.raises(CompressError, match=r"got no gradient[\s\S]*up_proj"):
        trainer(model, tmp_path, [Pruning(0.5, criterion="taylor")]).train()
    run = trainer(model, tmp_path, [Pruning(0.5, every=1)])
    run.train()
    assert all(share == 0.5 for share in zeros(run.model).values())
