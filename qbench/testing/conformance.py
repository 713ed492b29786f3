"""The contract of a baseline as checks that anyone can run on their own class.

``qbench check my_method.py:MyMethod`` runs them and says what is wrong. "More bits are never worse"
is deliberately not among them: it does not hold, not even for the published methods.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qbench.baseline import Baseline, resolve_scheme, why_not
from qbench.errors import QBenchError
from qbench.grid import QuantizedWeight, get_grid, rows_of
from qbench.models.blocks import find_blocks, trace_block
from qbench.quantization.calibration import capture
from qbench.quantization.factorize import CannotQuantize
from qbench.quantization.observers import Statistics
from qbench.quantization.quantize import quantize_model
from qbench.scheme import WEIGHT_BITS, Scheme, format_bits
from qbench.testing.models import tiny_model, tiny_windows

OUT, IN = 24, 48
"""Shape of the matrix most checks use."""


@dataclass(frozen=True)
class Outcome:
    """One check: what it asks for, and what was wrong, if anything."""

    name: str
    problem: str | None

    def __str__(self) -> str:
        return f"{'FAIL' if self.problem else 'ok':5}{self.name}" + (
            f"\n       {self.problem}" if self.problem else ""
        )


class Violation(Exception):
    """Raised by a check with one sentence about what is wrong."""


def check_baseline(baseline: Baseline) -> list[Outcome]:
    """Run every check; never raises for what the baseline does."""
    outcomes = []
    for check in CHECKS:
        try:
            check(baseline)
            problem = None
        except Violation as violation:
            problem = str(violation)
        except Exception as error:  # a baseline under test may raise anything
            problem = f"raised {type(error).__name__}: {error}"
        outcomes.append(Outcome(check.__name__.removeprefix("check_").replace("_", " "), problem))
    return outcomes


def claimed(baseline: Baseline) -> dict[float, Scheme]:
    """Width -> resolved scheme, for every width below 16 the baseline does not decline."""
    found = {}
    for bits in WEIGHT_BITS:
        if bits < 16:
            scheme = resolve_scheme(Scheme(wbits=bits), baseline)
            if why_not(baseline, scheme) is None:
                found[bits] = scheme
    return found


@cache
def _example() -> tuple[Tensor, Tensor]:
    """A weight (OUT, IN) and correlated, heavy-tailed inputs (8, 32, IN)."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT, IN, generator=generator) * 0.05
    mixing = torch.randn(IN, IN, generator=generator) / IN**0.5
    x = torch.randn(8, 32, IN, generator=generator) @ (torch.eye(IN) + mixing)
    x[..., 3] *= 8
    return weight, x


def _statistics(baseline: Baseline, x: Tensor) -> Statistics:
    stats = Statistics(baseline.weight_statistics)
    for sequence in x:
        stats.update(sequence[None])
    return stats


def _quantize(
    baseline: Baseline, scheme: Scheme, weight: Tensor | None = None, x: Tensor | None = None
) -> QuantizedWeight:
    example = _example()
    weight = example[0] if weight is None else weight
    stats = _statistics(baseline, example[1] if x is None else x)
    generator = torch.Generator().manual_seed(1)
    found = baseline.quantize_weight(weight.clone(), scheme, stats, generator)
    return found if isinstance(found, QuantizedWeight) else QuantizedWeight(found)


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise Violation(problem)


def check_it_can_be_constructed_without_arguments(baseline: Baseline) -> None:
    """Every field has a default."""
    type(baseline)()


def check_it_is_a_frozen_dataclass(baseline: Baseline) -> None:
    """Assigning a field raises."""
    cls = type(baseline)
    _require("__dataclass_fields__" in vars(cls), f"decorate {cls.__name__} with @dataclass")
    frozen = cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    _require(frozen, "use @dataclass(frozen=True), so that a record's parameters stay true")


