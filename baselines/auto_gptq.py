"""auto-gptq 0.7.1's own GPTQ and Quantizer as the engine, beside the methods written here (extra).

GPTQ 2210.17323 as AutoGPTQ released it, run unchanged: the oracle inside the table. An optional
extra, ``pip install "qbench[auto-gptq]"``. The library is no longer maintained and as a whole does
not import beside transformers 5, but its hessian, column loop and grids are two files of their own.
Those are imported alone, without the package around them; while they run on a machine without CUDA,
``torch.cuda.synchronize`` does nothing. What this takes is undone at once: torch's flags, modules
and environment are afterwards what they were.

Weights are taken from ``fasterquant``, not from the library's packed layers: its packing loses zero
points of 0 and those of their neighbours. Left out: its model classes, which need CUDA; the loop
over blocks is qbench's. Defaults are the library's: symmetric codes, act-order, true-sequential.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from qbench import (
    Baseline,
    CannotQuantize,
    Observer,
    QBenchError,
    QuantizedWeight,
    Scheme,
    Statistics,
    check_group_size,
)

if TYPE_CHECKING:
    from qbench.models.blocks import Block

LIBRARY = "auto_gptq"
BITS = (2, 3, 4, 8)
GRIDS = {"gptq_sym": True, "asym": False}
"""Grid -> the library's ``sym``."""


@cache
def solver_class() -> Any:
    """The library's GPTQ.

    Raises:
        QBenchError: if it is not installed, or its files cannot be imported.
    """
    spec = None if LIBRARY in sys.modules else importlib.util.find_spec(LIBRARY)
    if spec is None and LIBRARY not in sys.modules:
        wheels = "; its wheels end with Python 3.11" if sys.version_info >= (3, 12) else ""
        raise QBenchError(
            f'auto-gptq is not installed; pip install "qbench[auto-gptq]"{wheels}, or take the '
            "baseline gptq, which gives the same weights"
        )
    try:
        with _package_alone(list(spec.submodule_search_locations or []) if spec else []):
            module = importlib.import_module(f"{LIBRARY}.quantization.gptq")
            return module.GPTQ
    except (ImportError, AttributeError) as error:
        raise QBenchError(
            f"auto-gptq is installed, but its GPTQ cannot be imported ({error}); 0.7.1 can: "
            'pip install "qbench[auto-gptq]"'
        ) from error


@contextmanager
def _package_alone(folders: list[str]) -> Iterator[None]:
    """Within this, parts of the library can be imported without what its ``__init__`` imports.

    Importing them switches TF32 off for the whole process, which is undone too.
    """
    if LIBRARY in sys.modules:  # the user's own import, which worked
        yield
        return
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    flags = matmul.allow_tf32, convolution.allow_tf32
    package = types.ModuleType(LIBRARY)
    package.__path__ = folders
    sys.modules[LIBRARY] = package
    try:
        yield
    finally:
        for name in [n for n in sys.modules if n == LIBRARY or n.startswith(f"{LIBRARY}.")]:
            del sys.modules[name]
        matmul.allow_tf32, convolution.allow_tf32 = flags


@contextmanager
def _at_work() -> Iterator[None]:
    """Within this, the library runs without CUDA, and a variable DEBUG means nothing to it."""
    synchronize, debug = torch.cuda.synchronize, os.environ.pop("DEBUG", None)
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda *_: None
    try:
        yield
    finally:
        torch.cuda.synchronize = synchronize
        if debug is not None:
            os.environ["DEBUG"] = debug


def _solver(weight: Tensor) -> Any:
    """The library's GPTQ on a matrix (out_features, in_features), which it leaves as it is."""
    linear = nn.Linear(1, 1, bias=False, device="meta")  # no weight is drawn
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return solver_class()(linear)


class AddBatch(Observer):
    """The hessian as the library accumulates it, (in_features, in_features), float32."""

    name = "hessian"

    def __init__(self) -> None:
        self.solver: Any = None

    def update(self, x: Tensor, n_sequences: int) -> None:
        """Give it the inputs, in as many sequences as they came from."""
        if self.solver is None:
            self.solver = _solver(x.new_zeros(1, x.shape[1]))
        before = self.solver.nsamples
        whole = n_sequences > 0 and len(x) % n_sequences == 0
        with _at_work():
            self.solver.add_batch(x.unflatten(0, (n_sequences if whole else 1, -1)), None)
        if not whole:  # it counted one sequence, or the rest of one that was counted already
            after = before + n_sequences
            self.solver.H *= self.solver.nsamples / after
            self.solver.nsamples = after

    def result(self) -> Tensor | None:
        """The mean so far."""
        return None if self.solver is None else self.solver.H


