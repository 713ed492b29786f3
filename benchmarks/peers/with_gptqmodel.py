"""gptqmodel's GPTQ; run by the python of its own environment.

    python with_gptqmodel.py CHECKPOINT WINDOWS.safetensors

Prints a line of JSON: seconds of the quantization (packing included, it cannot be told apart),
peak resident bytes.
"""

import json
import sys
import time
from pathlib import Path

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from safetensors.torch import load_file


def main(checkpoint: str, windows_file: str) -> None:
    """Load, quantize, report."""
    windows = load_file(windows_file)["windows"].tolist()
    rows = [{"input_ids": w, "attention_mask": [1] * len(w)} for w in windows]
    wanted = QuantizeConfig(
        bits=4, group_size=128, sym=False, desc_act=False, damp_percent=0.01, device="cpu"
    )
    model = GPTQModel.load(checkpoint, wanted, dtype=torch.float32)  # its own choice is bfloat16
    started = time.perf_counter()
    model.quantize(rows, batch_size=1)
    seconds = time.perf_counter() - started
    peak = next(x for x in Path("/proc/self/status").read_text().split("\n") if "VmHWM" in x)
    print()
    print(json.dumps({"seconds": seconds, "peak": int(peak.split()[1]) * 1024, "error": None}))


if __name__ == "__main__":
    main(*sys.argv[1:])
