"""One matrix: hessian and weight in, rounded weight out.

GPTQ at 4 bits with groups of 128 against auto-gptq's ``fasterquant``, whose core is byte for byte
that of the reference (IST-DASLab/gptq, which is on no package index). QuIP's LDLQ against QuIP's
loop as published: written here from the paper's eq. 2, one product per column over all later
columns, because the original is on no package index either. Factorizations count on both sides.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from benchmarks import common
from benchmarks.common import Report, Table, Times

if TYPE_CHECKING:
    from torch import Tensor

GPTQ_SHAPES = ((1024, 1024), (5504, 2048), (2048, 5504))
QUIP_SHAPES = ((1024, 1024), (2048, 5504))
QUICK_SHAPES = ((256, 256), (384, 512))
BARS = {"gptq": 2.0, "ldlq": 10.0}
QUIP_SECONDS = 61.0
"""QuIP's own code on 2048 x 5504 in its blocked form, one thread of a machine of this kind."""


def problem(shape: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight (out_features, in_features) and a hessian of correlated, heavy-tailed inputs."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    factors = torch.randn(columns, max(columns // 8, 8), generator=generator)
    spread = torch.rand(columns, generator=generator) + 0.1
    hessian = (factors * spread[:, None]) @ (factors * spread[:, None]).T / factors.shape[1]
    hessian.diagonal().add_(0.05 * spread)
    return weight, hessian


def given_statistics(hessian: Tensor) -> Any:
    """Statistics with this hessian and nothing cached."""
    from qbench import Observer, Statistics

    class Given(Observer):
        name: ClassVar[str] = "hessian"

        def update(self, x: Tensor, n_sequences: int) -> None:
            pass

        def result(self) -> Tensor:
            return hessian.clone()

    statistics = Statistics((Given,))
    statistics.update(hessian[:1, None, :])  # what it sees changes nothing; now it is not empty
    return statistics


def qbench_side(name: str, scheme: str, weight: Tensor, hessian: Tensor, **fields: Any) -> Any:
    """A baseline of qbench on one matrix."""
    import torch

    from qbench import Scheme
    from qbench.registry import load_baseline
    from qbench.study.cells import Cell

    cell = Cell.of(load_baseline(name, fields), Scheme.parse(scheme))
    instance = cell.baseline.instance

    def prepare() -> Callable[[], Tensor]:
        statistics, own = given_statistics(hessian), weight.clone()
        generator = torch.Generator().manual_seed(0)

        def work() -> Tensor:
            found = instance.quantize_weight(own, cell.scheme, statistics, generator)
            return found if isinstance(found, torch.Tensor) else found.weight

        return work

    return prepare


def auto_gptq_side(weight: Tensor, hessian: Tensor) -> Any:
    """auto-gptq's solver on the same."""
    import contextlib
    import io

    import torch

    from benchmarks.environments import import_auto_gptq

    solver_class, _ = import_auto_gptq()

    def prepare() -> Callable[[], Tensor]:
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data = weight.clone()
        solver = solver_class(layer)
        solver.quantizer.configure(4, perchannel=True, sym=False, mse=False)
        solver.H, solver.nsamples = hessian.clone(), 1

        def work() -> Tensor:
            with contextlib.redirect_stdout(io.StringIO()):
                solver.fasterquant(percdamp=0.01, group_size=128)
            return layer.weight.data

        return work

    return prepare


def published_ldlq(weight: Tensor, hessian: Tensor, bits: int = 4) -> Tensor:
    """LDLQ on per-row grids, without incoherence processing."""
    levels = 2**bits - 1
    low = weight.amin(1, keepdim=True).clamp(max=0)
    scale = (weight.amax(1, keepdim=True).clamp(min=0) - low) / levels
    zero = (-low / scale).round()
    target = (weight / scale + zero).clamp(0, levels)
    return (published_ldlq_codes(target, hessian, levels) - zero) * scale


def published_ldlq_codes(target: Tensor, hessian: Tensor, levels: int) -> Tensor:
    """QuIP eq. 2 as published, columns from last to first.

    Ŵ_k = Q(W_k + (W - Ŵ) L_k), with H = (L + I) D (L + I)ᵀ, rounding half up, 1 % damping.
    """
    import torch

    hessian = hessian.clone()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    factor = torch.linalg.cholesky(hessian)
    factor = factor / factor.diagonal()
    factor.diagonal().zero_()
    codes = target.clone()
    for k in reversed(range(target.shape[1])):
        pull = (target[:, k + 1 :] - codes[:, k + 1 :]) @ factor[k + 1 :, k]
        codes[:, k] = torch.floor(target[:, k] + pull + 0.5).clamp(0, levels)
    return codes


def proxy_loss(rounded: Tensor, weight: Tensor, hessian: Tensor) -> float:
    """tr(ΔHΔᵀ) / tr(WHWᵀ)."""
    delta = (rounded - weight).double()
    wide, full = hessian.double(), weight.double()
    return float(((delta @ wide) * delta).sum() / ((full @ wide) * full).sum())


def measure(kind: str, shape: tuple[int, int], repeats: int) -> dict[str, Any]:
    """Both sides on one shape."""
    import torch

    weight, hessian = problem(shape)
    if kind == "gptq":
        peer_name, peer = "auto-gptq", auto_gptq_side(weight, hessian)
        ours = qbench_side("gptq", "W4A16g128:grid=asym", weight, hessian)
    else:
        peer_name, peer = "QuIP's loop", lambda: lambda: published_ldlq(weight, hessian)
        ours = qbench_side(
            "quip", "W4A16:w=channel,grid=asym", weight, hessian, incoherence="false"
        )
    _warm_up(kind)
    sides = {"qbench": ours, peer_name: peer}
    times, values = common.take_turns(sides, repeats, fewer=3)
    return {
        "kind": kind,
        "shape": list(shape),
        "peer": peer_name,
        "seconds": {name: t.seconds for name, t in times.items()},
        "cpu_seconds": {name: t.cpu for name, t in times.items()},
        "proxy_loss": {n: proxy_loss(v, weight, hessian) for n, v in values.items()},
        "equal": float(
            torch.isclose(values["qbench"], values[peer_name], atol=1e-5).double().mean()
        ),
    }


def _warm_up(kind: str) -> None:
    """Compile what is compiled once per process, on a matrix of the smallest size."""
    weight, hessian = problem((128, 128))
    name, scheme, fields = "gptq", "W4A16g128:grid=asym", {}
    if kind != "gptq":
        name, scheme, fields = "quip", "W4A16:w=channel,grid=asym", {"incoherence": "false"}
    qbench_side(name, scheme, weight, hessian, **fields)()()


def table(threads: int, found: list[dict[str, Any]]) -> Table:
    """Rows of one number of threads."""
    columns = ["matrix (out x in)", "method", "peer", "peer, wall", "qbench, wall", "ratio"]
    columns += ["by processor time"]
    made = Table(
        f"Solver, 4 bits, {threads} thread{'s' if threads > 1 else ''}",
        [*columns, "bar", "equal weights", "proxy loss peer / qbench"],
    )
    for row in found:
        cpu = row["cpu_seconds"]
        times = {name: Times(s, cpu[name]) for name, s in row["seconds"].items()}
        middle, shown = common.ratio(times[row["peer"]], times["qbench"])
        losses = row["proxy_loss"]
        wide = max(row["shape"]) > 4096  # LDLQ's bar is that of the matrix that took QuIP a minute
        made.rows.append(
            [
                "{} x {}".format(*row["shape"]),
                "GPTQ g128" if row["kind"] == "gptq" else "LDLQ",
                row["peer"],
                str(times[row["peer"]]),
                str(times["qbench"]),
                shown,
                common.cpu_ratio(times[row["peer"]], times["qbench"]),
                common.against(middle, BARS[row["kind"]]) if row["kind"] == "gptq" or wide else "",
                f"{row['equal']:.2%}",
                f"{losses[row['peer']]:.5f} / {losses['qbench']:.5f}",
            ]
        )
    made.notes = [
        f"The original QuIP took {QUIP_SECONDS:g} s on 2048 x 5504, blocked, one thread of a "
        "machine of this kind.",
    ]
    return made


def main() -> None:
    given = common.parser(__doc__ or "")
    given.add_argument("--thread-counts", default="1,2", help="one table for each")
    options = given.parse_args()
    if options.child:
        kind, rows, columns = options.child.split(",")
        print(json.dumps(measure(kind, (int(rows), int(columns)), options.repeats)))
        return
    counts = [int(n) for n in options.thread_counts.split(",")]
    report = Report("solvers", "Solvers: one matrix", f"{options.thread_counts}, one at a time")
    for threads in counts:
        found = []
        for kind, shapes in (("gptq", GPTQ_SHAPES), ("ldlq", QUIP_SHAPES)):
            for rows, columns in QUICK_SHAPES if options.quick else shapes:
                asked = ["--child", f"{kind},{rows},{columns}", "--repeats", str(options.repeats)]
                found.append(common.own_child("solvers", asked, threads))
        report.add(table(threads, found))
        report.measurements[f"{threads} threads"] = found
    report.save(options)


if __name__ == "__main__":
    main()
