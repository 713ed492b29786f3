"""``qbench reproduce NAME --dry-run``: what would be downloaded, what it takes, what is stored.

Nothing is downloaded and nothing is asked of the network. Where the weights are on this machine
(named, or in the Hub's cache) the plan is the ordinary one, with every cell looked up in the store.
Where they are not, sizes and times come from the configuration that the preset knows, and the
lengths of the texts from a table here, so they are estimates of estimates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench.errors import QBenchError
from qbench.evaluation.corpora import CORPORA
from qbench.evaluation.tasks import B158
from qbench.models.files import weight_files
from qbench.registry import load_baseline
from qbench.reproduction.collecting import reads_data, tasks_of
from qbench.reproduction.presets import CheckpointFacts, Preset, Row
from qbench.reproduction.running import Reproduction, Request
from qbench.scheme import Scheme
from qbench.study.cells import Cell
from qbench.study.costs import Estimate, Work, estimate
from qbench.study.planning import duration, gib, passes, plan_lines, scaled, uses_hessians
from qbench.study.speed import Speed, measure
from qbench.study.store import slug

if TYPE_CHECKING:
    from qbench.study.shapes import ModelShape

_STORED_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
_PACKED = 0.25
"""Bytes of a ternary weight, four to a byte."""


@dataclass(frozen=True)
class Text:
    """About how much a task or corpus is."""

    tokens: float
    """That an evaluation scores or reads, in thousands, with a vocabulary of 50,000."""
    megabytes: float
    """Of the download."""


TEXTS = {
    "wikitext2": Text(290, 13),
    "ptb-new": Text(110, 6),
    "c4-new": Text(524, 40),
    "b158": Text(22_000, 53),
    "wikitext": Text(300, 13),
    "lambada_openai": Text(440, 2),
    "piqa": Text(170, 6),
    "arc_easy": Text(330, 1),
    "arc_challenge": Text(210, 1),
    "storycloze_2016": Text(230, 1),
    "storycloze_2018": Text(190, 1),
    "boolq": Text(980, 9),
    "openbookqa": Text(35, 1),
    "winogrande": Text(70, 4),
    "hellaswag": Text(3_600, 72),
    "wsc285": Text(14, 1),
}
"""Whole sets, all options of every question."""
_CALIBRATION = {"c4": 320, "pile-val": 470}
"""Megabytes of the file that calibration windows are drawn from."""


def reproduction_lines(preset: Preset, request: Request) -> Iterator[str]:
    """The plan as text.

    Raises:
        QBenchError: for a device, row or task there is not, or weights of another kind.
    """
    family, facts = preset.family, preset.facts
    yield f"{preset.name} · {family.paper}"
    yield from _settings(preset, request)
    named = request.checkpoint is not None
    folder = None if named else cached(preset.target.hub, request.allow_pickle)
    yield _weights(preset, request, folder)
    yield from _data(preset, request)
    if named or folder is not None:
        yield from _known(preset, request, folder)
    elif facts is not None:
        yield from _estimated(preset, facts, request)
    for point in family.ambiguous:
        yield f"  left open by the paper: {point}"
    for row in family.not_expressed:
        yield f"  not here: {row}"


def cached(hub: str | None, allow_pickle: bool = False) -> str | None:
    """The folder of a checkpoint in the Hub's cache, if its weights are all there."""
    from huggingface_hub import snapshot_download

    if hub is None:
        return None
    try:
        folder = Path(snapshot_download(hub, local_files_only=True))
    except Exception:  # the Hub client raises many kinds, all meaning "not there"
        return None
    found = weight_files(folder) or (weight_files(folder, True) if allow_pickle else [])
    return str(folder) if found and all(path.is_file() for path in found) else None


def stored_bytes(facts: CheckpointFacts, shape: ModelShape | None = None) -> float:
    """Bytes of a checkpoint's files, from the number of its weights."""
    count = facts.parameters * 1e6
    if facts.stored in _STORED_BYTES:
        return count * _STORED_BYTES[facts.stored]
    inside = count if shape is None else float(shape.in_blocks)
    return inside * _PACKED + (count - inside) * _STORED_BYTES["bfloat16"]


def _settings(preset: Preset, request: Request) -> Iterator[str]:
    family, text = preset.family, preset.family.calibration
    if any(reads_data(row) for row in preset.rows):
        yield (
            f"  calibration: {text.source}, {text.nsamples} windows of {text.seqlen} tokens, "
            f"seed {text.seed}"
        )
    seeds = request.seeds or family.seeds
    if seeds > 1 and any(_draws(row) for row in preset.rows):
        yield f"  rows that draw at random are run with {seeds} seeds, from {family.seed} on"
    yield (
        f"  computed in {family.dtype} by the paper; context {family.max_length}, encoding "
        f"{family.encoding}"
    )
    if family.weights == "released" and not preset.is_trained:
        allowed = family.tolerance
        yield (
            f"  gate: the full-precision row within {allowed.perplexity:g} % of a published "
            f"perplexity and {allowed.accuracy:g} point(s) of an accuracy, or nothing is quantized"
        )


def _weights(preset: Preset, request: Request, local: str | None) -> str:
    hub, facts = preset.target.hub, preset.facts
    if request.checkpoint is not None:
        return f"  weights: {request.checkpoint}, in place of {hub}; nothing to download"
    if facts is None:
        return "  weights: never released"
    if local is not None:
        return f"  weights: {hub}, in the Hub's cache; nothing to download"
    size = scaled(stored_bytes(facts, shape_from(facts)), "GB", "MB")
    marks = [f"about {size} to download", f"stored in {facts.stored}"]
    marks += ["the Hub asks for an agreement first"] if facts.gated else []
    if facts.files == "bin" and not request.allow_pickle:
        marks.append("pickled where no safetensors were added since: needs --allow-pickle")
    marks += [facts.note] if facts.note else []
    return f"  weights: {hub}, " + "; ".join(marks)


