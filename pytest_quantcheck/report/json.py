"""The JSON documents, schema 1: stable keys, numbers as numbers, what has no value as null."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from pytest_quantcheck.artifact import Artifact
from pytest_quantcheck.checks.cost import Cost
from pytest_quantcheck.checks.diff import Difference, Total
from pytest_quantcheck.checks.fidelity import Comparison, Fidelity
from pytest_quantcheck.checks.metrics import Shard
from pytest_quantcheck.checks.predict import Predicted, Prediction
from pytest_quantcheck.checks.tree import Node
from pytest_quantcheck.checks.why import Explanation, Reason
from pytest_quantcheck.finding import Finding
from pytest_quantcheck.report.run import Run
from pytest_quantcheck.tensor import LogicalTensor

SCHEMA = 1


def render(run: Run) -> str:
    """Return what `quantcheck check --json` prints."""
    return dumps(run) + "\n"


def dumps(document: Mapping[str, Any]) -> str:
    """Return a document as one line: names as they are, but written so that no CI log takes one for a command."""
    # At once: `json.dump` goes through Python for every value.
    return json.dumps(document, allow_nan=False).replace("##", "#\\u0023")


def of_artifact(artifact: Artifact) -> dict[str, Any]:
    """Return what `quantcheck inspect --json` prints."""
    bits = artifact.bits_per_weight
    return {
        "schema": SCHEMA,
        "source": artifact.source,
        "container": artifact.container,
        "logical_params": artifact.logical_params,
        "stored_elements": artifact.stored_elements,
        "tied_params": artifact.tied_params,
        "buffers": artifact.buffers,
        "file_bytes": artifact.file_bytes,
        "bytes": artifact.bytes,
        "bits_per_weight": {"quantized": _rounded(bits.quantized), "model": _rounded(bits.model)},
        "quantized_fraction": _rounded(artifact.quantized_fraction),
        "schemes": {name: total._asdict() for name, total in artifact.schemes.items()},
        "tensors": [_tensor(tensor) for tensor in artifact.tensors],
        "findings": _findings(artifact.findings),
    }


def of_comparison(comparison: Comparison) -> dict[str, Any]:
    """Return what `quantcheck compare --json` prints."""
    return {
        "schema": SCHEMA,
        "compared": len(comparison.tensors),
        "sqnr_db": _finite(comparison.sqnr_db),
        "findings": _findings(comparison.findings),
        "tensors": [_fidelity(row) for row in comparison.tensors],
    }


def of_explanation(explanation: Explanation, root: Node) -> dict[str, Any]:
    """Return what `quantcheck why --json` prints."""
    bits = explanation.bits
    return {
        "schema": SCHEMA,
        "source": explanation.source,
        "container": explanation.container,
        "logical_params": explanation.logical_params,
        "file_bytes": explanation.file_bytes,
        "bits": None if bits is None else _rounded(float(bits)),
        "bytes_in_16_bit": explanation.bytes_in_16_bit,
        "bytes_in_32_bit": explanation.bytes_in_32_bit,
        "expected_bytes": explanation.expected_bytes,
        "code_bytes": explanation.code_bytes,
        "reasons": [_reason(reason) for reason in explanation.reasons],
        "cost": _cost(explanation.cost),
        "tree": _node(root),
    }


def of_difference(difference: Difference, limit: int) -> dict[str, Any]:
    """Return what `quantcheck diff --json` prints."""
    rest = difference.tensors[limit:]
    return {
        "schema": SCHEMA,
        "old": difference.old_source,
        "new": difference.new_source,
        "file_bytes": _total(difference.file_bytes),
        "logical_params": _total(difference.logical_params),
        "outside_tensors": _total(difference.outside),
        "bytes": {kind: _total(total) for kind, total in difference.classes.items()},
        "changed": len(difference.tensors),
        "unchanged": difference.unchanged,
        "tensors": [change._asdict() | {"growth": change.growth} for change in difference.tensors[:limit]],
        "rest": {"tensors": len(rest), "growth": sum(change.growth for change in rest)},
    }


def _cost(cost: Cost) -> dict[str, Any]:
    return {
        "downloads": [
            {"megabits_per_second": link.megabits, "seconds": round(link.seconds, 3)} for link in cost.downloads
        ],
        "load": {"weights": cost.weights, "largest_decoded": cost.largest_decoded, "bytes": cost.load},
        "gpus": [{"name": fit.gpu, "memory": fit.memory, "left": fit.left} for fit in cost.gpus],
    }


def of_prediction(prediction: Prediction) -> dict[str, Any]:
    """Return what `quantcheck predict --json` prints."""
    return {
        "schema": SCHEMA,
        "source": prediction.source,
        "logical_params": prediction.logical_params,
        "dtype": prediction.dtype,
        "recipes": [_predicted(row) for row in prediction.predicted],
        "fits": [fit._asdict() for fit in prediction.fits],
    }


def _predicted(row: Predicted) -> dict[str, Any]:
    sizes = row.sizes
    bits = sizes and sizes.bits_per_weight
    return {
        "recipe": row.recipe,
        "made_by": row.title,
        "container": sizes and row.container,
        "tensor_bytes": sizes and sizes.tensor_bytes,
        "less_at_most": row.less,
        "bytes": sizes and sizes.bytes,
        "bits_per_weight": bits and {"quantized": _rounded(bits.quantized), "model": _rounded(bits.model)},
        "unquantized": [left._asdict() for left in sizes.kept] if sizes else [],
        "refused": row.refused,
    }


def _reason(reason: Reason) -> dict[str, Any]:
    return {
        "kind": reason.kind,
        "bytes": reason.bytes,
        "share": _rounded(reason.share),
        "count": reason.holders,
        "names": list(reason.names),
        "dtypes": list(reason.dtypes),
        "originals": list(reason.originals),
        "savings": [saving._asdict() for saving in reason.savings],
    }


def _node(node: Node) -> dict[str, Any]:
    children = [_node(child) for child in node.children]
    return {"level": node.level, "name": node.name, "bytes": node.bytes, "count": node.number, "children": children}


def _total(total: Total) -> dict[str, int]:
    return {"old": total.old, "new": total.new, "growth": total.growth}


def _tensor(tensor: LogicalTensor) -> dict[str, Any]:
    stored = tensor.stored
    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "params": tensor.params,
        "scheme": tensor.scheme,
        "bits_per_weight": _rounded(tensor.bits_per_weight),
        "stored": {"dtype": stored.dtype, "shape": list(stored.shape)},
        "bytes": tensor.bytes,
        "role": tensor.role,
    }


def _fidelity(row: Fidelity) -> dict[str, Any]:
    return {
        "name": row.name,
        "scheme": row.scheme,
        "sqnr_db": _finite(row.sqnr_db),
        "relative_error": _finite(row.relative_error),
        "gain": _finite(row.gain),
        "bias": _finite(row.bias),
        "cosine": _finite(row.cosine),
        "max_error": _finite(row.max_error),
        "max_error_sigmas": _finite(row.max_error_sigmas),
        "max_error_steps": _finite(row.max_error_steps),
        "beyond_half_step": row.beyond_half_step,
        "min_block_sqnr_db": _finite(row.min_block_sqnr_db),
        "min_row_sqnr_db": _finite(row.min_row_sqnr_db),
        "worst_row": row.worst_row,
        "zero_fraction": _finite(row.zero_fraction),
        "reference_zero_fraction": _finite(row.reference_zero_fraction),
        "non_finite": row.extremes.non_finite,
        "reference_non_finite": row.extremes.reference_non_finite,
        "changed": row.extremes.changed,
        "rounding_sqnr_db": _finite(row.rounding_sqnr_db),
        "expected_sqnr_db": _finite(row.expected_sqnr_db),
        "verdict": verdict(row),
        "faults": list(row.faults),
        "shards": [_shard(shard) for shard in row.shards],
    }


def _shard(shard: Shard) -> dict[str, Any]:
    sums = shard.sums
    return {
        "name": shard.name,
        "sqnr_db": _finite(sums.sqnr_db),
        "gain": _finite(sums.gain),
        "bias": _finite(sums.bias),
    }


def verdict(row: Fidelity) -> str:
    """Return `failed`, `equal` (no error at all, so no finite SQNR) or `passed`."""
    if row.faults:
        return "failed"
    return "equal" if math.isinf(row.sqnr_db) else "passed"


def _findings(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    return [finding._asdict() for finding in findings]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _finite(value: float | None) -> float | None:
    """JSON has no infinity and no NaN."""
    return round(value, 6) if value is not None and math.isfinite(value) else None
