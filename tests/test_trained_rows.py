"""BitNet checkpoints in runs, sweeps and tables: one row at the scheme of their training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from bitnet_fixtures import N_CODES, N_LINEARS, b1, hf_llama, microsoft
from cli_fixtures import DATA, qbench, records, refused
from study_fixtures import add, cells, quantization

from qbench.comparison.panels import accuracy_panels
from qbench.errors import QBenchError
from qbench.evaluation.tasks import EvaluationOptions
from qbench.models import files
from qbench.models.checkpoints import find_checkpoint
from qbench.study.store import Store
from qbench.tables.table import stored_entries, table

TERNARY = "W1.58A8:w=tensor,a=token,grid=ternary,agrid=restricted"
BINARY = "W1A8:w=tensor,a=token,grid=sign,agrid=restricted"
SENTENCE = (
    "b158 is trained at W1.58A8; --latent (latent: true in a sweep) quantizes its latent weights"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny) -> Path:
    """fp16 (a Llama), b158 (latent), packed, b1; never changed."""
    folder = tmp_path_factory.mktemp("twins")
    shutil.copytree(tiny, folder / "fp16")
    microsoft(folder / "b158", packed=False)
    hf_llama(folder / "packed")
    b1(folder / "b1")
    return folder


@pytest.fixture
def run(models, text, tmp_path):
    def go(name, *options, code=0):
        task = f"{text}@gptq-16"
        where = ("--results", tmp_path / "runs")
        return qbench(
            "run", models / name, "--tasks", task, "--limit", 4, *where, *options, code=code
        )

    return go


def quantizations(tmp_path) -> list[dict]:
    return [r for path, r in records(tmp_path / "runs").items() if "quantization.json" in path]


# --- run ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "scheme", "bits"),
    [
        ("b158", TERNARY, 1.584962500721156),  # log2 of three codes
        ("packed", TERNARY, 1.584962500721156),
        ("b1", BINARY, 1.0),
    ],
)
def test_a_bitnet_runs_as_it_is_trained_and_its_record_says_so(
    run, models, tmp_path, name, scheme, bits
):
    result = run(name)
    expected = sum(p.numel() for p in find_checkpoint(str(models / name)).load_model().parameters())
    assert f"{name} · trained {scheme}" in result.stderr
    assert f"{N_LINEARS} matrices as trained" in result.stdout
    (record,) = quantizations(tmp_path)
    assert record["trained"] and record["status"] == "ok"
    assert record["key"]["scheme"] == scheme and record["key"]["baseline"]["name"] == "none"
    # codes at the grid's density, and a 16-bit scale for each of the matrices
    assert record["effective_bits"] == pytest.approx(bits + 16 * N_LINEARS / N_CODES)
    assert len(record["layers"]) == N_LINEARS
    assert {layer["relative_error"] for layer in record["layers"]} == {None}
    assert record["parameters"] == expected


def test_the_load_report_is_printed_and_kept(run, tmp_path):
    printed = run("packed").stderr
    (record,) = quantizations(tmp_path)
    assert any("divides the product" in note for note in record["notes"])
    assert all(note in printed for note in record["notes"])


def test_the_trained_row_is_stored_once_whatever_method_leaves_it_alone(run, tmp_path):
    run("b158")
    assert (
        run("b158", "--baseline", "gptq", "--scheme", "W16A16").stdout.rstrip().endswith("(stored)")
    )
    assert len(quantizations(tmp_path)) == 1


def test_post_training_quantization_of_a_bitnet_is_refused_with_the_way_out(run, models, tmp_path):
    asked = ("--baseline", "rtn", "--scheme", "W4A16", "--results", tmp_path / "runs")
    message = refused("run", models / "b158", *asked)
    assert message.endswith(SENTENCE)
    packed = refused("run", models / "packed", *asked)
    assert packed.endswith("holds ternary codes and no latent weights to quantize")
    assert refused("run", models / "b158", "--scheme", TERNARY).endswith(SENTENCE)
    assert not (tmp_path / "runs").exists()


def test_latent_weights_run_as_an_ordinary_model_of_another_name(run, tmp_path):
    result = run("b158", "--latent", "--baseline", "rtn", "--scheme", "W4A16")
    assert "b158-latent · rtn W4A16" in result.stderr
    run("b158", "--latent")
    run("b158")
    found = {(r["checkpoint"], r["key"]["scheme"]): r for r in quantizations(tmp_path)}
    assert set(found) == {
        ("b158-latent", "W4A16:w=channel,grid=asym"),
        ("b158-latent", "W16A16"),
        ("b158", TERNARY),
    }
    assert [r["trained"] for r in found.values()].count(True) == 1
    assert len({r["key"]["weights"] for r in found.values()}) == 2


def test_rounding_latent_weights_at_the_trained_scheme_gives_the_trained_perplexity(run, tmp_path):
    run("b158")
    run("b158", "--latent", "--baseline", "rtn", "--scheme", TERNARY)
    tasks = [r for path, r in records(tmp_path / "runs").items() if "text.txt" in path]
    first, second = (r["metrics"]["perplexity"]["value"] for r in tasks)
    assert first == pytest.approx(second, rel=1e-3)


def test_latent_is_refused_where_there_are_no_latent_weights(models):
    assert "drop --latent" in refused("run", models / "fp16", "--latent")
    assert "no latent weights" in refused("run", models / "packed", "--latent")


def test_b1_latent_weights_are_quantized_behind_their_norms(run, tmp_path):
    run("b1", "--latent", "--baseline", "rtn", "--scheme", "W4A8")
    (record,) = quantizations(tmp_path)
    assert {layer["name"].rpartition(".")[2] for layer in record["layers"]} == {"linear"}
    assert len(record["layers"]) == N_LINEARS and not record["skipped"]


# --- save -----------------------------------------------------------------------------------------
def test_a_trained_row_is_saved_packed_with_its_record(run, tmp_path):
    printed = run("b158", "--save", tmp_path / "saved").stderr
    assert "activation quantizers are not in it" not in printed
    saved = find_checkpoint(str(tmp_path / "saved"))
    assert saved.bitnet.storage == "packed" and str(saved.trained_scheme) == TERNARY
    assert json.loads((tmp_path / "saved" / "qbench.json").read_text())["trained"]
    where = ("--limit", 4, "--results", tmp_path / "runs")
    again = qbench("run", tmp_path / "saved", "--tasks", f"{tmp_path / 'text.txt'}@gptq-16", *where)
    first, second = (perplexity(text) for text in (run("b158").stdout, again.stdout))
    assert second == pytest.approx(first, rel=1e-3)


def perplexity(printed: str) -> float:
    return float(printed.split("perplexity ")[1].split()[0])


def test_a_b1_is_saved_latent_again(run, models, tmp_path):
    run("b1", "--save", tmp_path / "saved")
    saved, source = find_checkpoint(str(tmp_path / "saved")), find_checkpoint(str(models / "b1"))
    assert saved.bitnet.is_latent and saved.tensors == source.tensors


def test_quantized_latent_weights_of_a_b1_are_no_checkpoint(models, tmp_path):
    asked = ("--latent", "--baseline", "rtn", "--scheme", "W4A16", "--save", tmp_path / "saved")
    message = refused("run", models / "b1", *asked)
    assert "norms inside its linears, for which transformers has no class" in message


def test_quantized_latent_weights_of_a_b158_are_an_ordinary_checkpoint(run, tmp_path):
    run("b158", "--latent", "--baseline", "rtn", "--scheme", "W4A16", "--save", tmp_path / "saved")
    assert find_checkpoint(str(tmp_path / "saved")).bitnet is None


# --- sweep ----------------------------------------------------------------------------------------
@pytest.fixture
def sweep(models, text, tmp_path):
    file = tmp_path / "sweep.yaml"
    latent = f"{{path: {models / 'b158'}, latent: true}}"
    names = ", ".join([str(models / "fp16"), latent, str(models / "b158"), str(models / "b1")])
    file.write_text(
        f"checkpoints: [{names}]\nbaselines: [none, rtn]\nschemes: [W16A16, W4A16]\n"
        f"tasks: ['{text}@gptq-16', piqa]\nlimit: 2\ndata: {DATA}\nresults: {tmp_path / 'runs'}\n"
    )
    return file


def test_a_sweep_runs_the_trained_row_alone_and_says_why_the_others_cannot_be(sweep, tmp_path):
    planned = qbench("sweep", sweep, "--dry-run").stdout
    assert "6 cells: 6 to run" in planned
    assert "mean |W| of each matrix" in planned
    printed = qbench("sweep", sweep).stderr
    assert printed.count("matrices as trained") == 2
    assert printed.count(f"only as it was trained: {SENTENCE}") == 1
    assert printed.count("scale: mean |W| of each matrix") == 2  # b158 and b1
    found = sorted(
        (r["checkpoint"], r["key"]["scheme"], r["trained"]) for r in quantizations(tmp_path)
    )
    ptq = [("W16A16", False), ("W4A16:w=channel,grid=asym", False)]
    assert found == [
        ("b1", BINARY, True),
        ("b158", TERNARY, True),
        *[("b158-latent", *row) for row in ptq],
        *[("fp16", *row) for row in ptq],
    ]
    again = qbench("sweep", sweep).stderr
    assert again.count(": stored") == 6 and "scale:" not in again.partition("b158")[0]


def test_the_trained_row_needs_no_baseline_none(models, text, tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(
        f"checkpoints: [{models / 'b158'}]\nbaselines: [rtn]\nschemes: [W4A16]\n"
        f"tasks: ['{text}@gptq-16']\nlimit: 2\nresults: {tmp_path / 'runs'}\n"
    )
    qbench("sweep", file)
    assert [r["trained"] for r in quantizations(tmp_path)] == [True]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{path: x, latnt: true}", "did you mean 'latent'"),
        ("{latent: true}", "checkpoints.0.path is missing"),
        ("{path: x, latent: perhaps}", "checkpoints.0.latent"),
    ],
)
def test_a_wrong_checkpoint_entry_is_one_line(tmp_path, entry, message):
    file = tmp_path / "sweep.yaml"
    file.write_text(f"checkpoints: [{entry}]\nbaselines: [none]\nschemes: [W4A16]\ntasks: [piqa]\n")
    assert message in refused("sweep", file)


def test_tables_put_trained_rows_beside_the_quantized_ones(sweep, tmp_path):
    qbench("sweep", sweep)
    rows = cells(table(Store(tmp_path / "runs"), "comparison"))
    shown = {(r["Checkpoint"], r["W/A"]): r["Method"] for r in rows}
    assert shown["b158", "W1.58A8"] == "trained" and shown["b1", "W1A8"] == "trained"
    assert shown["b158-latent", "W4A16"] == "rtn" and len(rows) == 6
    bits = {r["Checkpoint"]: r["Bits/weight"] for r in rows if r["Method"] == "trained"}
    assert bits == {"b158": "1.59", "b1": "1.00"}


def test_bitnets_table_3_puts_trained_rows_of_other_checkpoints_under_the_quantized_one(
    sweep, tmp_path
):
    """One full-precision checkpoint: one block, by bits, the trained ones without the PTQ tick."""
    qbench("sweep", sweep)
    kept = ["fp16", "b158", "b1"]
    rows = cells(table(Store(tmp_path / "runs"), "bitnet-table3", checkpoints=kept))
    assert [(r["WBits"], r["Methods"], r["PTQ"]) for r in rows] == [
        ("–", "Random", "✗"),
        ("16", "full precision", "✗"),
        ("4", "rtn", "✓"),
        ("1.58", "trained", "✗"),
        ("1", "trained", "✗"),
    ]


def test_the_figure_marks_trained_rows_as_such(sweep, tmp_path):
    qbench("sweep", sweep)
    found = stored_entries(Store(tmp_path / "runs"), checkpoints=["fp16", "b158", "b1"])
    panels = accuracy_panels(found, "wbits")
    stars = {(p.name, p.wbits) for panel in panels for p in panel.points if p.role == "trained"}
    assert stars == {("b158", 1.58), ("b1", 1)}


def test_trained_twins_stand_in_the_panel_of_each_twin(tmp_path):
    """Sizes of 2 M models that differ by their norms; the 8 M model is another matter."""
    store = Store(tmp_path / "runs")
    sizes = {"fp16-2m": 2_000_000, "b158-2m-latent": 2_004_000, "fp16-8m": 8_000_000}
    for name, size in sizes.items():
        add(store, quantization(name, parameters=size), {"piqa": 0.7})
    trained = quantization("b158-2m", scheme=TERNARY, trained=True, parameters=2_004_000)
    add(store, trained, {"piqa": 0.65})
    panels = accuracy_panels(stored_entries(store), "wbits")
    stars = {p.title: [q.name for q in p.points if q.role == "trained"] for p in panels}
    assert stars == {"fp16-2m": ["b158-2m"], "b158-2m-latent": ["b158-2m"], "fp16-8m": []}


# --- bundled --------------------------------------------------------------------------------------
@pytest.fixture
def world(models, tmp_path, monkeypatch):
    """A room of the bundled world with two checkpoints and data."""
    room = tmp_path / "world"
    shutil.copytree(models / "fp16", room / "checkpoints" / "fp16-2m")
    shutil.copytree(models / "b158", room / "checkpoints" / "b158-2m")
    shutil.copytree(DATA, room / "data")
    monkeypatch.setattr(files, "WORLD", room)
    return room


def test_bundled_names_are_found_wherever_one_stands(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = find_checkpoint("bundled:b158-2m")
    assert checkpoint.name == "b158-2m" and checkpoint.folder == world / "checkpoints" / "b158-2m"
    assert find_checkpoint("bundled:b158-2m", latent=True).name == "b158-2m-latent"


def test_an_unknown_bundled_name_names_the_nearest(world):
    with pytest.raises(QBenchError, match="did you mean 'bundled:b158-2m'"):
        find_checkpoint("bundled:b158-2")


def test_without_bundled_files_the_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WORLD", tmp_path / "nothing")
    with pytest.raises(QBenchError, match="unknown bundled checkpoint 'bundled:fp16-2m'"):
        find_checkpoint("bundled:fp16-2m")


def test_bundled_data_are_a_data_folder(world):
    assert EvaluationOptions(data_dir="bundled:world").data_dir == world / "data"
    assert EvaluationOptions(data_dir=Path("bundled:world")).data_dir == world / "data"
    with pytest.raises(QBenchError, match="unknown bundled data 'bundled:moon'"):
        EvaluationOptions(data_dir=Path("bundled:moon"))


def test_a_bundled_checkpoint_and_bundled_data_run_together(world, tmp_path):
    where = ("--data", "bundled:world", "--results", tmp_path / "runs")
    printed = qbench("run", "bundled:b158-2m", "--tasks", "piqa", "--limit", 2, *where)
    assert "piqa [lm-eval]  acc" in printed.stdout and "b158-2m · trained" in printed.stderr


def test_bundled_checkpoints_are_listed_before_the_stored_ones(world, run, tmp_path):
    run("b158")
    lines = qbench("list", "checkpoints", "--results", tmp_path / "runs").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["bundled:b158-2m", "bundled:fp16-2m", "b158"]
    assert lines[0].endswith("0.09 M parameters, trained at W1.58A8")
    assert lines[1].endswith("0.13 M parameters, full precision")