def check_its_parameters_are_json(baseline: Baseline) -> None:
    """They go into records and keys, and rebuild the same object."""
    parameters = baseline.parameters()
    again = json.loads(json.dumps(parameters))
    _require(again == parameters, f"{parameters} does not survive JSON; use plain types")
    same = dataclasses.replace(type(baseline)(), **parameters) == baseline
    _require(same, "constructing from its own parameters gives something else")


def check_every_claimed_width_gives_finite_weights(baseline: Baseline) -> None:
    """Right shape, float, finite and not all zero, from 8 bits down to 1."""
    weight = _example()[0]
    for bits, scheme in claimed(baseline).items():
        found = _quantize(baseline, scheme).weight
        where = f"at {format_bits(bits)} bits"
        _require(found.shape == weight.shape, f"{where} the shape is {tuple(found.shape)}")
        _require(found.is_floating_point(), f"{where} the dtype is {found.dtype}")
        _require(bool(torch.isfinite(found).all()), f"{where} weights are not finite")
        _require(bool(found.any()), f"{where} every weight is zero")


def check_it_leaves_its_inputs_untouched(baseline: Baseline) -> None:
    """Neither the weight nor the statistics change: other linears read them too."""
    weight, x = _example()
    for scheme in claimed(baseline).values():
        given, stats = weight.clone(), _statistics(baseline, x)
        before = {name: stats[name].clone() for name in stats._observers}
        baseline.quantize_weight(given, scheme, stats, torch.Generator().manual_seed(1))
        _require(torch.equal(given, weight), "quantize_weight writes into the weight it is given")
        for name, value in before.items():
            _require(torch.equal(stats[name], value), f"it writes into stats.{name}")


def check_the_same_seed_gives_the_same_weights(baseline: Baseline) -> None:
    """And the global random state stays as it was."""
    state = torch.get_rng_state()
    for scheme in claimed(baseline).values():
        first, second = (_quantize(baseline, scheme).weight for _ in range(2))
        _require(torch.equal(first, second), "two calls with equal generators differ")
    untouched = torch.equal(state, torch.get_rng_state())
    _require(untouched, "it draws from torch's global generator; use the one it is given")


def check_no_more_levels_than_the_grid_has(baseline: Baseline) -> None:
    """Distinct values per row, group or tensor."""
    if not baseline.on_grid:
        return
    for bits, scheme in claimed(baseline).items():
        found = _quantize(baseline, scheme)
        if found.input_transform is not None:
            return
        allowed = get_grid(scheme.grid).levels(bits)
        for row in rows_of(found.weight, scheme).flatten(0, 1):
            count = len(torch.unique(row))
            _require(
                count <= allowed,
                f"{count} distinct values in a row at {format_bits(bits)} bits, grid "
                f"{scheme.grid} has {allowed}; set on_grid=False if it rounds in another basis",
            )


def check_a_dead_input_channel_does_no_harm(baseline: Baseline) -> None:
    """An input that is always zero leaves everything finite."""
    weight, x = _example()
    dead = x.clone()
    dead[..., 5] = 0
    for bits, scheme in claimed(baseline).items():
        found = _quantize(baseline, scheme, x=dead).weight
        finite = bool(torch.isfinite(found).all())
        _require(finite, f"not finite with a dead input channel at {format_bits(bits)} bits")


def check_a_group_size_that_does_not_divide_is_refused(baseline: Baseline) -> None:
    """With a QBenchError, not with a crash or a wrong answer."""
    for bits in claimed(baseline):
        scheme = resolve_scheme(Scheme(wbits=bits, group_size=IN - 1), baseline)
        if why_not(baseline, scheme) is not None:
            continue
        try:
            _quantize(baseline, scheme)
        except QBenchError:
            continue
        raise Violation(
            f"group size {IN - 1} was accepted for rows of {IN}; call check_group_size()"
        )


def check_eight_bits_lose_less_than_ten_percent(baseline: Baseline) -> None:
    """Relative error of the layer's output. QuIP's grid of ±2.4·rms clips 6 % away by itself."""
    scheme = claimed(baseline).get(8)
    if scheme is None:
        return
    weight, x = _example()
    found = _quantize(baseline, scheme)
    inputs = x if found.input_transform is None else found.input_transform(x)
    error = float((inputs @ found.weight.T - x @ weight.T).norm() / (x @ weight.T).norm())
    _require(error < 0.10, f"the output of a layer is off by {error:.1%} at 8 bits")


