"""Batches side by side: the same numbers as one after the other, on models that do not meet."""

import threading
import time

import pytest
import torch
from cli_fixtures import LINES
from test_scoring import EVERY, SOME, windows
from test_sharing import build, questions

from qbench import quantize_model
from qbench.errors import QBenchError
from qbench.evaluation import scoring
from qbench.evaluation.evaluate import prepare_task
from qbench.evaluation.forward import logits_of
from qbench.evaluation.packing import PackedRows
from qbench.evaluation.reading import read_batches
from qbench.evaluation.scoring import score
from qbench.evaluation.tasks import EvaluationOptions, TaskSpec
from qbench.models import side_by_side as side_by_side_module
from qbench.models.checkpoints import find_checkpoint
from qbench.models.products import on_threads
from qbench.models.side_by_side import double_of, number_at_once, side_by_side, threads_shared
from qbench.models.streamed import open_streamed
from qbench.testing import tiny_checkpoint, tiny_model


@pytest.fixture(autouse=True)
def two_threads():
    with on_threads(2):
        yield


def alone(model, rows, *args):
    with on_threads(1):
        return score(model, PackedRows(rows), *args)


@pytest.mark.parametrize(
    "architecture", [a if a in SOME else pytest.param(a, marks=pytest.mark.slow) for a in EVERY]
)
def test_scores_are_those_of_one_batch_after_the_other(architecture):
    model, rows = build(architecture), questions()
    one, two = alone(model, rows, 60), score(model, PackedRows(rows), 60)
    assert two.scores == one.scores
    assert (one.details.pop("batches_at_once"), two.details.pop("batches_at_once")) == (1, 2)
    assert two.details == one.details


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
@pytest.mark.parametrize("scheme", ["W8A4", "W8A8KV4", "W4A8:a=tensor"])
def test_activation_quantizers_work_in_both(architecture, scheme):
    """Those of keys and values, and of fused experts, hold a mode open while a module runs."""
    model, rows = build(architecture), questions()
    quantize_model(model, "rtn", scheme)
    assert score(model, PackedRows(rows), 60).scores == alone(model, rows, 60).scores


def test_one_batch_has_all_threads_and_no_double():
    model = tiny_model()
    assert number_at_once(model, 1) == 1 and number_at_once(model, 2) == 2
    assert score(model, PackedRows(windows(1))).details["batches_at_once"] == 1
    with threads_shared(1):
        assert torch.get_num_threads() == 2
    with threads_shared(2):
        assert torch.get_num_threads() == 1
        assert number_at_once(model, 2) == 1
    assert number_at_once(model.to("meta"), 9) == 2, "a streamed model is where its inputs are"


def test_a_model_with_something_in_place_of_a_forward_runs_alone():
    model = tiny_model()
    assert number_at_once(model, 9) == 2
    model.model.layers[0].forward = model.model.layers[0].forward
    assert number_at_once(model, 9) == 1
    del model.model.layers[0].forward
    model.beside = [model.model]
    assert number_at_once(model, 9) == 1
    model.beside = model.model.embed_tokens.forward
    assert number_at_once(model, 9) == 1
    del model.beside
    assert number_at_once(model, 9) == 2


def test_a_double_that_would_call_the_first_model_is_found_by_trying():
    model = tiny_model()
    hidden = {"head": model.lm_head}  # where no attribute shows it
    model.lm_head = Elsewhere(hidden)
    assert number_at_once(model, 9) == 1
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert number_at_once(torch.nn.Linear(2, 2), 9) == 1, "it takes no tokens"


class Elsewhere(torch.nn.Module):
    """Calls a module that it does not own."""

    def __init__(self, found):
        super().__init__()
        self.found, self.own = found, found["head"]

    def forward(self, x):
        return self.found["head"](x)


