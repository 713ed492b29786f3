"""Training twins: the same data and start, continuing to the same weights, refusing mistakes."""

import gc
import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from training_fixtures import (
    KINDS,
    KillAfter,
    Killed,
    lose_at_step_five,
    recipe,
    record_of,
    same,
    train,
    weights,
)
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from qbench.errors import QBenchError, RunFailed
from qbench.models.checkpoints import load_checkpoint
from qbench.testing.models import _SENTENCES, tiny_tokenizer
from qbench.training import trainer
from qbench.training.curves import read_curve
from qbench.training.data import pack
from qbench.training.folders import TwinFolder
from qbench.training.recipe import Recipe
from qbench.training.trainer import Material, TwinTrainer


@pytest.fixture(scope="module")
def material():
    tokenizer = tiny_tokenizer()
    return Material(
        tokenizer,
        pack(_SENTENCES[:60], tokenizer, 16),
        pack(_SENTENCES[60:80], tokenizer, 16),
    )


@pytest.fixture(scope="module", autouse=True)
def _little_garbage():
    """The Trainer collects garbage; what pytest has loaded need not be walked every time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def twins(material, tmp_path_factory):
    """A folder with the three twins of ``FIELDS``; no test changes it."""
    folder = tmp_path_factory.mktemp("twins")
    for kind in KINDS:
        train(material, folder, twins=[kind])
    return folder


class Batches:
    """What a training sees at every step, in order."""

    def __init__(self, monkeypatch):
        self.steps = {}
        inside = TwinTrainer.training_step

        def spy(trainer, model, inputs, *rest, **more):
            step = self.steps.setdefault(trainer.state.global_step, [])
            step.append(inputs["input_ids"].clone())
            return inside(trainer, model, inputs, *rest, **more)

        monkeypatch.setattr(TwinTrainer, "training_step", spy)

    def joined(self):
        return [torch.cat(parts) for parts in self.steps.values()]


# --- twins ---------------------------------------------------------------------------------------


def test_twins_see_the_same_tokens_in_the_same_order(material, tmp_path, monkeypatch):
    seen = {}
    for kind in KINDS:
        with monkeypatch.context() as patch:
            batches = Batches(patch)
            train(material, tmp_path, twins=[kind], steps=3, warmup=0)
            seen[kind] = batches.joined()
    assert [batch.shape for batch in seen["fp16"]] == [(4, 16)] * 3
    for kind in ("b1", "b158"):
        assert all(torch.equal(a, b) for a, b in zip(seen["fp16"], seen[kind], strict=True))


def test_smaller_passes_make_the_same_step(material, tmp_path, monkeypatch):
    whole, parts = Batches(monkeypatch), None
    train(material, tmp_path / "a", steps=3, warmup=0)
    monkeypatch.undo()
    parts = Batches(monkeypatch)
    train(material, tmp_path / "b", steps=3, warmup=0, batch_size=1)
    assert [len(step) for step in parts.steps.values()] == [4, 4, 4]
    assert all(torch.equal(a, b) for a, b in zip(whole.joined(), parts.joined(), strict=True))
    one, other = weights(tmp_path / "a" / "fp16-t"), weights(tmp_path / "b" / "fp16-t")
    for name in one:  # sums in another order, then float16
        assert torch.allclose(one[name], other[name], atol=2e-4)


def test_two_trainings_with_one_seed_give_equal_weights_and_another_seed_others(
    material, tmp_path, twins
):
    for name, seed in (("again", 0), ("other", 1)):
        train(material, tmp_path / name, twins=["b158"], seed=seed)
    first, again, other = (
        weights(folder / "b158-t") for folder in (twins, tmp_path / "again", tmp_path / "other")
    )
    assert same(first, again) and not same(first, other)


def test_training_lowers_the_loss_of_every_twin(material, tmp_path):
    for kind in KINDS:
        train(material, tmp_path, twins=[kind], steps=24)
        losses = [row.loss for row in read_curve(tmp_path / f"{kind}-t" / "loss.csv")]
        assert losses[0] == pytest.approx(math.log(512), rel=0.03)  # of 512 tokens, all alike
        assert losses[-1] < losses[0] - 1.0


def test_latent_weights_and_optimizer_are_float32_also_in_mixed_precision(material, tmp_path):
    kinds = set()

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **more):
            kinds.update(p.dtype for p in model.parameters())
            kinds.update(p.grad.dtype for p in model.parameters() if p.grad is not None)
            for held in optimizer.state.values():
                kinds.update(t.dtype for t in held.values() if torch.is_tensor(t))

        on_pre_optimizer_step = on_step_end

    for kind in KINDS:
        train(material, tmp_path, Look(), twins=[kind], precision="bfloat16", steps=2, warmup=0)
    assert kinds == {torch.float32}


def test_mixed_precision_computes_in_bfloat16(material, tmp_path):
    seen = set()

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **more):
            layer = model.model.layers[0].mlp.down_proj
            layer.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))

    train(material, tmp_path / "a", Look(), precision="bfloat16", steps=1, warmup=0)
    assert seen == {torch.bfloat16}
    train(material, tmp_path / "b", Look(), steps=1, warmup=0)
    assert seen == {torch.bfloat16, torch.float32}


# --- schedule ------------------------------------------------------------------------------------


class Groups(TrainerCallback):
    """Learning rate and weight decays of every update, as the optimizer has them."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **more):
        groups = optimizer.param_groups
        self.seen.append((groups[0]["lr"], sorted(group["weight_decay"] for group in groups)))


