"""Products with weights in float32: qbench's way on a CPU against ``torch.nn.functional.linear``.

Shapes are those of a block of 512 channels with its output head, of GPT-2's and Llama's blocks of
768 and 2048 channels. Sides take turns on the same tensors, inside one process, as often as makes
each shape last a second; ratios are of medians.
"""

from __future__ import annotations

import time

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


def main() -> None:
    options = common.parser(__doc__ or "").parse_args()
    import torch
    import torch.nn.functional as F
    from torch import nn

    from qbench.models.products import fast_products, has_onednn

    if not has_onednn():
        print("this torch has no oneDNN for this processor; qbench multiplies as torch does")
        return
    torch.set_num_threads(options.threads)
    report = Report("products", "Products with weights", str(options.threads))
    columns = ["tokens x inputs x outputs", "torch", "qbench", "ratio", "largest difference"]
    table = Table("float32, GFLOP/s in brackets", columns)
    with torch.inference_mode():
        for tokens, inputs, outputs in SHAPES:
            x, weight = torch.randn(tokens, inputs), torch.randn(outputs, inputs)
            block = nn.Module()
            block.weight = nn.Parameter(weight)
            model = nn.ModuleDict({"blocks": nn.ModuleList([block])})
            theirs, ours = Times(), Times()
            difference, started = 0.0, time.perf_counter()
            while len(ours.seconds) < 5 or time.perf_counter() - started < LASTS:
                began = time.perf_counter()
                expected = F.linear(x, weight)
                middle = time.perf_counter()
                with fast_products(model):
                    entered = time.perf_counter()
                    found = F.linear(x, weight)
                    ended = time.perf_counter()
                theirs.seconds.append(middle - began)
                ours.seconds.append(ended - entered)
                difference = float((found - expected).abs().max() / expected.abs().max())
            work = 2 * tokens * inputs * outputs / 1e9
            cells = [f"{1e3 * t.median:.2f} ms ({work / t.median:.0f})" for t in (theirs, ours)]
            name = f"{tokens} x {inputs} x {outputs}"
            report.measurements[name] = [theirs.median, ours.median]
            ratio = f"{theirs.median / ours.median:.2f}x"
            table.rows.append([name, *cells, ratio, f"{difference:.1e}"])
    table.notes = ["The difference is relative to the largest product."]
    report.add(table)
    report.save(options)


if __name__ == "__main__":
    main()
