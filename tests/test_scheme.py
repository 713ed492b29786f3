"""Schemes: the text form, what is refused, what a scheme means for one linear."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qbench.errors import QBenchError
from qbench.scheme import ACTIVATION_BITS, WEIGHT_BITS, Scheme

GRIDS = st.sampled_from(["auto", "restricted", "asym", "rms", "bitnet"])
PATTERNS = st.text("abcdefgh_.*?[]0123456789", min_size=1, max_size=12)


@st.composite
def plain_schemes(draw, inner=False):
    """Any scheme that may be constructed, every field drawn."""
    abits = draw(st.sampled_from(ACTIVATION_BITS))
    static = draw(st.booleans())
    group_size = draw(st.sampled_from([-1, 1, 7, 128]))
    granularities = ["auto", "group"] if group_size > 0 else ["auto", "tensor", "channel"]
    return Scheme(
        wbits=draw(st.sampled_from(WEIGHT_BITS)),
        abits=abits,
        kvbits=16 if inner else draw(st.sampled_from(ACTIVATION_BITS)),
        group_size=group_size,
        w_granularity=draw(st.sampled_from(granularities)),
        a_granularity=draw(st.sampled_from(["auto", "tensor"] + ([] if static else ["token"]))),
        static=static,
        grid=draw(GRIDS),
        agrid=draw(GRIDS),
        bmm=not inner and abits < 16 and draw(st.booleans()),
    )


@st.composite
def schemes(draw):
    overrides = draw(st.lists(st.tuples(PATTERNS, plain_schemes(inner=True)), max_size=3))
    return dataclasses.replace(draw(plain_schemes()), overrides=tuple(overrides))


@settings(deadline=None)
@given(schemes())
def test_every_scheme_reads_back_as_itself_from_its_text(scheme):
    assert Scheme.parse(str(scheme)) == scheme


@settings(deadline=None)
@given(schemes())
def test_the_normal_form_is_stable_and_quantizes_the_same(scheme):
    normal = scheme.normalized()
    assert normal.normalized() == normal
    assert Scheme.parse(str(normal)) == normal
    for field in ("wbits", "abits", "kvbits", "bmm"):
        assert getattr(normal, field) == getattr(scheme, field)
    for question in ("is_identity", "quantizes_weights", "needs_static_scales"):
        assert getattr(normal, question) == getattr(scheme, question)


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("W16A16", {}),
        ("W4A16", {"wbits": 4}),
        ("W4A16g128", {"wbits": 4, "group_size": 128, "w_granularity": "group"}),
        (
            "W8A8:w=tensor,a=tensor,static,grid=restricted",
            {
                "wbits": 8,
                "abits": 8,
                "w_granularity": "tensor",
                "a_granularity": "tensor",
                "static": True,
                "grid": "restricted",
            },
        ),
        ("W4A8KV4", {"wbits": 4, "abits": 8, "kvbits": 4}),
        ("W1.58A8", {"wbits": 1.58, "abits": 8}),
        ("W8A8:bmm", {"wbits": 8, "abits": 8, "bmm": True}),
        (
            "W4A16;*.down_proj=W8A16",
            {"wbits": 4, "overrides": (("*.down_proj", Scheme(wbits=8)),)},
        ),
        (
            "W2A16g64:grid=asym,agrid=bitnet;a=W3A16:w=channel;b.*=W16A16",
            {
                "wbits": 2,
                "group_size": 64,
                "grid": "asym",
                "agrid": "bitnet",
                "overrides": (
                    ("a", Scheme(wbits=3, w_granularity="channel")),
                    ("b.*", Scheme()),
                ),
            },
        ),
    ],
)
def test_the_text_forms_of_the_documentation_mean_what_they_say(text, fields):
    scheme = Scheme.parse(text)
    assert scheme == Scheme(**fields)
    assert str(scheme) == text


@pytest.mark.parametrize(
    ("text", "same_as"),
    [
        (" W4A16 ", "W4A16"),
        ("W4.0A16", "W4A16"),
        ("W4A16g-1", "W4A16"),
        ("W4A16KV16", "W4A16"),
        ("W4A16g128:w=group", "W4A16g128"),
        ("W4A16:grid=asym, w=channel", "W4A16:w=channel,grid=asym"),
        ("W4A16; *.down_proj =W8A16", "W4A16;*.down_proj=W8A16"),
        ("W4A16:", "W4A16"),
    ],
)
def test_other_spellings_of_a_scheme_are_read(text, same_as):
    assert str(Scheme.parse(text)) == same_as


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read scheme ''; write it like W4A16"),
        ("4A16", "cannot read scheme '4A16'"),
        ("w4a16", "cannot read scheme 'w4a16'"),
        ("W4A16G128", "cannot read scheme"),
        ("W4A16 extra", "cannot read scheme"),
        ("W9A16", "weight bits 9 is not offered; choose one of 16, 8, 7, 6, 5, 4, 3, 2, 1.58, 1"),
        ("W0A16", "weight bits 0 is not offered"),
        ("W1.5A16", "weight bits 1.5 is not offered"),
        ("W4A9", "activation bits 9 is not offered"),
        ("W4A16KV12", "KV-cache bits 12 is not offered"),
        ("W4A16g0", "group size 0 is impossible; use -1 or at least 1"),
        ("W4A16g-5", "group size -5 is impossible"),
        ("W4A16g64:w=tensor", "group size 64 contradicts w=tensor"),
        ("W4A16:w=group", "w=group needs a group size, as in W4A16g128"),
        ("W4A16:w=row", "weight granularity 'row' is not offered; choose one of auto, tensor"),
        ("W4A4:a=channel", "activation granularity 'channel' is not offered"),
        ("W4A4:a=token,static", "static activation scales are per tensor"),
        ("W4A16:bmm", "bmm quantizes at the activation width; 16 bits leave nothing to do"),
        ("W4A16:fast", "unknown option 'fast' in scheme 'W4A16:fast'; known: w=, a=, grid="),
        ("W4A16:static=yes", "unknown option 'static=yes'"),
        ("W4A16:w=", "unknown option 'w='"),
        ("W4A16:w", "unknown option 'w'"),
        ("W4A16;W8A16", "override 'W8A16' in scheme 'W4A16;W8A16' is not pattern=scheme"),
        ("W4A16;=W8A16", "override '=W8A16'"),
        ("W4A16;", "override ''"),
        ("W4A16;x=W9A16", "weight bits 9 is not offered"),
        ("W4A16;x=W8A8KV4", "KV bits and bmm belong to the whole model"),
        ("W4A16;x=W8A8:bmm", "KV bits and bmm belong to the whole model"),
    ],
)
def test_what_cannot_be_is_refused_naming_the_value(text, message):
    with pytest.raises(QBenchError) as error:
        Scheme.parse(text)
    assert message in str(error.value)
    assert error.value.exit_code == 2


def test_overrides_do_not_nest():
    with pytest.raises(QBenchError, match="an override cannot contain overrides"):
        Scheme(overrides=(("a", Scheme(overrides=(("b", Scheme()),))),))


@pytest.mark.parametrize("pattern", ["", " a", "a;b", "a=b"])
def test_a_pattern_that_the_text_form_could_not_hold_is_refused(pattern):
    with pytest.raises(QBenchError, match="cannot be written down"):
        Scheme(overrides=((pattern, Scheme()),))


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("W16A8g64:w=group,grid=asym,agrid=asym", "W16A8:agrid=asym"),
        ("W4A16:a=tensor,static,agrid=asym", "W4A16"),
        ("W4A16KV4:a=token,agrid=asym", "W4A16KV4:agrid=asym"),
        ("W16A16:grid=rms,agrid=asym;x=W16A16:w=tensor", "W16A16;x=W16A16"),
        ("W4A8g32:static,grid=asym", "W4A8g32:static,grid=asym"),
    ],
)
def test_fields_without_an_effect_leave_the_normal_form(text, normal):
    assert str(Scheme.parse(text).normalized()) == normal


def test_the_first_override_that_matches_gives_the_scheme_of_a_linear():
    scheme = Scheme.parse("W4A8KV4;*.down_proj=W8A16;model.layers.0.*=W16A16;*.q_proj=W2A8")
    assert str(scheme.for_linear("model.layers.3.mlp.down_proj")) == "W8A16"
    assert str(scheme.for_linear("model.layers.0.mlp.down_proj")) == "W8A16"
    assert str(scheme.for_linear("model.layers.0.self_attn.q_proj")) == "W16A16"
    assert str(scheme.for_linear("model.layers.1.self_attn.q_proj")) == "W2A8"
    assert str(scheme.for_linear("model.layers.1.self_attn.k_proj")) == "W4A8KV4"
    assert str(scheme.for_linear("model.layers.1.self_attn.Q_PROJ")) == "W4A8KV4"


@pytest.mark.parametrize(
    ("text", "depends"),
    [
        ("W4A16:a=tensor", False),
        ("W8A8:a=tensor", True),
        ("W8A8:a=token", False),
        ("W8A8:a=tensor,static", False),
        ("W8A8:static,bmm", True),  # what bmm rounds is scaled over the whole tensor
        ("W8A8:a=token,bmm", False),
        ("W4A16KV4", False),
        ("W4A16;x=W4A8:a=tensor", True),
        ("W4A8:a=token;x=W4A8:a=tensor,static", False),
    ],
)
def test_only_dynamic_scales_over_the_whole_tensor_depend_on_the_batch(text, depends):
    assert Scheme.parse(text).depends_on_batch is depends


@pytest.mark.parametrize(
    ("text", "weights", "activations", "static"),
    [
        ("W16A16", False, False, False),
        ("W4A16", True, False, False),
        ("W16A8", False, True, False),
        ("W16A16KV8", False, True, False),
        ("W16A8:static", False, True, True),
        ("W16A16:static", False, False, False),
        ("W16A16;x=W4A16", True, False, False),
        ("W16A16;x=W16A8:static", False, True, True),
        ("W16A16;x=W16A16", False, False, False),
    ],
)
def test_a_scheme_knows_what_it_quantizes(text, weights, activations, static):
    scheme = Scheme.parse(text)
    assert scheme.quantizes_weights is weights
    assert scheme.quantizes_activations is activations
    assert scheme.needs_static_scales is static
    assert scheme.is_identity is not (weights or activations)


def test_the_label_is_what_papers_print():
    assert Scheme.parse("W4A16g128:grid=asym;x=W8A16").label == "W4A16g128"
    assert Scheme.parse("W1.58A8").label == "W1.58A8"
    assert Scheme(wbits=4.0, abits=8, kvbits=4).label == "W4A8KV4"
