"""In which order the matrices of a block are compressed, and which of them read the same input."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hf_compress.families import Family, family_of
from hf_compress.weights import Weight, base_of


@dataclass(frozen=True, eq=False)
class InputGroup:
    """Matrices that read the same input (q, k and v; gate and up): they share its statistics and are solved together.

    residual: the module, relative to the block, whose input is the residual stream that their output is added to
    ("" where it is not added to one, or only a routed part of it is). gate_up: of an expert's last matrix, the
    attribute that holds the matrices its channels are made with.
    """

    weights: tuple[Weight, ...]
    residual: str = ""
    gate_up: str = ""

    @property
    def first(self) -> Weight:
        return self.weights[0]


def stages_of(model: nn.Module, weights: list[Weight]) -> list[list[InputGroup]]:
    """The matrices of one block as stages in the order data flows, each a list of groups that can be solved at once.

    Attention first (q, k, v; then o; for MLA q_a with kv_a, q_b, kv_b, o), then what reads the FFN's input (gate and
    up, of the shared and of every routed expert), then what reads its channels (down).
    """
    family = family_of(base_of(model).config)
    local = {w.name: local_name(family, w) for w in weights}
    after_attention, after_ffn = family.residuals
    stages: list[list[InputGroup]] = []
    for names in family.attention:
        members = tuple(w for w in weights if local[w.name] in names)
        if members:
            stages.append([InputGroup(members, after_attention if names is family.attention[-1] else "")])
    shared = [w for w in weights if w.kind == "shared_expert"]
    shared_down = tuple(w for w in shared if local[w.name].endswith("." + family.down.rpartition(".")[2]))
    ups = tuple(w for w in weights if local[w.name] in family.up), tuple(w for w in shared if w not in shared_down)
    downs = tuple(w for w in weights if local[w.name] == family.down), shared_down
    up_groups = [InputGroup(members) for members in ups if members]
    gated = family.experts is not None and family.experts.shared_gated
    down_groups = [
        InputGroup(members, "" if gated and members is shared_down else after_ffn) for members in downs if members
    ]
    for weight in weights:
        if weight.kind == "expert":
            assert family.experts is not None
            if weight.attribute == family.experts.gate_up:
                up_groups.append(InputGroup((weight,)))
            else:
                down_groups.append(InputGroup((weight,), gate_up=family.experts.gate_up))
    stages += [groups for groups in (up_groups, down_groups) if groups]
    placed = {w.name for stage in stages for group in stage for w in group.weights}
    assert placed == set(local), f"no place in the order: {sorted(set(local) - placed)}"
    return stages


def local_name(family: Family, weight: Weight) -> str:
    """The module's name inside its block."""
    return weight.module_name.partition(f"{family.blocks}.{weight.block}.")[2]
