"""Memory: GPTQ over a model of 1.1 B parameters, streamed from its shards.

A random Llama of TinyLlama's shape in bfloat16 (2.2 GB, 13 shards, written shard by shard) is
quantized at 4 bits with 4 windows of 512 tokens and measured over the first 8 windows of
WikiText-2, by ``qbench run`` with and without ``--stream``. Sampled every 15 ms from outside:
RssAnon, the anonymous resident memory of the process (pages mapped from files are no cost: the
system drops them when it wants to). What ``import torch`` alone costs is taken off.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import Report, Table
from benchmarks.models import LLAMA_1B, llama_fields, make_sharded

BAR = 1.0
"""GB above what torch costs."""
INTERVAL = 0.015
TEXTS = {"calibration": "corpora/wikitext-2/wiki.valid.raw", "test": "tasks/wikitext2/test.jsonl"}
QUICK = llama_fields(256, 4, 768, 8, 32000, num_key_value_heads=4)
_VOLATILE = ("seconds", "wall_seconds", "peak_memory_bytes", "environment", "created", "notes")
"""Fields of records that say how a run went and not what it found."""


@dataclass
class Watched:
    """What was seen of one process."""

    seconds: float
    anonymous: int
    """Largest RssAnon in bytes."""
    resident: int
    """Largest VmRSS in bytes."""
    output: str
    code: int


def status_bytes(process: int) -> dict[str, int]:
    """RssAnon and VmRSS of a process in bytes; empty once it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.startswith(("RssAnon:", "VmRSS:")))
    return {field[0].rstrip(":"): int(field[1]) * 1024 for field in fields}


def watch(command: list[str], threads: int) -> Watched:
    """Run a command and sample its memory until it ends."""
    variables = common.child_environment(threads)
    with tempfile.TemporaryFile("w+") as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=variables, cwd=common.ROOT
        )
        anonymous = resident = 0
        while process.poll() is None:
            seen = status_bytes(process.pid)
            anonymous = max(anonymous, seen.get("RssAnon", 0))
            resident = max(resident, seen.get("VmRSS", 0))
            time.sleep(INTERVAL)
        seconds = time.perf_counter() - started
        output.seek(0)
        return Watched(seconds, anonymous, resident, output.read(), process.returncode)


def run_command(options: Any, folder: Path, results: Path, stream: bool) -> list[str]:
    """``qbench run`` as a user types it."""
    command = [*common.qbench_command(), "run", str(folder), *(["--stream"] * stream)]
    command += ["--baseline", "gptq", "--scheme", "W4A16g128", "--dtype", "bfloat16"]
    command += ["--calibration", str(options.data / TEXTS["calibration"])]
    command += ["--nsamples", "4", "--seqlen", str(options.seqlen), "--tasks", "wikitext2"]
    command += ["--limit", "8", "--max-length", str(options.max_length)]
    return [*command, "--data", str(options.data), "--results", str(results)]


def numbers(results: Path) -> dict[str, Any]:
    """Everything the records found, by file name: metrics, layer reports, keys."""
    found = {}
    for path in sorted(results.rglob("*.json")):
        found[path.name] = _steady(json.loads(path.read_text()))
    return found


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _steady(v) for k, v in value.items() if k not in _VOLATILE}
    return [_steady(v) for v in value] if isinstance(value, list) else value


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Places where two values differ; the details of a task say how it was batched, and may."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [k for k in {**one, **other} if k != "details"]
        return [d for k in keys for d in differences(one.get(k), other.get(k), f"{place}/{k}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{place}/{i}")]
    return [] if one == other else [place]


def measure(options: Any) -> dict[str, Any]:
    """The baseline of torch, the streamed run, the run in memory."""
    fields = QUICK if options.quick else LLAMA_1B
    name = "llama-quick-sharded" if options.quick else "llama-1b-sharded"
    folder = make_sharded(options.work, name, fields, options.data)
    pause = "import torch, time; torch.ones(2, 2) @ torch.ones(2, 2); time.sleep(0.5)"
    torch_only = watch([sys.executable, "-c", pause], options.threads)
    found: dict[str, Any] = {"torch": vars(torch_only), "runs": {}}
    with tempfile.TemporaryDirectory() as place:
        for name, stream in (("streamed", True), ("in memory", False)):
            results = Path(place) / name.replace(" ", "-")
            seen = watch(run_command(options, folder, results, stream), options.threads)
            found["runs"][name] = vars(seen) | {"numbers": numbers(results)}
            state = "done" if seen.code == 0 else f"failed: {seen.output.strip()[-200:]}"
            print(f"{name}: {seen.seconds:.0f} s, {state}", file=sys.stderr, flush=True)
    return found


def table(found: dict[str, Any]) -> Table:
    """Peaks above torch, and whether both ways found the same."""
    columns = ["", "wall", "peak RssAnon", "above torch", "bar", "peak RSS"]
    made = Table("GPTQ W4A16g128, 4 windows calibrated, 8 evaluated", columns)
    base = found["torch"]["anonymous"]
    gigabytes = 10**9
    made.rows.append(["import torch", "", f"{base / gigabytes:.2f} GB", "", "", ""])
    for name, run in found["runs"].items():
        if run["code"]:
            words = [x for x in run["output"].splitlines() if x.strip()] or ["no message"]
            made.rows.append([name, f"failed: {words[-1].strip(' │')}", "", "", "", ""])
            continue
        above = (run["anonymous"] - base) / gigabytes
        bar = f"< {BAR:g} GB {'met' if above < BAR else 'missed'}" if name == "streamed" else ""
        cells = [f"{run['seconds']:.0f} s", f"{run['anonymous'] / gigabytes:.2f} GB"]
        resident = f"{run['resident'] / gigabytes:.2f} GB"
        made.rows.append([name, *cells, f"{above:.2f} GB", bar, resident])
    runs = list(found["runs"].values())
    if all(run["code"] == 0 for run in runs):
        differ = differences(runs[0]["numbers"], runs[1]["numbers"])
        layers = sum(len(v.get("layers", [])) for v in runs[0]["numbers"].values())
        verdict = f"differ in {', '.join(differ[:5])}" if differ else "are equal to the last bit"
        made.notes = [f"Keys, metrics and {layers} layer reports of both runs {verdict}."]
    return made


def main() -> None:
    given = common.parser(__doc__ or "", repeats=1)
    given.add_argument("--seqlen", type=int, default=512, help="of calibration windows")
    given.add_argument("--max-length", type=int, default=2048, help="of evaluated windows")
    options = given.parse_args()
    if absent := common.missing(options, list(TEXTS.values()), "memory"):
        sys.exit(absent)
    if options.quick:
        options.seqlen, options.max_length = 128, 256
    title = "Memory: streaming 1.1 B parameters"
    report = Report("memory", title, str(options.threads))
    found = measure(options)
    report.add(table(found))
    for run in found["runs"].values():
        run.pop("output")
    report.measurements = found
    report.save(options)


if __name__ == "__main__":
    main()
