"""What counts as the same measurement, and what becomes of one that fails."""

from __future__ import annotations

import copy
import shutil

import pytest
from cli_fixtures import DATA, LINES, edit_config, edit_weights, qbench, records
from transformers import PreTrainedModel

from qbench.errors import QBenchError
from qbench.evaluation.perplexity import PerplexityTask
from qbench.evaluation.tasks import TaskSpec
from qbench.models.checkpoints import find_checkpoint
from qbench.progress import Reporter
from qbench.record import CalibrationSpec
from qbench.registry import load_baseline
from qbench.scheme import Scheme
from qbench.study import runner
from qbench.study.runner import Cell, Settings, Workbench
from qbench.study.store import Store

DOWN = "model.layers.0.mlp.down_proj.weight"
BROKEN = '''
from dataclasses import dataclass
from pathlib import Path
from qbench import Baseline, QBenchError, round_to_nearest

@dataclass(frozen=True)
class Broken(Baseline):
    """Does what a file says."""

    def quantize_weight(self, weight, scheme, stats, generator):
        mood = Path("MOOD").read_text()
        if mood == "raise":
            raise ValueError("no idea")
        if mood == "nan":
            return weight * float("nan")
        if mood == "usage":
            raise QBenchError("rows of 64 are not for me")
        return round_to_nearest(weight, scheme)
'''


@pytest.fixture
def base(tiny, text, tmp_path):
    """Options of a run that reads everything a key holds."""
    (tmp_path / "calibration.txt").write_text("".join(reversed(LINES)))
    return {
        "checkpoint": tiny,
        "--baseline": "gptq",
        "--scheme": "W4A16",
        "--calibration": tmp_path / "calibration.txt",
        "--nsamples": 2,
        "--seqlen": 16,
        "--tasks": f"{text}@gptq-16",
        "--limit": 2,
        "--results": tmp_path / "runs",
    }


def run(base, code=0, extra=(), **changes):
    """Run with some options changed; returns what was printed."""
    options = base | {
        f"--{k.replace('_', '-')}": v for k, v in changes.items() if k != "checkpoint"
    }
    checkpoint = changes.get("checkpoint", options.pop("checkpoint"))
    options.pop("checkpoint", None)
    words = [word for pair in options.items() for word in pair]
    return qbench("run", checkpoint, *words, *extra, code=code)


def is_stored(result) -> bool:
    return result.stdout.rstrip().endswith("(stored)")


def test_the_same_again_is_stored(base):
    assert not is_stored(run(base))
    assert is_stored(run(base))


@pytest.mark.parametrize(
    "changes",
    [
        {"baseline": "rtn"},
        {"scheme": "W3A16"},
        {"scheme": "W4A8"},
        {"scheme": "W4A16g32"},
        {"set": "percdamp=0.02"},
        {"nsamples": 3},
        {"seqlen": 12},
        {"seed": 1},
        {"limit": 1},
        {"dtype": "bfloat16"},
        {"max_length": 12},
    ],
    ids=str,
)
def test_changing_an_option_measures_anew(base, changes):
    run(base)
    assert not is_stored(run(base, **changes))
    assert is_stored(run(base))
    assert is_stored(run(base, **changes))


def test_another_calibration_text_measures_anew(base, text, tmp_path):
    run(base)
    (tmp_path / "calibration.txt").write_text("".join(LINES).upper())
    assert not is_stored(run(base))


def test_moving_the_calibration_text_does_not_measure_anew(base, tmp_path):
    run(base)
    (tmp_path / "calibration.txt").rename(tmp_path / "data.txt")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (tmp_path / "data.txt").rename(folder / "calibration.txt")
    assert is_stored(run(base, calibration=folder / "calibration.txt"))
    assert str(tmp_path) not in str([r["key"] for r in records(tmp_path / "runs").values()])


def test_another_byte_of_the_measured_text_measures_anew(base, text):
    run(base)
    # beyond the two windows that are scored: the key holds the whole text
    text.write_text(text.read_text() + ".")
    assert not is_stored(run(base))


def test_few_shot_examples_and_encoding_are_part_of_the_key(base):
    base = base | {"--tasks": "winogrande", "--data": DATA}
    run(base)
    assert is_stored(run(base))
    assert not is_stored(run(base, num_fewshot=1))
    assert not is_stored(run(base, encoding="joint"))
    assert not is_stored(run(base, encoding="lmeval03"))


@pytest.mark.parametrize("baseline", ["gptq", "none"])
def test_changing_one_weight_measures_anew(base, copy_of, baseline):
    scheme = "W4A16" if baseline == "gptq" else "W16A16"
    run(base, baseline=baseline, scheme=scheme)

    def change(tensors):
        tensors[DOWN][0, 0] += 1e-3

    other = edit_weights(copy_of("tiny-2"), change)
    assert not is_stored(run(base, baseline=baseline, scheme=scheme, checkpoint=other))


