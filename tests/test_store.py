"""The store: found again by the full key, complete or absent, clear about what it cannot read."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from study_fixtures import quantization, task

import qbench.study.store as store_module
from qbench.errors import QBenchError, RunFailed
from qbench.record import RECORD_FORMAT
from qbench.study.store import Store, migrate, slug


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs")


def test_what_was_saved_is_found_by_its_key(store: Store) -> None:
    record = quantization("opt-125m", "gptq", "W4A16g128:grid=asym", parameters_of={"percdamp": 1})
    measured = task(record, "piqa", {"acc": 0.5})
    assert store.find_quantization("opt-125m", record.key) is None
    store.save_quantization(record)
    assert store.find_task("opt-125m", record.key, measured.key) is None
    store.save_task("opt-125m", record.key, measured)
    assert store.find_quantization("opt-125m", record.key) == record
    assert store.find_task("opt-125m", record.key, measured.key) == measured


def test_the_layout_is_checkpoint_scheme_baseline_hash(store: Store) -> None:
    record = quantization("org/opt-125m", "rtn", "W8A8:w=tensor,static;*.fc1=W4A16")
    path = store.save_quantization(record)
    expected = f"org_opt-125m/W8A8_w-tensor_static_.fc1-W4A16/rtn-{record.key.digest()[:8]}"
    assert path.relative_to(store.root).as_posix() == f"{expected}/quantization.json"


def test_nothing_is_created_before_something_is_saved(store: Store) -> None:
    store.check_writable()
    assert list(store.runs()) == []
    assert not store.root.exists()


def test_a_record_is_found_under_another_display_name(store: Store) -> None:
    record = quantization("opt-125m", "rtn", "W4A16:grid=asym")
    store.save_quantization(record)
    assert store.find_quantization("../models/opt-125m", record.key) == record
    renamed = record.model_copy(update={"checkpoint": "../models/opt-125m"})
    store.save_quantization(renamed)
    assert len(list(store.runs())) == 1


def test_a_shared_prefix_never_returns_another_models_numbers(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (quantization("a", "rtn", "W4A16", weights=name) for name in ("one", "two"))
    digests = {first.key.digest(): "f" * 8 + "1" * 56, second.key.digest(): "f" * 8 + "2" * 56}
    real = type(first.key).digest
    monkeypatch.setattr(type(first.key), "digest", lambda key: digests.get(real(key), real(key)))
    store.save_quantization(first)
    assert store.find_quantization("a", second.key) is None
    path = store.save_quantization(second)
    assert path.parent.name == "rtn-" + "f" * 8 + "2" * 8
    assert store.find_quantization("a", first.key) == first
    assert store.find_quantization("a", second.key) == second


def test_a_shared_prefix_of_tasks_is_kept_apart_too(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantization()
    store.save_quantization(model)
    one, two = (task(model, "piqa", {"acc": limit / 10}, limit=limit) for limit in (1, 2))
    real = type(one.key).digest
    monkeypatch.setattr(type(one.key), "digest", lambda key: "a" * 8 + real(key)[8:])
    for record in (one, two):
        store.save_task("opt-6.7b", model.key, record, {"n": [record.key.limit]})
    assert [store.find_task("opt-6.7b", model.key, t.key) for t in (one, two)] == [one, two]
    run = next(store.runs())
    assert [store.items(run, t)["n"].tolist() for t in (one, two)] == [[1], [2]]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_number_that_is_not_finite_comes_back_and_the_file_is_strict_json(
    store: Store, value: float
) -> None:
    model = quantization("a", "rtn", "W4A16")
    model.layers[0].relative_error = value
    model.layers[0].extra = {"nested": [value]}
    path = store.save_quantization(model)
    measured = task(model, "wikitext2", {"perplexity": value}, protocol="gptq-2048")
    saved = store.save_task("a", model.key, measured)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    for file in (path, saved):
        json.loads(file.read_text(), parse_constant=refuse)
    run = next(store.runs())
    layer = run.quantization.layers[0]
    for found in (
        layer.relative_error,
        layer.extra["nested"][0],
        run.tasks[0].metrics["perplexity"].as_float(),
    ):
        assert found == value or (math.isnan(found) and math.isnan(value))


def test_items_come_back_as_a_table_with_lists_and_nan(store: Store) -> None:
    model = quantization()
    store.save_quantization(model)
    measured = task(model, "piqa", {"acc": 0.5})
    items = {"gold": [0, 1], "loglikelihood": [[-1.5, -2.0], [math.nan, -math.inf]]}
    store.save_task("opt-6.7b", model.key, measured, items)
    run = next(store.runs())
    table = store.items(run, run.tasks[0])
    assert table["gold"].tolist() == [0, 1]
    assert math.isnan(table["loglikelihood"][1][0]) and table["loglikelihood"][1][1] == -math.inf


def test_items_are_on_disk_before_the_record_that_promises_them(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantization()
    store.save_quantization(model)
    replaced: list[str] = []
    real = os.replace

    def note(source: Path, target: Path) -> None:
        replaced.append("".join(Path(target).suffixes[-2:]))
        real(source, target)

    monkeypatch.setattr(store_module.os, "replace", note)
    store.save_task("opt-6.7b", model.key, task(model, "piqa", {"acc": 1}), {"gold": [0]})
    assert replaced == [".items.parquet", ".json"]


def test_columns_of_unequal_length_are_refused_and_leave_nothing(store: Store) -> None:
    model = quantization()
    store.save_quantization(model)
    measured = task(model, "piqa", {"acc": 1})
    with pytest.raises(RunFailed, match="'gold': 1, 'tokens': 2"):
        store.save_task("opt-6.7b", model.key, measured, {"gold": [0], "tokens": [1, 2]})
    assert store.find_task("opt-6.7b", model.key, measured.key) is None


def test_a_measurement_without_items_says_so(store: Store) -> None:
    model = quantization()
    store.save_quantization(model)
    store.save_task("opt-6.7b", model.key, task(model, "piqa", {"acc": 1}))
    run = next(store.runs())
    with pytest.raises(QBenchError, match="no items are stored for task 'piqa'"):
        store.items(run, run.tasks[0])


def test_a_task_needs_its_quantization_first(store: Store) -> None:
    model = quantization()
    with pytest.raises(QBenchError, match="save its quantization record first"):
        store.save_task("opt-6.7b", model.key, task(model, "piqa", {"acc": 1}))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_or_closed_disk_leaves_the_old_record_whole(
    store: Store, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    record = quantization("a", "rtn", "W4A16")
    path = store.save_quantization(record)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(store_module.os, "fsync", full)
    with pytest.raises(RunFailed, match=os.strerror(code)) as caught:
        store.save_quantization(record.model_copy(update={"notes": ["new"]}))
    assert str(path) in str(caught.value) and "--results" in str(caught.value)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["quantization.json"]


def test_a_file_where_the_folder_should_be_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("in the way")
    store = Store(tmp_path / "runs")
    with pytest.raises(QBenchError, match="--results"):
        store.check_writable()
    with pytest.raises(RunFailed, match="--results"):
        store.save_quantization(quantization())


@pytest.mark.skipif(
    os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0,
    reason="root may write everywhere",
)
def test_a_folder_without_write_permission_is_one_clear_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(QBenchError, match="make it writable"):
        Store(tmp_path / "runs").check_writable()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"format": 1, "key"', "damaged"),
        ("[1, 2]", "not a JSON object"),
        ('{"name": "package.json"}', "no record format number"),
        (f'{{"format": {RECORD_FORMAT + 1}}}', "upgrade qbench"),
        ('{"format": 1, "surprise": 3}', "not a QuantizationRecord"),
    ],
)
def test_an_unreadable_record_names_its_path_and_hides_no_other(
    store: Store, content: str, said: str
) -> None:
    good, bad = quantization("good"), quantization("bad")
    store.save_quantization(good)
    path = store.save_quantization(bad)
    path.write_text(content)
    with pytest.warns(UserWarning, match=said):
        runs = list(store.runs())
    assert [run.quantization.checkpoint for run in runs] == ["good"]
    with pytest.raises(RunFailed, match=said) as caught:
        store.find_quantization("bad", bad.key)
    assert str(path) in str(caught.value)


def test_one_damaged_task_hides_no_other_task(store: Store) -> None:
    model = quantization()
    store.save_quantization(model)
    store.save_task("opt-6.7b", model.key, task(model, "piqa", {"acc": 1}))
    path = store.save_task("opt-6.7b", model.key, task(model, "boolq", {"acc": 1}))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.warns(UserWarning, match="boolq.*damaged"):
        run = next(store.runs())
    assert [t.key.task for t in run.tasks] == ["piqa"]


def test_an_older_format_is_brought_up_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "RECORD_FORMAT", 3)
    steps = {1: lambda d: d | {"seen": [1]}, 2: lambda d: d | {"seen": [*d["seen"], 2]}}
    monkeypatch.setattr(store_module, "_STEPS", steps)
    assert migrate({"format": 1}) == {"format": 3, "seen": [1, 2]}
    assert migrate({"format": 3}) == {"format": 3}


def test_a_failed_run_is_a_record_and_can_be_replaced(store: Store) -> None:
    failed = quantization("a", "gptq", "W2A16", status="failed", error="not positive definite")
    store.save_quantization(failed)
    assert next(store.runs()).quantization.status == "failed"
    store.save_quantization(failed.model_copy(update={"status": "ok", "error": None}))
    assert [run.quantization.status for run in store.runs()] == ["ok"]


def test_leftovers_are_not_read_and_only_old_ones_are_cleaned(store: Store) -> None:
    record = quantization()
    folder = store.save_quantization(record).parent
    old, young = (folder / f"quantization.json.tmp-1-{name}" for name in ("old", "young"))
    for path in (old, young):
        path.write_text("{")
    os.utime(old, (0, 0))
    assert len(list(store.runs())) == 1
    store.save_quantization(record)
    assert (old.exists(), young.exists()) == (False, True)


def test_a_value_json_cannot_hold_is_a_clear_error(store: Store) -> None:
    record = quantization("a", "rtn", "W4A16")
    record.layers[0].extra = {"tensor": object()}
    with pytest.raises(RunFailed, match="a value JSON cannot"):
        store.save_quantization(record)
    assert not store.root.exists()


@pytest.mark.parametrize("name", ["..", "", "/", "a/b\\c:d", "x" * 300, "*.fc1=W4;", "Größe"])
def test_a_slug_is_one_safe_path_component(name: str) -> None:
    text = slug(name)
    assert text == Path(text).name and text not in ("", ".", "..") and len(text) <= 100
    assert text.isascii() and not set(text) & set('/\\:*?"<>|=;, ')


_WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
from study_fixtures import quantization, task
from qbench.study.store import Store
store, model = Store(sys.argv[1]), quantization("a", "rtn", "W4A16")
print("ready", flush=True)
number = 0
while True:
    number += 1
    store.save_quantization(model.model_copy(update={"notes": [str(number)] * 5000}))
    items = {"gold": [number] * 5000}
    store.save_task("a", model.key, task(model, "piqa", {"acc": 0.5}, limit=number % 7 + 1), items)
    print(number, flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX")
@pytest.mark.parametrize("writes", [3, 10])
def test_a_writer_killed_at_any_moment_leaves_only_complete_files(
    store: Store, writes: int
) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(store.root), str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
    )
    assert writer.stdout is not None
    for _ in range(writes + 1):
        assert writer.stdout.readline()
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    (run,) = store.runs()  # a warning would be an error: see the marker below
    assert len(set(run.quantization.notes)) == 1 and len(run.quantization.notes) == 5000
    assert len(run.tasks) >= min(writes, 7) - 1
    for measured in run.tasks:
        assert len(set(store.items(run, measured)["gold"])) == 1


pytestmark = pytest.mark.filterwarnings("error:left out")


def test_reading_results_never_imports_torch_or_the_evaluation_harness(store: Store) -> None:
    model = quantization()
    store.save_quantization(model)
    store.save_task("opt-6.7b", model.key, task(model, "piqa", {"acc": 0.5}))
    code = (
        "import sys\n"
        "import qbench.study.store\n"
        "assert not {'pandas', 'matplotlib', 'pyarrow'} & set(sys.modules)\n"
        "from qbench.comparison import reference\n"
        "from qbench.plots.plot import plot\n"
        "from qbench.study import store\n"
        "from qbench.tables.table import table\n"
        f"s = store.Store({str(store.root)!r})\n"
        f"table(s); plot(s, output={str(store.root / 'a.svg')!r})\n"
        "reference.load('bitnet-table3')\n"
        "assert not {'torch', 'transformers', 'lm_eval', 'datasets'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
