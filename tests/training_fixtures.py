"""Shared by the tests of training: a tiny recipe, running it, killing it."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from qbench.progress import Reporter
from qbench.training.recipe import Recipe
from qbench.training.trainer import Session, train_twin

FIELDS = {
    "name": "t",
    "twins": ["fp16"],
    "shape": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "corpus": "corpus.txt",
    "tokenizer": "tokenizer",
    "seqlen": 16,
    "tokens_per_step": 64,
    "steps": 8,
    "learning_rate": 1e-2,
    "warmup": 2,
    "weight_decay": 0.1,
    "save_every": 3,
    "log_every": 2,
    "eval_every": 4,
}
KINDS = ("fp16", "b1", "b158")


def recipe(**changes):
    fields = {**FIELDS, **changes}
    return Recipe.of({name: value for name, value in fields.items() if value is not None})


def train(material, output, *callbacks, **changes):
    run = recipe(**changes).runs()[0]
    session = Session(reporter=Reporter(quiet=True), callbacks=callbacks)
    return train_twin(run, material, output, session)


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Killed(Exception):
    pass


class KillAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **more):
        if state.global_step == self.step:
            raise Killed


def record_of(folder):
    return json.loads((folder / "training.json").read_text())


def lose_at_step_five(monkeypatch):
    """Make the loss of the fifth step no number, where the learning rate is not 0.01."""
    inside = Trainer.training_step

    def lose(self, *given, **more):
        loss = inside(self, *given, **more)
        lost = self.state.global_step == 4 and self.run.peaks != (0.01,)
        return loss * torch.nan if lost else loss

    monkeypatch.setattr(Trainer, "training_step", lose)
