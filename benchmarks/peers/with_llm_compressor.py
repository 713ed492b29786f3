"""llm-compressor's ``oneshot`` with GPTQ; run by the python of its own environment.

    python with_llm_compressor.py CHECKPOINT WINDOWS.safetensors

Prints a line of JSON: seconds of the quantization alone, peak resident bytes, logits' error.
"""

import json
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(checkpoint: str, windows_file: str) -> None:
    """Load, quantize, report."""
    windows = load_file(windows_file)["windows"]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    rows = [{"input_ids": w, "attention_mask": [1] * len(w)} for w in windows.tolist()]
    with torch.no_grad():
        before = model(windows[:1]).logits
    started = time.perf_counter()
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=Dataset.from_list(rows),
        # as the others: columns left to right, where its own default sorts them
        recipe=GPTQModifier(
            targets="Linear", scheme="W4A16_ASYM", ignore=["lm_head"], actorder=None
        ),
        max_seq_length=windows.shape[1],
        num_calibration_samples=len(windows),
        shuffle_calibration_samples=False,
    )
    seconds = time.perf_counter() - started
    with torch.no_grad():
        error = float((model(windows[:1]).logits - before).norm() / before.norm())
    peak = next(x for x in Path("/proc/self/status").read_text().split("\n") if "VmHWM" in x)
    print()
    print(json.dumps({"seconds": seconds, "peak": int(peak.split()[1]) * 1024, "error": error}))


if __name__ == "__main__":
    main(*sys.argv[1:])