def _data(preset: Preset, request: Request) -> Iterator[str]:
    """Where every text would come from."""
    tasks = _tasks(preset, request)
    needs = {task: (_folder(task), TEXTS[task].megabytes) for task in tasks if task != B158}
    if B158 in tasks:
        needs |= {"c4, validation": ("c4", 40), "wikitext2": ("wikitext2", 13)}
    if any(reads_data(row) for row in preset.rows):
        source = preset.family.calibration.source
        needs[f"{source} for calibration"] = (source, _CALIBRATION[source])
    absent = [
        f"{name} (about {megabytes:g} MB)"
        for name, (folder, megabytes) in needs.items()
        if not _has(request.data, folder)
    ]
    if not absent:
        yield f"  data: everything in {request.data}"
    else:
        yield f"  data: from the Hub or its cache: {', '.join(absent)}"
    if any(task.startswith("storycloze") and not _has(request.data, task) for task in tasks):
        yield "    StoryCloze is handed out by its authors alone: without it its column stays empty"


def _tasks(preset: Preset, request: Request) -> list[str]:
    measures = Reproduction(preset, request, None).measures  # type: ignore[arg-type]
    return list(dict.fromkeys(task for measure in measures for task in tasks_of(measure)))


def _folder(task: str) -> str:
    """The folder of a task in a data folder."""
    definition = CORPORA.get(task)
    return (definition.folder if definition else None) or task


def _has(data: Path | None, folder: str) -> bool:
    return data is not None and any(
        any((data / kind / folder).glob("*")) for kind in ("tasks", "corpora")
    )


def _known(preset: Preset, request: Request, folder: str | None) -> Iterator[str]:
    """The ordinary plan, where the weights are here."""
    found = Reproduction.of(preset, request, folder)
    try:
        bench = found.bench
    except QBenchError as error:
        yield f"  not looked up: {error}"
        return
    for departure in found.departures():
        yield f"  not as in the paper: {departure}"
    yield from plan_lines([(bench, cell) for _, cells in found.cells for cell in cells])


def _estimated(preset: Preset, facts: CheckpointFacts, request: Request) -> Iterator[str]:
    """Memory and time where the weights are still to come."""
    stored = sum(
        path.is_dir() for path in request.results.glob(f"{slug(preset.target.hub or '')}/*/*")
    )
    if stored:
        yield f"  {stored} runs of that name are stored; once the weights are here they are known"
    shape = shape_from(facts)
    found = Reproduction(preset, request, None)  # type: ignore[arg-type]
    tasks = _tasks(preset, request)
    tokens = 1000 * sum(TEXTS[task].tokens for task in tasks)
    dtype = found.dtype
    speed = measure(shape.hidden, dtype, request.device, [])
    total, width = 0.0, max(len(row.name) for row in found.rows)
    for row in found.rows:
        cell = Cell.of(load_baseline(row.baseline, row.fields), Scheme.parse(row.scheme))
        cost = estimate(shape, _work(preset, facts, shape, cell, tokens, dtype), speed)
        seeds = (request.seeds or preset.family.seeds) if _draws(row) else 1
        total += seeds * cost.seconds
        yield f"  {row.name:{width}}  {_cost(cost, seeds)}"
    yield _summary(total, tokens, tasks, speed)


def _cost(cost: Estimate, seeds: int) -> str:
    times = f"{seeds} x " if seeds > 1 else ""
    return (
        f"memory about {gib(cost.memory)}, streamed {gib(cost.streamed_memory)}, "
        f"{times}about {duration(cost.seconds)}"
    )


def _summary(total: float, tokens: float, tasks: list[str], speed: Speed) -> str:
    return (
        f"  about {duration(total)} on this machine (products at {speed.products / 1e9:.0f} "
        f"GFLOP/s, {speed.threads} thread{'s' if speed.threads > 1 else ''}), downloads not "
        f"counted; {tokens / 1e6:.2g} M tokens are evaluated per row of "
        f"{', '.join(tasks)}; --tasks and --rows leave some out"
    )


def _work(
    preset: Preset,
    facts: CheckpointFacts,
    shape: ModelShape,
    cell: Cell,
    tokens: float,
    dtype: str,
) -> Work:
    text = preset.family.calibration
    quantizes = not cell.changes_nothing
    reads = quantizes and passes(cell) > 0
    return Work(
        dtype=dtype,
        stored_bytes=int(stored_bytes(facts, shape)),
        is_cast=facts.stored != dtype,
        quantizes=quantizes,
        nsamples=text.nsamples if reads else 0,
        seqlen=text.seqlen if reads else 0,
        hessians=reads and uses_hessians(cell),
        passes=passes(cell) if reads else 0,
        evaluated=int(tokens),
        longest=preset.family.max_length or 2048,
    )


def shape_from(facts: CheckpointFacts) -> ModelShape:
    """The shapes of a checkpoint that is not here."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from qbench.models.checks import quiet
    from qbench.study.shapes import shape_of

    with torch.device("meta"), quiet():
        config: Any = AutoConfig.for_model(facts.model_type, **facts.config)
        return shape_of(AutoModelForCausalLM.from_config(config))


def _draws(row: Row) -> bool:
    return not row.is_full_precision and load_baseline(row.baseline).instance.is_random