def test_the_optimizer_follows_the_two_stages(material, tmp_path):
    changes = {
        "twins": ["b158"],
        "schedule": "two-stage",
        "learning_rate": [4e-3, 1e-3],
        "warmup": 2,
    }
    groups = Groups()
    train(material, tmp_path, groups, **changes)
    run = recipe(**changes).runs()[0]
    assert [lr for lr, _ in groups.seen] == pytest.approx(
        [run.learning_rate_at(s) for s in range(8)]
    )
    assert [decays for _, decays in groups.seen] == [[0.0, 0.1]] * 4 + [[0.0, 0.0]] * 4


def test_a_training_that_continues_in_the_second_stage_follows_it_too(material, tmp_path):
    changes = {"twins": ["b158"], "schedule": "two-stage", "learning_rate": [4e-3, 1e-3]}
    whole, late = Groups(), Groups()
    train(material, tmp_path / "a", whole, **changes)
    with pytest.raises(Killed):
        train(material, tmp_path / "b", KillAfter(7), **changes)
    train(material, tmp_path / "b", late, **changes)
    assert late.seen == whole.seen[6:]
    assert same(weights(tmp_path / "a" / "b158-t"), weights(tmp_path / "b" / "b158-t"))


def test_norms_do_not_decay_and_matrices_do(material, tmp_path):
    found = {}

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, **more):
            names = {id(p): name for name, p in model.named_parameters()}
            for group in optimizer.param_groups:
                found.update({names[id(p)]: group["decays"] for p in group["params"]})

    train(material, tmp_path, Look(), twins=["b158"], steps=1, warmup=0)
    norms = {name for name in found if "norm" in name}
    assert {name for name, decays in found.items() if not decays} == norms
    assert any("sub_norm" in name for name in norms) and "model.norm.weight" in norms


def test_gradients_are_clipped_only_where_the_recipe_says_so(material, tmp_path):
    norms = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **more):
            grads = [p.grad.norm() for p in model.parameters()]
            norms.append(torch.stack(grads).norm().item())

    train(material, tmp_path / "a", Look(), steps=1, warmup=0)
    train(material, tmp_path / "b", Look(), steps=1, warmup=0, clip=1e-3)
    assert norms[0] > 0.1 and norms[1] == pytest.approx(1e-3, rel=1e-3)


# --- continuing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_training_continues_to_the_same_weights_and_curve(material, tmp_path, twins, kind):
    whole, cut = twins, tmp_path
    expected = record_of(whole / f"{kind}-t")
    with pytest.raises(Killed):
        train(material, cut, KillAfter(5), twins=[kind])
    assert not (cut / f"{kind}-t").exists()
    steps = []

    class Steps(TrainerCallback):
        def on_step_begin(self, args, state, control, **more):
            steps.append(state.global_step)

    found = train(material, cut, Steps(), twins=[kind])
    assert steps == [3, 4, 5, 6, 7]  # from the checkpoint of step 3
    assert same(weights(whole / f"{kind}-t"), weights(cut / f"{kind}-t"))
    assert (found["train_loss"], found["eval_loss"]) == (
        expected["train_loss"],
        expected["eval_loss"],
    )
    curves = [read_curve(folder / f"{kind}-t" / "loss.csv") for folder in (whole, cut)]
    rows = [[(r.step, r.loss, r.eval_loss, r.learning_rate) for r in curve] for curve in curves]
    assert rows[0] == rows[1]
    assert [row[0] for row in rows[0]] == [2, 3, 4, 6, 8]
    assert [row[2] is not None for row in rows[0]] == [False, False, True, False, True]
    assert not list(cut.glob(".*"))  # the state is gone once the twin stands