def test_changing_the_config_measures_anew(base, copy_of):
    run(base)
    other = edit_config(copy_of("other"), rms_norm_eps=1e-2)
    assert not is_stored(run(base, checkpoint=other))


def test_renaming_and_moving_the_checkpoint_measures_nothing(base, copy_of, monkeypatch):
    run(base)

    def fail(self, *args):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(runner.Checkpoint, "load_model", fail)
    assert is_stored(run(base, checkpoint=copy_of("renamed")))


def test_two_checkpoints_of_one_name_do_not_mix(base, tiny, tmp_path):
    (tmp_path / "b").mkdir()
    twin = tmp_path / "b" / "tiny"
    shutil.copytree(tiny, twin)
    edit_weights(twin, lambda tensors: tensors[DOWN].mul_(3))
    first, second = run(base), run(base, checkpoint=twin)
    assert not is_stored(second)
    assert first.stdout.splitlines()[1] != second.stdout.splitlines()[1]
    assert is_stored(run(base)) and is_stored(run(base, checkpoint=twin))
    assert run(base).stdout.split("  (")[0] == first.stdout.splitlines()[1].split("  (")[0]
    assert len(records(tmp_path / "runs")) == 4


def key_of(tiny, tmp_path, name="rtn", scheme="W4A16", fields=None, **settings):
    bench = Workbench(find_checkpoint(str(tiny)), Settings(tasks=(), **settings), Store(tmp_path))
    return bench.key(Cell.of(load_baseline(name, fields or {}), Scheme.parse(scheme)))


def test_every_method_at_sixteen_bits_shares_one_key(tiny, tmp_path):
    keys = [
        key_of(tiny, tmp_path, "none", "W16A16"),
        key_of(tiny, tmp_path, "gptq", "W16A16", {"percdamp": 0.5}),
        key_of(tiny, tmp_path, "quip", "W16A16", seed=7),
    ]
    assert keys[0] == keys[1] == keys[2]


def test_a_seed_is_in_the_key_of_methods_that_draw_something(tiny, tmp_path):
    assert key_of(tiny, tmp_path, seed=1) == key_of(tiny, tmp_path, seed=2)
    assert load_baseline("quip").instance.is_random
    assert not load_baseline("gptq").instance.is_random


def test_the_dtype_of_the_model_is_in_the_key(tiny, tmp_path):
    half = key_of(tiny, tmp_path, dtype="float16")
    assert half != key_of(tiny, tmp_path) and half.dtype == "float16"


@pytest.fixture
def broken(base, tmp_path):
    """A method whose mood the test sets."""
    (tmp_path / "broken.py").write_text(BROKEN.replace("MOOD", str(tmp_path / "mood")))
    base = base | {"--baseline": f"{tmp_path / 'broken.py'}:Broken"}
    return base, lambda mood: (tmp_path / "mood").write_text(mood)


@pytest.mark.parametrize(
    ("mood", "error"),
    [
        ("raise", "ValueError: no idea"),
        ("nan", "Broken gave non-finite weights in model.layers.0."),
    ],
)
def test_a_method_that_breaks_is_a_record_with_its_error(broken, tmp_path, mood, error):
    base, set_mood = broken
    set_mood(mood)
    result = run(base, code=1)
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith(f"quantization failed: {error}")
    (record,) = records(tmp_path / "runs").values()
    assert record["status"] == "failed" and record["error"].startswith(error)


def test_a_failure_is_repeated_on_request_only(broken, tmp_path):
    base, set_mood = broken
    set_mood("raise")
    run(base, code=1)
    set_mood("well")
    again = run(base, code=1)
    assert again.stderr.splitlines()[-1] == (
        "error: this failed before: ValueError: no idea; repeat it with --retry-failed"
    )
    mended = run(base, extra=["--retry-failed"])
    assert "text.txt [gptq-16]  perplexity" in mended.stdout
    assert {r["status"] for r in records(tmp_path / "runs").values()} == {"ok"}
    assert is_stored(run(base))


def test_a_failure_that_fails_again_stays_a_failure(broken, tmp_path):
    base, set_mood = broken
    set_mood("raise")
    run(base, code=1)
    set_mood("nan")
    run(base, code=1, extra=["--retry-failed"])
    (record,) = records(tmp_path / "runs").values()
    assert record["error"].startswith("Broken gave non-finite weights")


def test_a_usage_error_leaves_no_record(broken, tmp_path):
    base, set_mood = broken
    set_mood("usage")
    result = run(base, code=2)
    assert result.stderr.splitlines()[-1] == "error: rows of 64 are not for me"
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def failing_evaluation():
    """Every perplexity breaks until the returned function is called."""
    patch = pytest.MonkeyPatch()

    def fail(self, *args, **kwargs):
        raise RuntimeError("no kernel")

    patch.setattr(PerplexityTask, "run", fail)
    yield patch.undo
    patch.undo()


