"""Checkpoints that are BitNets only in part, or only in their own code: told, never run wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bitnet_fixtures import ONLINE, config_of, random_bitnet, state_of, write

from qbench.errors import QBenchError
from qbench.models.bitnet.trained import layer_reports
from qbench.models.checkpoints import find_checkpoint
from qbench.testing import tiny_checkpoint


def edited(folder: Path, **entries: object) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    return str(folder)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "llama")


@pytest.mark.parametrize(
    "entries",
    [{"input_bits": 8}, {"weight_bits": 1}, {"architectures": ["BitNetForCausalLM"]}],
)
def test_a_llama_that_hints_at_bitnet_but_lacks_its_norms_is_refused(llama, entries):
    with pytest.raises(QBenchError, match="1bitLLM"):
        find_checkpoint(edited(llama, **entries)).load_model()


def test_a_model_of_its_own_code_is_not_run_as_another(llama):
    entries = {"auto_map": {"AutoModelForCausalLM": "modeling.BonsaiForCausalLM"}}
    with pytest.raises(QBenchError, match="BonsaiForCausalLM of its own code, which is not run"):
        find_checkpoint(edited(llama, **entries))


def test_own_code_for_a_class_that_transformers_has_is_ignored(llama):
    entries = {"auto_map": {"AutoModelForCausalLM": "modeling.LlamaForCausalLM"}}
    assert find_checkpoint(edited(llama, **entries)).load_model()


def test_linears_kept_in_full_precision_count_sixteen_bits(tmp_path):
    """Eight of 14 ternary: the row does not claim 1.59 bits for the whole."""
    model = random_bitnet()
    keep = ["lm_head", "k_proj", "v_proj", "o_proj"]
    config = config_of(model, {**ONLINE, "modules_to_not_convert": keep})
    checkpoint = find_checkpoint(str(write(tmp_path / "part", state_of(model), config)))
    reports = layer_reports(checkpoint.load_model(), checkpoint.trained_scheme)
    trained = [r for r in reports if r.relative_error is None]
    assert len(reports) == 14 and len(trained) == 8
    for report in reports:
        weights = report.shape[0] * report.shape[1]
        kept = report not in trained
        assert report.scheme.startswith("W16A16" if kept else "W1.58A8")
        assert (report.stored_bits == 16 * weights) == kept
