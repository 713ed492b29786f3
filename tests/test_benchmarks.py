"""The benchmark scripts' own arithmetic and files; nothing is timed here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # the scripts are run from the checkout and never installed

from benchmarks import (  # noqa: E402  # noqa: E402
    common,
    environments,
    evaluation,
    growth,
    memory,
    models,
    questions,
    render,
    run,
    solvers,
    sweep,
)
from benchmarks.common import Report, Table, Times  # noqa: E402
from benchmarks.peers import plain_sweep, with_auto_gptq  # noqa: E402
from qbench import load_checkpoint  # noqa: E402
from qbench.evaluation.definitions import read_definition  # noqa: E402
from qbench.testing import tiny_model, tiny_tokenizer  # noqa: E402

TINY = models.llama_fields(32, 3, 48, 4, 300, num_key_value_heads=2)


@pytest.mark.parametrize("name", [*run.SCRIPTS, "run"])
def test_every_script_explains_itself(name: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert "--quick" in done.stdout and "--threads" in done.stdout


def test_help_and_reports_do_not_import_torch() -> None:
    code = "import sys; from benchmarks import render, run, solvers; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stderr


def test_a_ratio_is_of_medians_and_its_range_is_of_turns() -> None:
    middle, shown = common.ratio(Times([4.0, 6.0, 9.0]), Times([2.0, 2.0, 3.0]))
    assert middle == 3.0
    assert shown == "3.00x (2.00..3.00)"
    assert str(Times([4.0, 16.0, 9.0])) == "9.00 s (4.00..16.0, n=3)"
    assert common.against(2.0, 2.0) == "2x met"
    assert common.against(1.99, 2.0) == "2x missed"


def test_sides_take_turns_in_alternating_order_and_preparing_is_not_run_early() -> None:
    order: list[str] = []

    def side(name: str) -> Any:
        def prepare() -> Any:
            order.append(f"prepare {name}")
            return lambda: order.append(name)

        return prepare

    assert common.cpu_ratio(Times([], [2.0, 4.0, 3.0]), Times([], [1.0, 2.0, 1.5])) == "2.00x"
    times, _ = common.take_turns({"a": side("a"), "b": side("b")}, 2)
    assert order == ["prepare a", "a", "prepare b", "b", "prepare b", "b", "prepare a", "a"]
    assert [len(t.seconds) for t in times.values()] == [2, 2]


def test_a_report_survives_its_file_and_is_on_the_page(tmp_path: Path) -> None:
    report = Report("startup", "Start-up", "2", measurements={"x": [1.5]})
    report.add(Table("Commands", ["", "wall"], [["a|b", "1.5 s"]], ["A note."]))
    report.save(SimpleNamespace(output=tmp_path, quick=True))
    assert Report.load(tmp_path / "startup.json") == report
    page = render.write(tmp_path)
    text = page.read_text()
    assert page == tmp_path / "README.md"
    assert "| a\\|b | 1.5 s |" in text and "A note." in text
    assert "no figures to quote" in text


def test_a_trie_holds_every_distinct_prefix_once() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 3, (n,), generator=generator).tolist() for n in (6, 5, 7, 6, 6, 1)]
    prefixes = {tuple(row[:n]) for row in rows for n in range(1, len(row) + 1)}
    assert questions.trie_size(rows) == len(prefixes)


def test_tokens_of_hflm_count_equal_inputs_once() -> None:
    # two options that differ in their last token alone, then a question of its own
    encoded = [([1, 2], [3, 4]), ([1, 2], [3, 5]), ([1, 6], [7])]
    counts = questions.token_counts(encoded, [2, 1], max_length=10)
    assert counts == {"hflm": 3 + 2, "questions": 3 + 2, "task": 3 + 1}
    assert questions.token_counts(encoded, [2, 1], max_length=2)["hflm"] == 2 + 2


def test_a_sample_is_seeded_and_keeps_the_order_of_the_rows(tmp_path: Path) -> None:
    source = tmp_path / "data" / "tasks" / "piqa" / "validation.jsonl"
    source.parent.mkdir(parents=True)
    source.write_text("".join(json.dumps({"n": n}) + "\n" for n in range(50)))
    drawn = []
    for name in ("one", "other"):
        folder = questions.sample(tmp_path / "data", tmp_path / name, ["piqa"], 10)
        lines = (folder / "tasks/piqa/validation.jsonl").read_text().splitlines()
        drawn.append([json.loads(line)["n"] for line in lines])
    assert drawn[0] == drawn[1] == sorted(drawn[0])
    assert len(set(drawn[0])) == 10

    definitions = questions.lm_eval_definitions(tmp_path / "one", tmp_path / "yaml", ["piqa"])
    made = read_definition(definitions / "piqa.yaml")
    assert made["dataset_path"] == "json"
    assert made["validation_split"] == "validation" and made["test_split"] is None
    assert made["doc_to_text"]  # from the pinned definition


def test_an_answer_changes_when_the_likeliest_option_does() -> None:
    ours, theirs = [-1.0, -2.0, -3.0, -4.0], [-1.0, -2.0, -4.0, -3.0]
    assert evaluation.changed_answers(ours, theirs, [2, 2], [1, 1, 1, 1]) == 1
    # by sum the first option wins on both sides; per character the second does on one of them
    assert evaluation.changed_answers([-4.0, -4.5], [-4.0, -8.1], [2], [1, 2]) == 1
    assert evaluation.changed_answers([-4.0, -4.5], [-4.0, -7.9], [2], [1, 2]) == 0


def test_the_exponent_of_a_power_law_is_its_power() -> None:
    sizes = [1.0, 2.0, 4.0]
    assert growth.exponent(sizes, [3 * s**1.5 for s in sizes]) == pytest.approx(1.5)
    assert growth.exponent(sizes, [7.0, 7.0, 7.0]) == pytest.approx(0.0)


def test_records_differ_where_they_found_something_else() -> None:
    one = {"metrics": {"ppl": 1.0}, "details": {"batching": "a"}, "layers": [{"e": 1}, {"e": 2}]}
    other = {"metrics": {"ppl": 1.0}, "details": {"batching": "b"}, "layers": [{"e": 1}, {"e": 3}]}
    assert memory.differences(one, one) == []
    assert memory.differences(one, other) == ["/layers/1/e"]
    assert memory.differences({"a": 1}, {}) == ["/a"]


def test_memory_of_a_process_is_read_and_of_none_is_empty() -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc")
    import os

    seen = memory.status_bytes(os.getpid())
    assert 0 < seen["RssAnon"] <= seen["VmRSS"]
    assert memory.status_bytes(2**22 + 1) == {}


def test_ldlq_on_a_diagonal_hessian_is_rounding_half_up() -> None:
    target = torch.tensor([[0.5, 1.5, 2.49], [2.5, 3.2, -1.0]])
    codes = solvers.published_ldlq_codes(target, torch.eye(3), 3)
    assert codes.tolist() == [[1, 2, 2], [3, 3, 0]]


def test_the_published_loop_feeds_errors_back() -> None:
    weight, hessian = solvers.problem((16, 24))
    loss = solvers.proxy_loss(solvers.published_ldlq(weight, hessian), weight, hessian)
    nearest = solvers.published_ldlq(weight, torch.diag(hessian.diagonal()))
    assert loss < 0.7 * solvers.proxy_loss(nearest, weight, hessian)


def test_both_solvers_of_ldlq_give_the_same_weights() -> None:
    weight, hessian = solvers.problem((16, 24))
    scheme = "W4A16:w=channel,grid=asym"
    ours = solvers.qbench_side("quip", scheme, weight, hessian, incoherence="false")()()
    assert torch.allclose(ours, solvers.published_ldlq(weight, hessian), atol=1e-6)


def test_the_plain_scripts_absmax_is_the_formula() -> None:
    x = torch.tensor([[1.0, -0.26, 0.49], [0.2, 0.1, -0.05]])
    assert plain_sweep.absmax(x, 2, rows=False).tolist() == [[1, 0, 0], [0, 0, 0]]
    expected = torch.tensor([[1, 0, 0], [0.2, 0.0, 0.0]])  # 0.5 is a tie, which goes to even
    assert torch.allclose(plain_sweep.absmax(x, 2, rows=True), expected)


def test_the_plain_walk_meets_every_linear_with_what_the_blocks_below_give() -> None:
    model = models.random_llama({**TINY, "num_hidden_layers": 2})
    windows = torch.randint(3, 300, (3, 8), generator=torch.Generator().manual_seed(0))
    seen: dict[Any, list[torch.Tensor]] = {}

    class Zero:
        def __init__(self, linear: torch.nn.Linear) -> None:
            self.linear = linear
            seen[linear] = []

        def add_batch(self, inputs: torch.Tensor, output: torch.Tensor) -> None:
            seen[self.linear].append(inputs)

        def finish(self) -> None:
            self.linear.weight.data.zero_()

    with torch.no_grad():
        embedded = model.model.embed_tokens(windows)
    with_auto_gptq.walk(model, windows, Zero)
    assert len(seen) == 14 and all(len(batches) == 3 for batches in seen.values())
    # all linears of block 0 give zero, so block 1 reads the embeddings, normalized
    second = model.model.layers[1]
    with torch.no_grad():
        expected = second.input_layernorm(embedded)
    assert torch.allclose(torch.cat(seen[second.self_attn.q_proj]), expected)


def test_a_sharded_checkpoint_loads_whole(tmp_path: Path) -> None:
    folder = models.make_sharded(tmp_path, "tiny", TINY, None)
    assert len(list(folder.glob("*.safetensors"))) == 4  # embeddings, two blocks, one, the head
    model, tokenizer = load_checkpoint(str(folder))
    assert len(tokenizer) == 300 == model.get_input_embeddings().weight.shape[0]
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    assert model.model.layers[2].mlp.down_proj.weight.std() == pytest.approx(0.02, rel=0.05)


def test_a_tokenizer_is_made_once_and_has_its_size(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\n" * 20)
    made = models.make_tokenizer(tmp_path, None, 280, [text])
    assert len(made) == 280
    assert models.make_tokenizer(tmp_path, None, 280, [text]).get_vocab() == made.get_vocab()


def test_thirteen_rows_each_once() -> None:
    assert len(set(sweep.ROWS)) == len(sweep.ROWS) == 13


def test_missing_data_is_one_line() -> None:
    nothing = common.missing(SimpleNamespace(data=None), ["tasks/piqa/x.jsonl"], "evaluation")
    assert nothing is not None and "--data" in nothing and "\n" not in nothing
    partly = common.missing(SimpleNamespace(data=ROOT), ["README.md", "no.txt"], "memory")
    assert partly == f"memory: {ROOT} lacks no.txt"


def test_peers_keep_the_projects_torch() -> None:
    pinned_torch = f"torch=={environments._torch_version()}"
    assert pinned_torch in (ROOT / "constraints.txt").read_text().splitlines()
    for peer in environments.PEERS:
        pinned = [word for step in peer.steps for word in step if "==" in word]
        assert any(peer.version in word for word in pinned)
        if peer.probe:  # the others run in the project's own environment
            assert all("torch=={torch}" in step for step in peer.steps)


def test_hflm_runs_in_the_batches_it_is_asked_for() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    lm = evaluation.hflm(model, tokenizer, 1)
    shapes: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(len(args[0])), with_kwargs=True
    )
    encoded = [((str(i), ""), [1, 5 + i], [7, 8, 9 + i]) for i in range(12)]
    evaluation.score_with_hflm(lm, encoded, 4)
    assert shapes == [4, 4, 4]