def test_a_measurement_that_breaks_is_a_record_and_the_next_one_still_runs(
    base, text, tmp_path, failing_evaluation
):
    both = base | {"--tasks": f"{text}@gptq-16,piqa", "--data": DATA}
    result = run(both, code=1)
    assert "text.txt [gptq-16] failed: RuntimeError: no kernel" in result.stderr
    assert "piqa [lm-eval]  acc" in result.stdout
    status = {
        r["key"]["task"]: r["status"] for r in records(tmp_path / "runs").values() if "n_items" in r
    }
    assert status == {"text.txt": "failed", "piqa": "ok"}

    failing_evaluation()
    again = run(both, code=1)  # a stored failure is a failure still
    assert "no kernel  (stored)" in again.stderr and "--retry-failed" in again.stderr
    mended = run(both, extra=["--retry-failed"])
    assert "text.txt [gptq-16]  perplexity" in mended.stdout
    assert mended.stdout.count("(stored)") == 1  # piqa was not repeated
    assert is_stored(run(base))


def test_a_model_that_cannot_be_loaded_is_tried_once(copy_of, tmp_path, monkeypatch):
    def change(tensors):
        tensors[DOWN][0, 0] = float("nan")

    checkpoint = find_checkpoint(str(edit_weights(copy_of("sick"), change)))
    bench = Workbench(checkpoint, Settings(tasks=()), Store(tmp_path))
    loads = []
    load = runner.Checkpoint.load_model
    monkeypatch.setattr(
        runner.Checkpoint, "load_model", lambda self, *a: (loads.append(1), load(self, *a))[1]
    )
    for _ in range(2):
        with pytest.raises(QBenchError, match="NaN or infinite"):
            _ = bench.supply.model
    assert len(loads) == 1


def test_a_released_bench_holds_no_model(tiny, text, tmp_path):
    settings = Settings(tasks=(TaskSpec.parse(f"{text}@gptq-16"),))
    bench = Workbench(find_checkpoint(str(tiny)), settings, Store(tmp_path))
    first = bench.supply.model
    bench.release()
    assert "model" not in vars(bench.supply)
    assert bench.supply.model is not first


def test_the_pristine_model_survives_every_cell(tiny, text, tmp_path):
    settings = Settings(
        tasks=(TaskSpec.parse(f"{text}@gptq-16"),),
        calibration=CalibrationSpec(source=str(text), nsamples=2, seqlen=16),
    )
    bench = Workbench(find_checkpoint(str(tiny)), settings, Store(tmp_path))
    before = {name: value.clone() for name, value in bench.supply.model.state_dict().items()}
    for name, scheme in (("rtn", "W2A8"), ("none", "W16A4"), ("quip", "W2A16")):
        list(bench.run(Cell.of(load_baseline(name), Scheme.parse(scheme)), Reporter(quiet=True)))
        after = bench.supply.model.state_dict()
        assert all((after[key] == value).all() for key, value in before.items())
        modules = bench.supply.model.modules()
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in modules)


@pytest.mark.parametrize(
    ("name", "scheme"), [("gptq", "W3A16g32"), ("smoothquant", "W8A8"), ("quip", "W2A16")]
)
def test_one_cell_alone_copies_no_model_and_gives_the_same(
    name, scheme, tiny, text, tmp_path, monkeypatch
):
    """Its tasks come after it, among them one that compares with full precision."""
    settings = Settings(
        tasks=tuple(TaskSpec.parse(f"{text}@{p}") for p in ("gptq-16", "agreement-16")),
        calibration=CalibrationSpec(source=str(text), nsamples=2, seqlen=16),
    )
    cell = Cell.of(load_baseline(name), Scheme.parse(scheme))
    found, copies = [], []
    deepcopy = copy.deepcopy

    def counting(one, memo=None):
        if isinstance(one, PreTrainedModel) and memo is None:  # not the tail of a reference
            copies.append(one)
        return deepcopy(one, memo)

    monkeypatch.setattr(copy, "deepcopy", counting)
    for alone in (False, True):
        store = Store(tmp_path / str(alone))
        bench = Workbench(find_checkpoint(str(tiny)), settings, store, one_cell=alone)
        quantized, *measured = bench.run(cell, Reporter(quiet=True))
        layers = [layer.model_copy(update={"seconds": None}) for layer in quantized.layers]
        found.append((layers, quantized.notes, [task.metrics for task in measured]))
        assert len(measured) == 2 and len(copies) == 1
    assert found[0] == found[1]
    again, *_ = bench.run(  # the model it took is gone: another is loaded
        Cell.of(load_baseline("rtn"), Scheme.parse("W4A16")), Reporter(quiet=True)
    )
    assert again.status == "ok" and len(copies) == 1
