"""Baselines by name or by file, their fields, and what identifies them in a key."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint

import pytest

from qbench import Baseline, QBenchError
from qbench.baseline import resolve_scheme, why_not, with_fields
from qbench.registry import baseline_entry_points, load_baseline
from qbench.scheme import Scheme
from qbench_baselines.rtn import RTN

PLUGIN = """
from dataclasses import dataclass
from qbench import Baseline, round_to_nearest

@dataclass(frozen=True)
class Mine(Baseline):
    version = 3
    strength: float = {strength}

    def quantize_weight(self, weight, scheme, stats, generator):
        return round_to_nearest(weight, scheme)

LIMIT = 3

class Helper:
    pass

class Unfinished(Baseline):
    pass
"""


@pytest.fixture
def plugin(tmp_path):
    path = tmp_path / "my_method.py"
    path.write_text(PLUGIN.format(strength=0.5))
    yield path
    for name in [n for n in sys.modules if n.startswith("_qbench_plugin_")]:
        del sys.modules[name]


def test_the_built_in_methods_come_through_the_entry_points_anyone_can_use():
    points = baseline_entry_points()
    assert {"none", "rtn", "absmax", "smoothquant", "gptq", "quip"} <= set(points)
    assert all(point.group == "qbench.baselines" for point in points.values())


def test_an_installed_baseline_is_identified_by_name_version_and_all_its_fields():
    loaded = load_baseline("smoothquant", {"alpha": "0.85"})
    assert loaded.instance.alpha == 0.85
    assert loaded.spec.name == "smoothquant"
    assert loaded.spec.parameters == {"alpha": 0.85}
    assert loaded.spec.version == loaded.instance.version
    assert loaded.spec.source is None


def test_defaults_stand_in_the_spec_so_that_a_changed_default_changes_the_key():
    spec = load_baseline("gptq").spec
    assert spec.parameters["percdamp"] == 0.01
    assert spec.parameters["block_size"] == 128
    assert spec.digest() == load_baseline("gptq", {"block_size": 128}).spec.digest()
    assert spec.digest() != load_baseline("gptq", {"percdamp": 0.1}).spec.digest()


def test_a_class_in_a_file_is_a_baseline_identified_by_the_files_hash(plugin):
    loaded = load_baseline(f"{plugin}:Mine", {"strength": "2"})
    assert type(loaded.instance).__name__ == "Mine"
    assert loaded.instance.strength == 2.0
    assert loaded.spec.name == "Mine"
    assert loaded.spec.version == 3
    assert loaded.spec.source == hashlib.sha256(plugin.read_bytes()).hexdigest()


def test_an_edited_file_is_another_baseline_and_runs_its_new_code(plugin):
    before = load_baseline(f"{plugin}:Mine")
    plugin.write_text(PLUGIN.format(strength=0.25))
    after = load_baseline(f"{plugin}:Mine")
    assert (before.instance.strength, after.instance.strength) == (0.5, 0.25)
    assert before.spec.source != after.spec.source
    assert before.spec.digest() != after.spec.digest()


def test_the_place_of_a_file_is_no_part_of_its_identity(plugin, tmp_path):
    moved = tmp_path / "elsewhere.py"
    moved.write_bytes(plugin.read_bytes())
    assert load_baseline(f"{plugin}:Mine").spec == load_baseline(f"{moved}:Mine").spec


def message_of(name, fields=None):
    with pytest.raises(QBenchError) as error:
        load_baseline(name, fields)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_unknown_name_is_refused_with_the_nearest():
    assert message_of("gpqt") == "unknown baseline 'gpqt'; did you mean 'gptq'?"
    assert "known: absmax, auto-gptq, gptq, none" in message_of("zzzzzz")


def test_a_file_that_is_not_there_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message_of("gone.py:Mine") == f"no such baseline file: gone.py (looked in {tmp_path})"


def test_a_class_that_is_not_there_is_refused_with_the_nearest(plugin):
    assert "did you mean 'Mine'" in message_of(f"{plugin}:Mime")
    assert "known: Helper, Mine, Unfinished" in message_of(f"{plugin}:")


def test_a_class_that_is_no_baseline_is_refused(plugin):
    assert "is not a qbench.Baseline subclass" in message_of(f"{plugin}:Helper")
    assert "is not a qbench.Baseline subclass" in message_of(f"{plugin}:dataclass")
    assert "is not a qbench.Baseline subclass" in message_of(f"{plugin}:LIMIT")
    assert "does not define quantize_weight" in message_of(f"{plugin}:Unfinished")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "import nowhere_to_be_found",
            "ModuleNotFoundError: No module named 'nowhere_to_be_found'",
        ),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def broken(:", "SyntaxError: "),
    ],
)
def test_a_file_that_cannot_be_imported_says_why_and_leaves_nothing_behind(plugin, code, said):
    plugin.write_text(code)
    assert said in message_of(f"{plugin}:Mine")
    assert not [name for name in sys.modules if name.startswith("_qbench_plugin_")]


def test_an_installed_package_that_is_broken_says_so_without_a_traceback(monkeypatch):
    point = EntryPoint("broken", "nowhere_to_be_found:Method", "qbench.baselines")
    monkeypatch.setattr("qbench.registry.baseline_entry_points", lambda: {"broken": point})
    message = message_of("broken")
    assert "cannot import baseline 'broken'" in message and "nowhere_to_be_found" in message


# --- fields --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fields(Baseline):
    number: int = 3
    share: float = 0.5
    flag: bool = False
    word: str = "a"
    choice: str | None = None

    def quantize_weight(self, weight, scheme, stats, generator):
        return weight


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("number", "7", 7),
        ("number", 7.0, 7),
        ("share", "1e-3", 0.001),
        ("share", 2, 2.0),
        ("flag", "true", True),
        ("flag", "Yes", True),
        ("flag", "0", False),
        ("flag", False, False),
        ("word", "ldlq", "ldlq"),
        ("choice", "x", "x"),
    ],
)
def test_text_from_the_command_line_takes_the_type_of_the_default(name, given, value):
    found = getattr(with_fields(Fields, {name: given}), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("number", "7.5", "Fields.number takes a int, got '7.5'; for example number=3"),
        ("number", "many", "Fields.number takes a int, got 'many'"),
        ("number", "inf", "Fields.number takes a int, got 'inf'"),
        ("number", None, "Fields.number takes a int, got None"),
        ("share", "half", "Fields.share takes a float, got 'half'"),
        ("share", "nan", "Fields.share takes a float, got 'nan'"),
        ("flag", "maybe", "Fields.flag takes a bool, got 'maybe'; for example flag=False"),
        ("nubmer", "1", "unknown field of baseline Fields 'nubmer'; did you mean 'number'"),
    ],
)
def test_values_that_do_not_fit_a_field_are_refused(name, given, said):
    with pytest.raises(QBenchError) as error:
        with_fields(Fields, {name: given})
    assert str(error.value).startswith(said)


def test_a_baseline_without_fields_says_that_it_has_none():
    with pytest.raises(QBenchError, match="it has none"):
        load_baseline("absmax", {"alpha": 1})


def test_a_field_without_a_default_is_asked_for(tmp_path):
    path = tmp_path / "needy.py"
    path.write_text(PLUGIN.format(strength=0.5).replace("strength: float = 0.5", "strength: float"))
    assert "strength" in message_of(f"{path}:Mine")


# --- schemes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("baseline", "text", "resolved"),
    [
        ("absmax", "W8A8", "W8A8:w=tensor,a=tensor,grid=restricted,agrid=restricted"),
        ("absmax", "W1A8", "W1A8:w=tensor,a=tensor,grid=bitnet,agrid=restricted"),
        ("absmax", "W1.58A16", "W1.58A16:w=tensor,grid=ternary"),
        ("rtn", "W4A16", "W4A16:w=channel,grid=asym"),
        ("rtn", "W4A16g32", "W4A16g32:grid=asym"),
        ("rtn", "W4A1", "W4A1:w=channel,a=token,grid=asym,agrid=bitnet"),
        ("rtn", "W16A16KV4", "W16A16KV4:agrid=restricted"),
        ("rtn", "W16A8:grid=rms,static", "W16A8:a=tensor,static,agrid=restricted"),
        ("quip", "W2A16", "W2A16:w=tensor,grid=rms"),
        ("none", "W16A16", "W16A16"),
        ("rtn", "W4A16;x=W2A16", "W4A16:w=channel,grid=asym;x=W2A16:w=channel,grid=asym"),
    ],
)
def test_auto_is_resolved_by_the_baseline_and_resolving_again_changes_nothing(
    baseline, text, resolved
):
    method = load_baseline(baseline).instance
    found = resolve_scheme(Scheme.parse(text), method)
    assert str(found) == resolved
    assert resolve_scheme(found, method) == found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("W4A16:grid=asim", "unknown grid 'asim'; did you mean 'asym'"),
        ("W1A16:grid=restricted", "grid 'restricted' has no 1-bit codes"),
        ("W4A1:agrid=restricted", "grid 'restricted' has no 1-bit codes"),
        ("W4A8KV1:agrid=gptq_sym", "grid 'gptq_sym' has no 1-bit codes"),
        ("W4A16;x=W1A16:grid=full", "grid 'full' has no 1-bit codes"),
    ],
)
def test_grids_that_do_not_fit_are_refused_when_the_scheme_is_resolved(text, said):
    with pytest.raises(QBenchError) as error:
        resolve_scheme(Scheme.parse(text), load_baseline("rtn").instance)
    assert str(error.value).startswith(said)


def test_what_a_method_cannot_do_it_says_in_one_sentence_also_for_an_override():
    quip, none = load_baseline("quip").instance, load_baseline("none").instance
    assert why_not(quip, resolve_scheme(Scheme.parse("W4A16"), quip)) is None
    for text in ("W4A16g32", "W4A16;x=W4A16g32"):
        assert "groups" in why_not(quip, resolve_scheme(Scheme.parse(text), quip))
    assert why_not(none, Scheme.parse("W4A16")) == "it leaves weights alone; use W16"
    assert why_not(none, Scheme.parse("W16A8")) is None


def test_kv_bits_leave_the_grid_of_the_other_activations_alone():
    both = resolve_scheme(Scheme.parse("W4A8KV1"), RTN())
    assert both.agrid == resolve_scheme(Scheme.parse("W4A8"), RTN()).agrid == "restricted"


@pytest.mark.parametrize("agrid", ["rms", "sign", "ternary"])
def test_static_scales_need_a_grid_of_smallest_and_largest_values(agrid):
    bits = {"sign": 1, "ternary": 2, "rms": 4}[agrid]
    with pytest.raises(QBenchError, match="static|has no"):
        resolve_scheme(Scheme.parse(f"W8A{bits}:static,agrid={agrid}"), RTN())
