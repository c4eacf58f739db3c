"""The before/after table, for the card and the terminal alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LABELS = {
    "dense": "dense, torch",
    "plain_onnx": "dense, plain ONNX int8",
    "root": "ours, torch",
    "onnx": "ours, ONNX int8",
    "openvino": "ours, OpenVINO",
}


def _small(value: float) -> str:
    """Four decimals where they say something."""
    return f"{value:.4f}" if value == 0 or value >= 1e-3 else f"{value:.1e}"


def comparison(evaluation: dict[str, Any] | None, labels: Mapping[str, str] = LABELS) -> list[list[str]]:
    """Rows of the before/after table, the header first; [] without an evaluation. labels: artefact -> its column, in
    order."""
    if evaluation is None:
        return []
    found: dict[str, dict[str, Any]] = evaluation["artefacts"]
    names = [name for name in labels if name in found]
    rows = [["", *(labels[name] for name in names)]]

    def row(label: str, value: Any) -> None:
        cells = [value(found[name], name) for name in names]
        if any(cell for cell, name in zip(cells, names, strict=True) if name != "dense"):
            rows.append([label, *(cell or "-" for cell in cells)])

    dense = found["dense"]
    row("weights on disk", lambda a, n: "bytes" in a and f"{a['bytes'] / 1e6:.1f} MB")
    row("times smaller", lambda a, n: "bytes" in a and n != "dense" and f"{dense['bytes'] / a['bytes']:.2f}x")
    row("parameters", lambda a, n: "parameters" in a and f"{a['parameters'] / 1e6:.1f} M")
    row(
        "active parameters",
        lambda a, n: a.get("active_parameters") != a.get("parameters") and f"{a['active_parameters'] / 1e6:.1f} M",
    )
    row("memory after a forward", lambda a, n: "memory_mb" in a and f"{a['memory_mb']:.0f} MiB")
    row("zeros in block matrices", lambda a, n: a.get("sparsity") is not None and f"{a['sparsity']:.1%}")
    for size in dict.fromkeys(size for artefact in found.values() for size in artefact.get("latency", {})):
        row(
            f"batch {size}, p50 / p95",
            lambda a, n, s=size: (
                s in a.get("latency", {}) and "{median:.2f} / {p95:.2f} ms".format(**a["latency"][s]["wall_ms"])
            ),
        )
        row(
            f"batch {size}, rows / s",
            lambda a, n, s=size: s in a.get("latency", {}) and f"{a['latency'][s]['rows_per_second']:.0f}",
        )
        for clock in ("wall", "cpu"):
            row(
                f"batch {size}, faster ({clock})",
                lambda a, n, s=size, c=clock: (
                    n != "dense"
                    and s in a.get("latency", {})
                    and "{median:.2f}x ({low:.2f}, {high:.2f})".format(**a["latency"][s][f"speedup_{c}"])
                ),
            )
    row("accuracy", lambda a, n: "accuracy" in a and f"{a['accuracy']['value']:.2%}")
    row("rows measured", lambda a, n: "accuracy" in a and str(a["accuracy"]["n"]))
    row(
        "accuracy - dense, points",
        lambda a, n: (
            "accuracy_difference" in a
            and "{:+.2f} ({:+.2f}, {:+.2f})".format(
                *(100 * a["accuracy_difference"][k] for k in ("value", "low", "high"))
            )
        ),
    )
    row("perplexity", lambda a, n: "perplexity" in a and f"{a['perplexity']['value']:.2f}")
    row("tokens measured", lambda a, n: "perplexity" in a and str(a["perplexity"]["tokens"]))
    row(
        "perplexity / dense",
        lambda a, n: (
            "perplexity_difference" in a and "{value:.3f} ({low:.3f}, {high:.3f})".format(**a["perplexity_difference"])
        ),
    )
    row("KL(dense, it)", lambda a, n: "kl_to_dense" in a and _small(a["kl_to_dense"]))
    row("same top answer as dense", lambda a, n: "agreement" in a and f"{a['agreement']:.2%}")
    return rows