def test_a_double_shares_tensors_and_no_hooks():
    model = tiny_model()
    called = []
    model.lm_head.register_forward_hook(lambda *_: called.append("both"))
    double = double_of(model)
    assert type(double) is type(model) and double.model is not model.model
    mine, its = dict(model.named_parameters()), dict(double.named_parameters())
    assert mine.keys() == its.keys() and all(mine[name] is its[name] for name in mine)
    assert all(b is c for b, c in zip(model.buffers(), double.buffers(), strict=True))
    double.lm_head.register_forward_hook(lambda *_: called.append("double"))
    double.model.register_buffer("own", torch.ones(1))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, double(ids).logits)
    assert called == ["both", "both", "double"]
    assert not hasattr(model.model, "own")


class CopiedItsOwnWay(torch.nn.Linear):
    def __setstate__(self, state):
        super().__setstate__(state)
        self.made_by = "setstate"


def test_a_module_that_has_its_own_way_to_be_copied_is_copied_so():
    module = torch.nn.Sequential(CopiedItsOwnWay(3, 3), torch.nn.ReLU())
    double = double_of(module)
    assert double[0].made_by == "setstate" and not hasattr(module[0], "made_by")
    assert double[0] is not module[0] and double[0].weight is module[0].weight


def test_a_compiled_script_has_no_double():
    model = tiny_model()
    model.model.layers[0].mlp.act_fn = torch.jit.trace(torch.nn.SiLU(), torch.ones(2))
    with on_threads(2):
        assert number_at_once(model, 4) == 1
        score(model, PackedRows(questions()))


def test_modules_that_are_one_are_one_in_the_double():
    inner = torch.nn.Linear(2, 2)
    double = double_of(torch.nn.Sequential(inner, torch.nn.Sequential(inner)))
    assert double[0] is double[1][0] and double[0] is not inner


def test_results_come_in_order_and_not_far_ahead():
    begun, module = [], torch.nn.Linear(2, 2)

    def do(own, item):
        begun.append(item)
        time.sleep(0.02 if item == 0 else 0)
        return item, own is module, torch.get_num_threads()

    found = side_by_side(module, range(6), do, 2)
    assert next(found)[0] == 0
    time.sleep(0.1)
    assert len(begun) <= 3
    rest = list(found)
    assert [item for item, _, _ in rest] == [1, 2, 3, 4, 5]
    assert {threads for _, _, threads in rest} == {torch.get_num_threads()}


def test_other_threads_compute_as_this_one_does():
    def modes(own, item):
        return torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    model = torch.nn.Linear(2, 2)
    with torch.no_grad():
        assert set(side_by_side(model, range(3), modes, 2)) == {(False, False)}
    with torch.inference_mode():
        assert set(side_by_side(model, range(3), modes, 2)) == {(True, False)}
    assert set(side_by_side(model, range(3), modes, 2)) == {(False, True)}


def test_which_model_gets_a_batch_does_not_depend_on_time():
    module = torch.nn.Linear(2, 2)

    def do(own, item):
        time.sleep(0.05 if item == 0 else 0)
        return own is module

    assert list(side_by_side(module, range(6), do, 2)) == [True, False] * 3


@pytest.mark.parametrize("given_up", ["error", "closed"])
def test_nothing_goes_on_once_it_was_given_up(given_up):
    module, begun = torch.nn.Linear(2, 2), []

    def do(own, item):
        begun.append(item)
        if given_up == "error" and item == 2:
            raise ZeroDivisionError
        return item

    found = side_by_side(module, range(1000), do, 2)
    if given_up == "error":
        with pytest.raises(ZeroDivisionError):
            list(found)
    else:
        next(found)
        found.close()
    assert len(begun) < 10
    assert not [t for t in threading.enumerate() if "ThreadPoolExecutor" in t.name]
    assert torch.get_num_threads() == 2


def test_where_two_batches_do_not_fit_smaller_ones_run(monkeypatch):
    model, packed = tiny_model(), PackedRows(questions())
    expected = score(model, packed, 90)
    both, full = threading.Barrier(2), []
    inner = scoring._of_tokens

    def of_tokens(*args):
        if len(full) < 2:
            full.append(1)
            both.wait(timeout=60)  # both batches are under way
            raise torch.OutOfMemoryError("no memory")
        return inner(*args)

    monkeypatch.setattr(scoring, "_of_tokens", of_tokens)
    assert [batch.ids.numel() for batch in packed.batches("shared", 90)] == [72, 72]
    found = score(model, packed, 90)
    assert found.details["oom_halvings"] == 1 and found.details["batch_tokens"] == 36
    assert found.details["batches_at_once"] == 2
    for one, other in zip(found.scores, expected.scores, strict=True):
        assert one.loglikelihood == pytest.approx(other.loglikelihood, abs=1e-5)