def check_transform_preserves_the_function(baseline: Baseline) -> None:
    """prepare() and transform() leave the full-precision model's outputs as they were."""
    if not baseline.preserves_function:
        return
    model, windows = tiny_model(), tiny_windows(4, 24)
    with torch.no_grad():
        before = model(windows).logits
        _transform_only(baseline, model, windows)
        after = model(windows).logits
    error = float((after - before).norm() / before.norm())
    _require(
        error < 1e-3,
        f"transform() changed the outputs by {error:.1%}; set preserves_function=False if meant",
    )


def _transform_only(baseline: Baseline, model: torch.nn.Module, windows: Tensor) -> None:
    from qbench.baseline import TransformContext
    from qbench.quantization.passes import collect

    generator = torch.Generator().manual_seed(1)
    baseline.prepare(model, generator)
    captured = capture(model, windows)
    hidden = captured.hidden
    scheme = next(iter(claimed(baseline).values()), resolve_scheme(Scheme(abits=8), baseline))
    for name, module in find_blocks(model):
        block, _ = trace_block(name, module, captured.runner(name, module), hidden[0])
        stats, outputs = collect(block, list(block.linears), baseline.transform_statistics, hidden)
        context = TransformContext(block, scheme, stats, hidden, outputs, generator)
        baseline.transform(block, context)
        hidden = outputs


def check_sixteen_bits_are_the_identity(baseline: Baseline) -> None:
    """W16A16 changes no parameter."""
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    quantize_model(model, baseline, Scheme(), tiny_windows(2, 16))
    same = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    _require(same, "W16A16 changed the model")


def check_a_whole_model_runs_at_two_bits_and_eight_bit_activations(baseline: Baseline) -> None:
    """End to end, or a sentence why not."""
    scheme = resolve_scheme(Scheme(wbits=2, abits=8), baseline)
    if why_not(baseline, scheme) is not None:
        return
    model = tiny_model()
    result = quantize_model(model, baseline, scheme, tiny_windows(4, 24))
    fallbacks = [layer.name for layer in result.layers if layer.fallback]
    _require(not fallbacks, f"{len(fallbacks)} layers fell back to rounding to nearest")
    with torch.no_grad():
        logits = model(tiny_windows(2, 16, seed=3)).logits
    _require(bool(torch.isfinite(logits).all()), "the quantized model gives non-finite logits")


def check_a_hopeless_hessian_is_declined(baseline: Baseline) -> None:
    """Non-finite statistics end in CannotQuantize, which the harness mends, not in NaN weights."""
    if "hessian" not in _statistics(baseline, _example()[1]):
        return
    broken = _example()[1].clone()
    broken[0, 0, 0] = float("inf")
    for scheme in claimed(baseline).values():
        try:
            found = _quantize(baseline, scheme, x=broken).weight
        except CannotQuantize:
            continue
        _require(bool(torch.isfinite(found).all()), "a hessian with infinities gives NaN weights")


CHECKS: tuple[Callable[[Baseline], None], ...] = (
    check_it_can_be_constructed_without_arguments,
    check_it_is_a_frozen_dataclass,
    check_its_parameters_are_json,
    check_every_claimed_width_gives_finite_weights,
    check_it_leaves_its_inputs_untouched,
    check_the_same_seed_gives_the_same_weights,
    check_no_more_levels_than_the_grid_has,
    check_a_dead_input_channel_does_no_harm,
    check_a_group_size_that_does_not_divide_is_refused,
    check_eight_bits_lose_less_than_ten_percent,
    check_transform_preserves_the_function,
    check_sixteen_bits_are_the_identity,
    check_a_whole_model_runs_at_two_bits_and_eight_bit_activations,
    check_a_hopeless_hessian_is_declined,
)
