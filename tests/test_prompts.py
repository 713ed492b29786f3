"""Building and encoding questions quickly gives what doing it slowly gives."""

from pathlib import Path

import pytest

from qbench.evaluation import prompts
from qbench.evaluation.encoding import Encoder
from qbench.evaluation.evaluate import prepare_task
from qbench.evaluation.tasks import EvaluationOptions
from qbench.testing import tiny_tokenizer

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.mark.parametrize("encoding", ["joint+bos", "joint", "lmeval03"])
def test_pairs_encoded_together_are_those_encoded_one_by_one(tokenizer, encoding):
    requests = [
        ("The old man ", " sold"),
        ("", " sold the boat"),
        ("  ", "x"),
        ("The old man ", " sold"),
        ("The", ""),
        ("Question: because Anna\n", "\n promised"),
    ]
    encoder = Encoder(tokenizer, encoding)
    assert encoder.pairs(requests) == [encoder.pair(*request) for request in requests]


def test_templates_are_compiled_once_and_nothing_stays_on_lm_eval(tokenizer, monkeypatch):
    from lm_eval.utils import env

    prompts._compiled.cache_clear()
    compiled, inner = [], type(env).from_string
    monkeypatch.setattr(
        type(env), "from_string", lambda self, text: compiled.append(text) or inner(self, text)
    )
    prepared = prepare_task("arc_easy", tokenizer, 512, EvaluationOptions(data_dir=DATA))
    assert len(prepared.questions) == 5
    assert compiled and len(compiled) == len(set(compiled))
    assert "from_string" not in vars(env)
    with prompts.compiled_once(env), prompts.compiled_once(env):
        assert "from_string" in vars(env)
    assert "from_string" not in vars(env)