@dataclass(frozen=True)
class AutoGPTQ(Baseline):
    """GPTQ by auto-gptq 0.7.1."""

    is_random: ClassVar[bool] = False
    weights_ignore_activations: ClassVar[bool] = True
    weight_statistics: ClassVar[tuple[type[Observer], ...]] = (AddBatch,)

    percdamp: float = 0.01
    """Share of the hessian's mean diagonal that is added to its diagonal (``damp_percent``)."""
    act_order: bool = True
    """Take columns by decreasing diagonal of the hessian (``desc_act``)."""
    static_groups: bool = False
    """Fit every group's grid before the first column is rounded."""
    true_sequential: bool = True
    """Within a block, calibrate each group of linears after the ones before it are rounded."""
    block_size: int = 128
    """Columns whose updates are applied to the rest of the matrix together."""
    mse: bool = False
    """Shrink each range to the one of least rounding error before fitting the grid."""

    def check(self) -> None:
        """The library is there; at least one column in a block, no negative damping."""
        solver_class()
        if self.block_size < 1 or self.percdamp < 0:
            raise QBenchError(
                f"AutoGPTQ block_size={self.block_size}, percdamp={self.percdamp:g}: a block has "
                "at least 1 column and damping is not negative; use 128 and 0.01"
            )

    def default_grid(self, scheme: Scheme) -> str:
        """The library's symmetric codes at the widths it has."""
        return "gptq_sym" if scheme.wbits >= 2 else super().default_grid(scheme)

    def supports(self, scheme: Scheme) -> str | None:
        """Its widths and grids, a scale for every row or group."""
        if scheme.wbits not in (*BITS, 16):
            return f"auto-gptq has {', '.join(map(str, BITS))} bits"
        if scheme.wbits < 16 and scheme.grid not in (*GRIDS, "auto"):
            return f"auto-gptq has the grids {' and '.join(GRIDS)}"
        if scheme.wbits < 16 and scheme.w_granularity == "tensor":
            return "auto-gptq has a scale for every row or group; drop w=tensor"
        return None

    def stages(self, block: Block) -> list[list[str]]:
        """One stage per shared input, or all linears at once."""
        return block.input_groups if self.true_sequential else super().stages(block)

    def quantize_weight(
        self, weight: Tensor, scheme: Scheme, stats: Statistics, generator: Generator
    ) -> QuantizedWeight:
        """Quantize ``weight`` (out_features, in_features) along the hessian of its input.

        Raises:
            CannotQuantize: if the hessian is not finite or not positive definite.
            QBenchError: for a group size that does not divide.
        """
        check_group_size(weight.shape[1], scheme.group_size)
        hessian = stats.hessian
        if not torch.isfinite(hessian).all():
            raise CannotQuantize("the hessian is not finite")
        solver = _solver(weight)
        solver.H = hessian.clone()  # it writes into it
        solver.nsamples = stats.n_sequences  # for a line it logs
        sym = GRIDS[scheme.grid]
        solver.quantizer.configure(int(scheme.wbits), perchannel=True, sym=sym, mse=self.mse)
        try:
            with _at_work():
                scale, zero, groups = solver.fasterquant(
                    blocksize=self.block_size,
                    percdamp=self.percdamp,
                    group_size=scheme.group_size,
                    actorder=self.act_order,
                    static_groups=self.static_groups and scheme.group_size > 0,
                )
        except torch.linalg.LinAlgError as error:
            raise CannotQuantize(f"auto-gptq: {str(error).splitlines()[0]}") from error
        found = solver.layer.weight.data
        spread = scale[:, groups.long()]
        codes = torch.round(found / spread) + (0 if sym else zero[:, groups.long()])
        return QuantizedWeight(
            weight=found,
            codes=codes,
            scale=scale,
            zero_point=torch.zeros_like(zero) if sym else zero,
            g_idx=groups if groups.diff().lt(0).any() else None,
            report={"damping": self.percdamp, "engine": "auto-gptq 0.7.1"},
        )