@pytest.fixture(scope="module", params=[64, 512], ids=["one thread a batch", "wide"])
def folder(request, tmp_path_factory):
    """Wide models multiply in oneDNN, on as many threads as each batch has."""
    place = tmp_path_factory.mktemp("side") / "model"
    return tiny_checkpoint(place, hidden_size=request.param, num_attention_heads=4)


@pytest.fixture
def doubled(monkeypatch):
    """Notes what is doubled."""
    found = []
    monkeypatch.setattr(
        side_by_side_module,
        "double_of",
        lambda m: (found.append(type(m).__name__), double_of(m))[1],
    )
    return found


@pytest.mark.parametrize("batch_tokens", [30, 200])
def test_a_streamed_model_scores_as_the_one_in_memory(folder, tmp_path, batch_tokens, doubled):
    checkpoint = find_checkpoint(str(folder))
    streamed = open_streamed(checkpoint, "float32", work=tmp_path / "work")
    rows = questions()
    with on_threads(4):
        one = score(checkpoint.load_model(), PackedRows(rows), batch_tokens, "padded")
        assert "LlamaForCausalLM" in doubled and "LlamaDecoderLayer" not in doubled
        other = score(streamed, PackedRows(rows), batch_tokens, "padded")
    assert doubled.count("LlamaDecoderLayer") >= 2
    assert other.scores == one.scores
    assert other.details == one.details and one.details["batches_at_once"] == 2


@pytest.mark.parametrize("of_reference", ["in memory", "streamed"])
def test_agreement_is_that_of_one_batch_after_the_other(folder, tmp_path, of_reference):
    """Both models run in both threads, but for a streamed reference, of which there is one."""
    checkpoint = find_checkpoint(str(folder))

    def full_precision():
        if of_reference == "streamed":
            return open_streamed(checkpoint, "float32")
        return checkpoint.load_model()

    (tmp_path / "text.txt").write_text("".join(LINES))
    spec = TaskSpec.parse(f"{tmp_path / 'text.txt'}@agreement-16")
    task = prepare_task(spec, checkpoint.load_tokenizer(), 64, EvaluationOptions(batch_tokens=40))
    shaken = checkpoint.load_model()
    with torch.no_grad():
        shaken.model.layers[0].mlp.up_proj.weight.mul_(3)
    with on_threads(4):
        bound = task.against(task.refer(full_precision()))
        found, same = bound.run(shaken), bound.run(full_precision())
    with on_threads(1):
        expected = task.against(task.refer(full_precision())).run(shaken)
    at_once = 1 if of_reference == "streamed" else 2
    assert found.details["batches_at_once"] == at_once
    assert same.metrics["kl_divergence"].value == pytest.approx(0, abs=1e-9)
    for name, metric in expected.metrics.items():
        assert found.metrics[name].value == pytest.approx(metric.value, rel=1e-4)
    assert expected.metrics["kl_divergence"].value > 1e-4


def test_what_reading_raises_is_raised_here():
    def read(batch, parts):
        raise QBenchError("no")

    model, rows = tiny_model(), PackedRows(windows())
    with torch.inference_mode(), pytest.raises(QBenchError, match="no"):
        list(read_batches(model, rows.batches("padded", 20), read, logits_of))


def test_threads_come_back_when_progress_raises():
    model, packed = tiny_model(), PackedRows(questions())

    def progress(done, total):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as kept:  # a notebook keeps tracebacks too
        score(model, packed, 60, progress=progress)
    assert kept.traceback and torch.get_num_threads() == 2
    assert not [t for t in threading.enumerate() if "ThreadPoolExecutor" in t.name]
