"""Products with weights in float32: qbench's way on a CPU against ``torch.nn.functional.linear``.

Shapes are those of a block of 512 channels with its output head, and of blocks of 768 and 2048
channels. Sides take turns on the same tensors, inside one process, as often as makes each shape
last a second; ratios are of medians. oneDNN compiles a kernel for every number of tokens that it
meets for the first time, so each shape is measured again with another number every time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from benchmarks import common
from benchmarks.common import Report, Table, Times

SHAPES = (
    (512, 512, 512),
    (512, 512, 1376),
    (512, 1376, 512),
    (330, 512, 32000),
    (2048, 768, 768),
    (2048, 768, 2048),
    (512, 2048, 5504),
)
"""Tokens, inputs, outputs."""
LASTS = 1.0


def turns(tokens: Callable[[int], int], inputs: int, outputs: int) -> tuple[Times, Times, float]:
    """Times of both sides, and the largest difference relative to the largest product."""
    import torch
    import torch.nn.functional as F

    from qbench.models.products import fast_linear

    weight = torch.randn(outputs, inputs)
    theirs, ours, difference = Times(), Times(), 0.0
    sides = ((F.linear, theirs), (fast_linear, ours))
    started = time.perf_counter()
    while len(ours.seconds) < 5 or time.perf_counter() - started < LASTS:
        turn = len(ours.seconds)
        x = torch.randn(tokens(turn), inputs)
        found = {}
        for multiply, times in sides if turn % 2 else sides[::-1]:
            began = time.perf_counter()
            found[multiply] = multiply(x, weight)
            times.seconds.append(time.perf_counter() - began)
        expected = found[F.linear]
        error = (found[fast_linear] - expected).abs().max() / expected.abs().max()
        difference = max(difference, float(error))
    return theirs, ours, difference


def main() -> None:
    options = common.parser(__doc__ or "").parse_args()
    os.environ.update(common.thread_variables(options.threads))  # before torch is loaded
    import torch

    from qbench.models.products import has_onednn

    if not has_onednn():
        print("this torch has no oneDNN for this processor; qbench multiplies as torch does")
        return
    report = Report("products", "Products with weights", str(options.threads))
    columns = ["tokens x inputs x outputs", "torch", "qbench", "ratio"]
    table = Table(
        "float32, GFLOP/s in brackets", [*columns, "other tokens every time", "difference"]
    )
    with torch.inference_mode():
        for tokens, inputs, outputs in SHAPES[:2] if options.quick else SHAPES:
            same = turns(lambda _, n=tokens: n, inputs, outputs)  # type: ignore[misc]
            other = turns(lambda turn, n=tokens: n + turn, inputs, outputs)  # type: ignore[misc]
            work = 2 * tokens * inputs * outputs / 1e9
            cells = [f"{1e3 * t.median:.2f} ms ({work / t.median:.0f})" for t in same[:2]]
            ratios = [f"{peer.median / own.median:.2f}x" for peer, own, _ in (same, other)]
            name = f"{tokens} x {inputs} x {outputs}"
            table.rows.append([name, *cells, *ratios, f"{max(same[2], other[2]):.1e}"])
            report.measurements[name] = [t.median for t in (*same[:2], *other[:2])]
    table.notes = ["The difference is relative to the largest product."]
    report.add(table)
    report.save(options)


if __name__ == "__main__":
    main()
