"""What every stored run would cost, as columns of the long table.

Energy and cache are those of one sequence of 512 tokens, the length of the BitNet papers. All of it
follows from the records; a run that was recorded before dimensions were has bits and bytes alone.
"""

from __future__ import annotations

from typing import Any

from qbench.comparison.energy import energy_of
from qbench.comparison.footprint import footprint_of, kv_cache_bytes
from qbench.record import QuantizationRecord
from qbench.scheme import Scheme

TOKENS = 512
COST_COLUMNS = ("model_bits", "size_bytes", "energy", "energy_int32", "kv_cache_bytes")
"""Bits per weight and bytes of the whole model; joules of arithmetic at 7 nm with INT8 and with
INT32 accumulators; bytes of keys and values."""


def cost_columns(record: QuantizationRecord) -> dict[str, float | None]:
    """The costs of one run; None where the record does not say enough."""
    found: dict[str, Any] = dict.fromkeys(COST_COLUMNS)
    footprint = footprint_of(record)
    if footprint is not None:
        found |= {"model_bits": footprint.bits_per_weight, "size_bytes": footprint.bytes}
    if record.dimensions is not None and record.status == "ok":
        kvbits = Scheme.parse(record.key.scheme).kvbits
        found["energy"] = energy_of(record, TOKENS)
        found["energy_int32"] = energy_of(record, TOKENS, accumulator="int32")
        found["kv_cache_bytes"] = kv_cache_bytes(record.dimensions, TOKENS, kvbits=kvbits)
    return found
