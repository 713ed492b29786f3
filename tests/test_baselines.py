"""The contract, check by check, for every registered baseline; and that the checks can fail."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from registered import built_in

from qbench import Baseline, CannotQuantize, QBenchError, QuantizedWeight, round_to_nearest
from qbench.registry import load_baseline
from qbench.scheme import WEIGHT_BITS
from qbench.testing import check_baseline
from qbench.testing.conformance import CHECKS, claimed

BASELINES = built_in()
VARIANTS = {  # options that change how a method works, not only how strongly
    "rtn": [{"mse": True}],
    "smoothquant": [{"alpha": 0.9}],
    "gptq": [
        {"act_order": True},
        {"act_order": True, "static_groups": True},
        {"fresh_groups": True, "block_size": 16},
        {"true_sequential": True, "mse": True},
    ],
    "quip": [
        {"incoherence": False},
        {"rotation": "kronecker"},
        {"rounding": "ldlq_rg", "greedy_passes": 2},
        {"rounding": "greedy"},
        {"rounding": "nearest"},
        {"rescale": False},
    ],
}
CASES = [(name, {}) for name in BASELINES]
CASES += [(name, fields) for name, variants in VARIANTS.items() for fields in variants]


def title(check):
    return check.__name__.removeprefix("check_")


def case_id(case):
    name, fields = case
    return "-".join([name, *(f"{k}={v}" for k, v in fields.items())])


@pytest.mark.parametrize("case", CASES[: len(BASELINES)], ids=case_id)
@pytest.mark.parametrize("check", CHECKS, ids=title)
def test_every_registered_baseline_keeps_the_contract(check, case):
    name, fields = case
    check(load_baseline(name, fields).instance)


QUICK = ({"act_order": True}, {"incoherence": False}, {"rounding": "nearest"})


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case_id(case), marks=[] if case[1] in QUICK else pytest.mark.slow)
        for case in CASES[len(BASELINES) :]
    ],
)
def test_options_do_not_break_the_contract(case):
    name, fields = case
    problems = [str(o) for o in check_baseline(load_baseline(name, fields).instance) if o.problem]
    assert not problems


@pytest.mark.parametrize("name", [name for name in BASELINES if name != "none"])
def test_every_method_is_defined_at_every_width(name):
    """A width that a method declines has to be argued in its own file; so far none does."""
    assert set(claimed(load_baseline(name).instance)) == set(WEIGHT_BITS) - {16}


def test_the_row_without_quantization_declines_every_width_below_16():
    assert claimed(load_baseline("none").instance) == {}


# --- the checks can fail --------------------------------------------------------------------------


class Sound(Baseline):
    """Rounds to nearest, and is the start of every violation below."""

    def quantize_weight(self, weight, scheme, stats, generator):
        return round_to_nearest(weight, scheme)


@dataclass(frozen=True)
class Decorated(Sound):
    pass


@dataclass(frozen=True)
class NeedsAnArgument(Sound):
    strength: float = dataclasses.field(kw_only=True)


@dataclass(frozen=True)
class HoldsATensor(Sound):
    table: Any = dataclasses.field(default_factory=lambda: torch.ones(2))


@dataclass(frozen=True)
class HoldsATuple(Sound):
    sizes: tuple[int, ...] = (1, 2)


class Tainted(Decorated):
    """A violation in one line: what is done to a soundly rounded weight."""

    def spoil(self, found, weight, scheme, stats, generator):
        raise NotImplementedError

    def quantize_weight(self, weight, scheme, stats, generator):
        found = super().quantize_weight(weight, scheme, stats, generator).weight
        return self.spoil(found, weight, scheme, stats, generator)


def tainted(name, spoil, **attributes):
    members = {"spoil": lambda self, *args: spoil(*args), **attributes}
    return dataclass(frozen=True)(type(name, (Tainted,), members))


HESSIAN: dict[str, Any] = {"weight_statistics": ("hessian",)}


def write_into_statistics(found, weight, scheme, stats, generator):
    stats.hessian.zero_()
    return found


def divide_by_activity(found, weight, scheme, stats, generator):
    return found / stats.absmax * stats.absmax


def forget_the_generator(found, weight, scheme, stats, generator):
    return found * (1 + torch.rand(1))


COUNTER = iter(range(10**9))


@dataclass(frozen=True)
class IgnoresGroups(Decorated):
    def quantize_weight(self, weight, scheme, stats, generator):
        rows = dataclasses.replace(scheme, group_size=-1, w_granularity="channel")
        return round_to_nearest(weight, rows)


@dataclass(frozen=True)
class ChangesTheFunction(Decorated):
    def transform(self, block, context):
        for linear in block.linears.values():
            linear.set_weight_(linear.weight * 1.1)


@dataclass(frozen=True)
class ChangesTheModelFirst(Decorated):
    def prepare(self, model, generator):
        model.get_input_embeddings().weight.data.mul_(2)


@dataclass(frozen=True)
class InverseOfAnything(Decorated):
    weight_statistics: ClassVar[tuple[str, ...]] = ("hessian",)

    def quantize_weight(self, weight, scheme, stats, generator):
        damped = stats.hessian + stats.hessian.diagonal().mean() * torch.eye(weight.shape[1])
        return round_to_nearest(weight, scheme).weight + 0 * torch.linalg.inv(damped)[0]


@dataclass(frozen=True)
class GivesUpInModels(Decorated):
    """Fine with the matrix of the checks, helpless with any other shape."""

    def quantize_weight(self, weight, scheme, stats, generator):
        if weight.shape != (24, 48):
            raise CannotQuantize("too difficult")
        return round_to_nearest(weight, scheme)


def nan_at_one_bit(found, weight, scheme, stats, generator):
    return found / (2 ** (scheme.wbits - 1) - 1) * (2 ** (scheme.wbits - 1) - 1)


def write_into_weight(found, weight, *rest):
    weight.mul_(2)
    return found


VIOLATIONS = [
    # (what is wrong, the check that has to say so, words of its sentence)
    (Sound, "it_is_a_frozen_dataclass", "decorate Sound with @dataclass"),
    (NeedsAnArgument, "it_can_be_constructed_without_arguments", "TypeError"),
    (HoldsATensor, "its_parameters_are_json", "TypeError"),
    (HoldsATuple, "its_parameters_are_json", "does not survive JSON"),
    (
        tainted("NanAtOneBit", nan_at_one_bit),
        "every_claimed_width_gives_finite_weights",
        "at 1 bits weights are not finite",
    ),
    (
        tainted("Zeros", lambda found, *rest: found * 0),
        "every_claimed_width_gives_finite_weights",
        "every weight is zero",
    ),
    (
        tainted("Transposes", lambda found, *rest: found.T),
        "every_claimed_width_gives_finite_weights",
        "the shape is (48, 24)",
    ),
    (
        tainted("Integers", lambda found, *rest: (found * 100).int()),
        "every_claimed_width_gives_finite_weights",
        "the dtype is torch.int32",
    ),
    (
        tainted("WritesIntoWeight", write_into_weight),
        "it_leaves_its_inputs_untouched",
        "writes into the weight",
    ),
    (
        tainted("WritesIntoStatistics", write_into_statistics, **HESSIAN),
        "it_leaves_its_inputs_untouched",
        "it writes into stats.hessian",
    ),
    (
        tainted("Counts", lambda found, *rest: found * (1 + next(COUNTER))),
        "the_same_seed_gives_the_same_weights",
        "two calls with equal generators differ",
    ),
    (
        tainted("GlobalRandomness", lambda found, *rest: found + 0 * torch.rand(1)),
        "the_same_seed_gives_the_same_weights",
        "draws from torch's global generator",
    ),
    (
        tainted("ForgetsTheGenerator", forget_the_generator),
        "the_same_seed_gives_the_same_weights",
        "two calls with equal generators differ",
    ),
    (
        tainted("OffGrid", lambda found, weight, *rest: found + 1e-3 * weight),
        "no_more_levels_than_the_grid_has",
        "set on_grid=False if it rounds in another basis",
    ),
    (
        tainted("DividesByActivity", divide_by_activity, weight_statistics=("absmax",)),
        "a_dead_input_channel_does_no_harm",
        "not finite with a dead input channel",
    ),
    (IgnoresGroups, "a_group_size_that_does_not_divide_is_refused", "call check_group_size()"),
    (
        tainted("Coarse", lambda found, weight, *rest: found * 1.2),
        "eight_bits_lose_less_than_ten_percent",
        "off by 20",
    ),
    (ChangesTheFunction, "transform_preserves_the_function", "set preserves_function=False"),
    (ChangesTheModelFirst, "transform_preserves_the_function", "changed the outputs"),
    (
        GivesUpInModels,
        "a_whole_model_runs_at_two_bits_and_eight_bit_activations",
        "14 layers fell back to rounding to nearest",
    ),
    (
        InverseOfAnything,
        "a_hopeless_hessian_is_declined",
        "a hessian with infinities gives NaN weights",
    ),
]


def outcome(cls, check):
    instance = cls(strength=1.0) if cls is NeedsAnArgument else cls()
    found = {o.name.replace(" ", "_"): o.problem for o in check_baseline(instance)}
    return found[check]


@pytest.mark.parametrize(
    ("cls", "check", "said"),
    VIOLATIONS,
    ids=lambda v: getattr(v, "__name__", None),
)
def test_a_planted_violation_is_caught_by_its_check(cls, check, said):
    problem = outcome(cls, check)
    assert problem is not None and said in problem


def test_every_check_but_one_is_failed_by_some_violation():
    """W16A16 never reaches a baseline, so none can break that check; the harness is tested."""
    caught = {check for _, check, _ in VIOLATIONS}
    assert {title(c) for c in CHECKS} - caught == {"sixteen_bits_are_the_identity"}


def test_the_sound_baseline_under_the_violations_passes_every_check():
    assert [str(o) for o in check_baseline(Decorated()) if o.problem] == []


def test_a_baseline_that_raises_anything_fails_its_check_instead_of_stopping_the_others():
    raising = tainted("Raises", lambda *args: 1 / 0)
    outcomes = check_baseline(raising())
    assert len(outcomes) == len(CHECKS)
    assert any(o.problem == "raised ZeroDivisionError: division by zero" for o in outcomes)
    assert str(outcomes[0]).startswith("ok")


def test_a_method_in_another_basis_may_say_so():
    rotated = tainted("Rotated", lambda found, weight, *rest: found + 1e-3 * weight, on_grid=False)
    assert outcome(rotated, "no_more_levels_than_the_grid_has") is None


def test_a_width_may_be_declined_with_a_sentence():
    declines = tainted(
        "Declines",
        nan_at_one_bit,
        supports=lambda self, scheme: "not at 1 bit" if scheme.wbits < 2 else None,
    )
    assert outcome(declines, "every_claimed_width_gives_finite_weights") is None
    assert set(claimed(declines())) == {8, 7, 6, 5, 4, 3, 2}


def test_a_grid_that_does_not_offer_a_claimed_width_is_a_problem():
    stubborn = tainted("Stubborn", lambda found, *rest: found, default_grid=lambda *_: "restricted")
    assert "has no 1.58-bit codes" in outcome(stubborn, "every_claimed_width_gives_finite_weights")
    with pytest.raises(QBenchError):
        claimed(stubborn())


def test_an_online_transform_is_judged_with_its_input_transformed():
    @dataclass(frozen=True)
    class Negates(Decorated):
        def quantize_weight(self, weight, scheme, stats, generator):
            found = round_to_nearest(-weight, scheme).weight
            return QuantizedWeight(found, input_transform=lambda x: -x)

    assert [str(o) for o in check_baseline(Negates()) if o.problem] == []
