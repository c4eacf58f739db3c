"""Contracts 1 and 2 for every family in every container: it opens without hf_compress and gives the same answers; what
it cannot store is what was foreseen, what the README says, or refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_compress.backends import backends, foresee, quantize
from hf_compress.blocks import block_profile
from hf_compress.coverage import Coverage
from hf_compress.errors import CompressError
from hf_compress.families import families
from hf_compress.verification import verify
from hf_compress.weights import weights
from tests.contracts.matrix import ALIKE, FAMILIES, SCHEMES, containers, foreseen, model_of, outcome, row, table

IDS = torch.arange(3, 19)[None]
README = (Path(__file__).parents[2] / "README.md").read_text()
ERROR = {2: 2.0, 3: 1.2, 4: 0.6, 8: 0.4}  # of random weights, to tell a wrong code path from rounding


def test_no_backend_and_no_family_is_forgotten() -> None:
    assert {entry.name for entry in backends if "environment" not in entry.traits} == set(SCHEMES)
    here = {*FAMILIES, *ALIKE}
    assert [e.name for e in families if not e.value.refused and not here & {*e.value.model_types}] == []


@pytest.mark.filterwarnings("ignore::hf_compress.backends.PartlyStored")
@pytest.mark.parametrize("backend", SCHEMES)
def test_every_cell_is_what_was_foreseen_and_what_the_readme_says(backend: str, tmp_path: Path) -> None:
    folders, seen = dict[tuple[str, str], Path](), dict[tuple[str, str], tuple[str, str]]()
    for family in FAMILIES:
        model = model_of(family)
        with torch.no_grad():
            for weight in weights(model):
                weight.matrix[:, ::2] = 0
            dense = model(IDS).logits
        for scheme, options in SCHEMES[backend].items():
            cell, folder = f"{family} {backend} {scheme}", tmp_path / f"{family}-{len(folders)}"
            covered: Coverage | None = None
            refused: CompressError | None = None
            try:
                written = quantize(model, folder, backend=backend, **options)
                covered = written.coverage
            except CompressError as error:
                refused = error
            seen[family, scheme] = outcome(covered, refused)
            assert seen[family, scheme] == foreseen(family, backend, scheme), cell
            if covered is None:
                assert refused is not None
                assert refused.next_step, cell
                assert not folder.exists(), cell
                continue
            folders[family, scheme] = folder
            with torch.no_grad():
                error = (written.model(IDS).logits.float() - dense).norm() / dense.norm()
            assert (error > 0) == (covered.touched_bytes > 0), cell
            assert error < ERROR[options["bits"]], cell
            said = foresee(model, backend, **options)
            rest = 4 * sum(p.numel() for p in model.parameters()) - said.dense_bytes
            tensors = load_file(folder / "model.safetensors")
            tables = ("quant_map", "quant_state")  # bitsandbytes' own, one for each matrix whatever its size
            stored = sum(t.nbytes for key, t in tensors.items() if not any(table in key for table in tables))
            assert stored == pytest.approx(said.bytes + rest, rel=0.02), cell
            if backend != "bitsandbytes":  # which stores its tables with every matrix
                task = "text-classification" if family == "bert" else "causal-lm"
                bits = sum(p["bits"] * p["parameters"] for p in block_profile(folder, task, zeros=False))
                assert bits == pytest.approx(8 * said.bytes, rel=0.02), cell
    facts = verify(*folders.values())
    for name, folder in folders.items():
        assert facts[str(folder)]["logits_difference"] < 1e-3, name
        assert facts[str(folder)].get("generates", False) == (name[0] != "bert"), name
    notes = [line.partition(". ")[2] for line in README.splitlines() if line.partition(". ")[0].isdigit()]
    for scheme in SCHEMES[backend]:
        assert row(backend, scheme, {f: seen[f, scheme] for f in FAMILIES}, notes) in README.splitlines()


def test_the_readme_has_both_tables_whole() -> None:
    assert table() in README
    assert containers() in README