def test_a_half_written_checkpoint_is_passed_over(material, tmp_path, twins):
    with pytest.raises(Killed):
        train(material, tmp_path, KillAfter(7))
    work = TwinFolder(tmp_path / "fp16-t").work
    checkpoints = sorted(path.name for path in work.glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-3", "checkpoint-6"]
    (work / "checkpoint-6" / "trainer_state.json").write_text('{"global_st')
    train(material, tmp_path)
    assert same(weights(twins / "fp16-t"), weights(tmp_path / "fp16-t"))


def test_a_training_killed_while_it_saves_the_twin_needs_no_step_more(
    material, tmp_path, monkeypatch, twins
):
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_save", lambda *given: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            train(material, tmp_path)
    assert not (tmp_path / "fp16-t").exists()
    record = train(material, tmp_path, KillAfter(8))
    assert record["train_loss"] == record_of(twins / "fp16-t")["train_loss"]
    assert same(weights(twins / "fp16-t"), weights(tmp_path / "fp16-t"))


def test_what_a_kill_leaves_behind_beside_a_finished_twin_is_tidied_up(
    material, tmp_path, monkeypatch
):
    real = shutil.rmtree

    def killed(path, **more):
        if str(path).endswith(".training"):
            raise Killed
        real(path, **more)

    with monkeypatch.context() as patch:
        patch.setattr("qbench.training.folders.shutil.rmtree", killed)
        with pytest.raises(Killed):
            train(material, tmp_path, steps=3)
    assert TwinFolder(tmp_path / "fp16-t").work.is_dir()
    assert train(material, tmp_path, KillAfter(0), steps=3)["status"] == "finished"
    assert [path.name for path in tmp_path.iterdir()] == ["fp16-t"]


def test_a_training_killed_before_its_first_step_begins_anew(material, tmp_path, twins):
    work = TwinFolder(tmp_path / "fp16-t").work
    work.mkdir()
    (work / "recipe.yaml").write_text("")  # written before the record
    train(material, tmp_path)
    assert same(weights(twins / "fp16-t"), weights(tmp_path / "fp16-t"))


def test_a_second_process_is_kept_from_the_same_training(material, tmp_path):
    with pytest.raises(Killed):
        train(material, tmp_path, KillAfter(1), steps=3)
    folder = TwinFolder(tmp_path / "fp16-t")
    said = "fp16-t is being trained by another process; wait for it, or end it"
    with folder.locked(), pytest.raises(QBenchError, match=said):
        train(material, tmp_path, steps=3)
    assert train(material, tmp_path, steps=3)["status"] == "finished"


def test_a_full_disk_is_one_line_and_loses_nothing(material, tmp_path, monkeypatch, twins):
    inside = Trainer._save_checkpoint

    def full(self, *given):
        if self.state.global_step == 6:
            (Path(self.args.output_dir) / "checkpoint-6").mkdir()
            raise OSError(28, "No space left on device")
        inside(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_checkpoint", full)
        with pytest.raises(
            RunFailed, match=r"fp16-t: cannot write to .* \(No space left on device\)"
        ):
            train(material, tmp_path)
    train(material, tmp_path)
    assert same(weights(twins / "fp16-t"), weights(tmp_path / "fp16-t"))


def test_an_output_that_is_a_file_is_one_line(material, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(
        QBenchError, match="cannot write to .*out/.fp16-t.training: Not a directory"
    ):
        train(material, tmp_path / "out")


def test_a_finished_twin_is_not_trained_again(material, twins):
    before = (twins / "fp16-t" / "model.safetensors").stat().st_mtime_ns
    assert train(material, twins, KillAfter(0)) == record_of(twins / "fp16-t")
    assert (twins / "fp16-t" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_of_another_recipe_is_refused_with_the_difference(
    material, tmp_path, twins, finished
):
    folder = twins if finished else tmp_path
    if not finished:
        with pytest.raises(Killed):
            train(material, folder, KillAfter(1))
    with pytest.raises(
        QBenchError, match=r"another recipe \(seed 0, not 1\); choose another name or"
    ):
        train(material, folder, seed=1)
    with pytest.raises(QBenchError, match=r"\(learning_rate \[0.01\], not \[0.02\]\)"):
        train(material, folder, learning_rate=0.02)
    other = Material(material.tokenizer, material.windows.flip(0))
    with pytest.raises(QBenchError, match=r"\(the corpus has another text\)"):
        train(other, folder)


def test_a_folder_that_holds_something_else_is_left_alone(material, tmp_path):
    (tmp_path / "fp16-t").mkdir()
    (tmp_path / "fp16-t" / "notes.txt").write_text("mine")
    with pytest.raises(
        QBenchError, match="fp16-t exists and is no training; choose another --output"
    ):
        train(material, tmp_path)
    assert (tmp_path / "fp16-t" / "notes.txt").read_text() == "mine"


# --- what is left --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_twin_loads_and_has_the_held_out_loss_that_its_record_says(material, twins, kind):
    folder = twins / f"{kind}-t"
    record = record_of(folder)
    assert {tensor.dtype for tensor in weights(folder).values()} == {torch.float16}
    model, tokenizer = load_checkpoint(str(folder))
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]
    windows = material.held_out.long()
    with torch.no_grad():
        loss = model(input_ids=windows, labels=windows).loss.item()
    assert record["eval_loss"] == pytest.approx(loss, abs=1e-4)
    assert tokenizer("Anna found")["input_ids"] == material.tokenizer("Anna found")["input_ids"]


def test_twins_are_stored_as_the_classes_that_run_them(twins):
    config = {kind: json.loads((twins / f"{kind}-t" / "config.json").read_text()) for kind in KINDS}
    types = [config[kind]["model_type"] for kind in KINDS]
    assert types == ["llama", "qbench_bitnet_b1", "bitnet"]
    assert config["b158"]["quantization_config"]["quantization_mode"] == "online"
    assert all(found["use_cache"] for found in config.values())
    assert AutoModelForCausalLM.from_pretrained(twins / "fp16-t").config.vocab_size == 512


def test_the_record_says_recipe_size_and_surroundings_but_no_place(twins):
    record = record_of(twins / "fp16-t")
    assert record["status"] == "finished"
    assert (record["steps"], record["tokens"], record["recipe"]["seed"]) == (8, 512, 0)
    assert record["train_loss"] == read_curve(twins / "fp16-t" / "loss.csv")[-1].loss
    assert {"torch", "transformers", "qbench", "device", "threads"} <= record["environment"].keys()
    for name in ("training.json", "recipe.yaml", "config.json", "tokenizer_config.json"):
        assert str(twins) not in (twins / "fp16-t" / name).read_text()


def test_the_stored_recipe_is_the_one_of_the_record(material, twins):
    again = Recipe.read(twins / "b1-t" / "recipe.yaml")
    run = next(run for run in again.runs() if run.kind == "b1")
    identity = json.loads(json.dumps(run.identity(material.corpus, 512)))
    assert identity == record_of(twins / "b1-t")["recipe"]


def test_global_random_generators_are_left_as_they_were_found(material, tmp_path):
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    train(material, tmp_path)
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


def test_nothing_is_printed_but_by_the_reporter(material, tmp_path, capfd):
    train(material, tmp_path)
    found = capfd.readouterr()
    assert (found.out, found.err) == ("", "")


def test_options_of_the_b1_layers_reach_the_b1_twin_alone(material, tmp_path):
    for kind in ("b1", "b158"):
        train(material, tmp_path, twins=[kind], bitlinear={"qmax": "paper"}, steps=1, warmup=0)
    b1 = json.loads((tmp_path / "b1-t" / "config.json").read_text())["bitlinear"]
    assert (b1["qmax"], b1["weights"]) == ("paper", "binary")
    with pytest.raises(QBenchError, match="unknown BitLinear option 'qmx'; did you mean 'qmax'"):
        train(material, tmp_path / "x", twins=["b1"], bitlinear={"qmx": "paper"})


# --- divergence ----------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_training_at_its_step(material, tmp_path, monkeypatch):
    lose_at_step_five(monkeypatch)
    record = train(material, tmp_path, learning_rate=0.02)
    assert (record["status"], record["step"], record["loss"]) == ("diverged", 5, "nan")
    folder = TwinFolder(tmp_path / "fp16-t")
    assert not folder.final.exists() and folder.record() == record
    assert read_curve(folder.curve)[-1].step == 4
    assert train(material, tmp_path, KillAfter(0), learning_rate=0.02) == record  # as it was found


def test_a_learning_rate_beyond_reason_diverges_by_itself(material, tmp_path):
    assert train(material, tmp_path, learning_rate=1e30, warmup=0)["status"] == "diverged"


def test_memory_that_the_cpu_lacks_is_one_line(material, tmp_path, monkeypatch):
    def too_large(*given):
        torch.empty(2**60, dtype=torch.int8)

    monkeypatch.setattr(trainer, "_model", too_large)
    with pytest.raises(RunFailed, match="fp16-t: out of memory .* set a smaller batch_size or sha"):
        train(material, tmp_path)
