"""From the long table to what a row of a table, or a point of a plot, shows.

An entry is one run with one number per column. Where a run was measured several times on one task
(another limit, other shots) the largest measurement is shown and the others are told in a note, so
nothing is mixed in silence. :func:`deviations` says how a number was measured differently from the
rest of its column.

Left out on purpose: how numbers are written (:mod:`qbench.tables.sheet`).
"""

from __future__ import annotations

import fnmatch
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from qbench.comparison.circumstances import COLUMNS, told
from qbench.comparison.frame import RUN_COLUMNS, TASK_COLUMNS
from qbench.comparison.headings import task_order
from qbench.errors import QBenchError, unknown
from qbench.scheme import Scheme

if TYPE_CHECKING:
    from pandas import DataFrame

Key = tuple[str, str]
"""(task, protocol) of a perplexity, (task, "") of an accuracy: what shares a column. An agreement
has two: (task, protocol) for the divergence, (task, protocol/top-1) for the share of tokens."""
TOP_1 = "/top-1"
_AGREEMENT = "agreement"

CONDITIONS = ("protocol", "metric", "num_fewshot", "fewshot_seed", "limit", "encoding", "dtype")
_IDENTITIES = {"definition": "another task definition", "data": "other data"}
_CONDITIONS = (*CONDITIONS, "max_length", "task_version", *_IDENTITIES)


@dataclass(frozen=True)
class Measured:
    """The number one cell shows; ``value`` is None where the measurement failed."""

    task: str
    kind: str
    """accuracy, perplexity, divergence (from full precision, in nats) or agreement (with it)."""
    metric: str
    value: float | None
    stderr: float | None = None
    n_items: int | None = None
    chance: float | None = None
    conditions: dict[str, Any] = field(default_factory=dict)
    """How it was measured; empty for a published number."""
    notes: tuple[str, ...] = ()
    also: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    """Every metric of the same measurement: name -> (value, standard error)."""
    parts: tuple[Measured, ...] = ()
    """What a mean is over."""
    draws: tuple[float, ...] = ()
    """The number of every seed, where the value is their mean (:mod:`qbench.comparison.seeds`)."""
    runs: tuple[str, ...] = ()
    """In a row of several seeds, the runs that have this number."""

    @property
    def lower_is_better(self) -> bool:
        """Whether a smaller number is a better one."""
        return self.kind in ("perplexity", "divergence")


@dataclass(frozen=True)
class Entry:
    """One run, or one row that was published or is computed (``source``)."""

    facts: dict[str, Any]
    """The run's columns of the long table."""
    method: str
    cells: dict[Key, Measured]
    source: str = "measured"
    series: str = ""
    """The method name that schemes share: which points of a plot belong together."""
    name: str = ""
    """What notes call the row: method and widths, with the whole scheme where these are shared."""

    @property
    def full_precision(self) -> bool:
        """Whether this is the row the others are compared with."""
        scheme = self.facts.get("scheme")
        return scheme is not None and not self.trained and Scheme.parse(scheme).is_identity

    @property
    def trained(self) -> bool:
        """Whether the low bit width was trained."""
        return bool(self.facts.get("trained"))

    @property
    def as_stored(self) -> bool:
        """Whether the checkpoint brought its width: trained at it, or quantized elsewhere."""
        return self.trained or bool(self.facts.get("quantized_elsewhere"))

    @property
    def mixed(self) -> bool:
        """Whether some matrices have a scheme of their own, so that W/A does not say it all."""
        return bool(self.facts.get("overrides"))

    @property
    def scheme_text(self) -> str:
        """The resolved scheme without its widths: "w=channel,grid=asym"; "" where nothing is."""
        scheme = self.facts.get("scheme")
        if scheme is None or Scheme.parse(scheme).is_identity:
            return ""
        return str(scheme).removeprefix(self.facts["label"]).lstrip(":;")

    @property
    def ptq(self) -> bool:
        """Whether a finished model was quantized: the rows that compete for "best"."""
        return self.source == "measured" and not (self.trained or self.full_precision)


def select(
    table: DataFrame,
    checkpoints: Sequence[str] | None = None,
    baselines: Sequence[str] | None = None,
    schemes: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    num_fewshot: int | None = None,
) -> DataFrame:
    """The part of the long table that was asked for; every name may be a shell-style pattern.

    Raises:
        QBenchError: for a pattern that matches nothing, naming what there is.
    """
    for column, patterns in (("checkpoint", checkpoints), ("baseline", baselines)):
        if patterns:
            table = table[_matches(table[column], patterns, column)]
    if schemes:
        known = set(table["label"]) | set(table["scheme"])
        chosen = _matching(known, schemes, "scheme")
        table = table[table["label"].isin(chosen) | table["scheme"].isin(chosen)]
    wanted = table["task"].notna()
    if tasks:
        wanted &= _matches(table["task"], tasks, "task")
    if num_fewshot is not None:
        wanted &= (table["num_fewshot"] == num_fewshot).fillna(False)
    if table.empty or not (wanted.any() or table["task"].isna().all()):
        raise QBenchError("nothing that is stored passes all filters together; drop one of them")
    return table[wanted | table["task"].isna()]


def entries(table: DataFrame, metric: str = "acc") -> list[Entry]:
    """One entry per run of the long table, in its order, each with one number per column."""
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in table.astype(object).where(table.notna(), None).to_dict("records"):
        runs[row["run"]].append({str(name): value for name, value in row.items()})
    kinds = {
        (row["task"], row["protocol"]): row["kind"]
        for rows in runs.values()
        for row in rows
        if row["kind"]
    }
    found = []
    for rows in runs.values():
        facts = {name: rows[0][name] for name in RUN_COLUMNS}
        found.append(Entry(facts, str(facts["baseline"]), _cells(rows, metric, kinds)))
    return told(named(found))


def accuracy_keys(entries: Sequence[Entry]) -> list[Key]:
    """The accuracy columns of measured rows, in the papers' order."""
    keys = {key for e in entries if e.source == "measured" for key in e.cells if not key[1]}
    return sorted(keys, key=lambda key: task_order(key[0]))


def perplexity_keys(entries: Sequence[Entry]) -> list[Key]:
    """The perplexity columns: one per text and protocol."""
    keys = {key for entry in entries for key in entry.cells if key[1]}
    return sorted(key for key in keys if not is_agreement(key))


def agreement_keys(entries: Sequence[Entry]) -> list[Key]:
    """The columns that compare with full precision, two per text and protocol."""
    return sorted({key for entry in entries for key in entry.cells if is_agreement(key)})


def is_agreement(key: Key) -> bool:
    """Whether a column compares with full precision."""
    return key[1].startswith(_AGREEMENT)


def by_size(entry: Entry) -> tuple[int, str]:
    """Sort key of checkpoints: smallest first, unknown sizes before."""
    return entry.facts["parameters"] or 0, entry.facts["checkpoint"]


def common(measured: Iterable[Measured]) -> dict[str, Any]:
    """For each condition, the value most numbers of a column share."""
    numbers = [number for number in measured if number.conditions]
    return {
        name: Counter(number.conditions.get(name) for number in numbers).most_common(1)[0][0]
        for name in _CONDITIONS
        if numbers
    }


def deviations(measured: Measured, usual: dict[str, Any]) -> str:
    """How this number was measured differently from the rest of its column; "" if it was not."""
    parts = []
    for name in _CONDITIONS:
        if measured.conditions and measured.conditions.get(name) != usual.get(name):
            parts.append(say(name, measured.conditions.get(name)))
    return ", ".join(parts)


def mean_of(numbers: Sequence[Measured]) -> Measured:
    """The plain mean of several tasks; its error assumes that their items are independent."""
    values = [number.value for number in numbers if number.value is not None]
    errors = [number.stderr for number in numbers if number.stderr is not None]
    complete = len(errors) == len(numbers)
    chances = [number.chance for number in numbers if number.chance is not None]
    metrics = sorted({number.metric for number in numbers})
    seeds = {(number.runs, len(number.draws)) for number in numbers}
    draws = [sum(own) / len(numbers) for own in zip(*(n.draws for n in numbers), strict=False)]
    return Measured(
        task="mean of " + ", ".join(number.task for number in numbers),
        kind=numbers[0].kind,
        metric="/".join(metrics),
        value=sum(values) / len(values),
        stderr=math.hypot(*errors) / len(numbers) if complete else None,
        chance=sum(chances) / len(chances) if len(chances) == len(numbers) else None,
        parts=tuple(numbers),
        draws=tuple(draws) if len(seeds) == 1 else (),
    )


def say(condition: str, value: Any) -> str:
    """A condition in words: "4-shot", "limit=100", "metric acc_norm"."""
    if condition in _IDENTITIES:
        return _IDENTITIES[condition]
    if condition == "num_fewshot":
        return f"{value}-shot"
    if condition == "limit":
        return "no limit" if value is None else f"limit={value}"
    words = {"fewshot_seed": "few-shot seed", "max_length": "context", "task_version": "version"}
    return f"{words.get(condition, condition)} {value}"


def _cells(
    rows: list[dict[str, Any]], metric: str, kinds: dict[tuple[str, str], str]
) -> dict[Key, Measured]:
    """The number of each column: the largest measurement, the others told in a note."""
    records: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["task"] is not None:
            own = [row[name] for name in TASK_COLUMNS if name not in ("metric", "value", "stderr")]
            records[tuple(own)].append(row)
    candidates: dict[Key, list[tuple[tuple[Any, ...], Measured]]] = defaultdict(list)
    for same in records.values():
        also = {r["metric"]: (r["value"], r["stderr"]) for r in same if r["value"] is not None}
        for kind, protocol, row in _shown(same, metric, kinds):
            # finished before failed, then the most items, the fewest shots, the newest
            rank = (row["task_status"] == "ok", row["n_items"] or 0, -row["num_fewshot"])
            measured = replace(_measured(row, kind), also=also)
            key = (row["task"], protocol)
            candidates[key].append(((*rank, row["task_created"] or ""), measured))
    return {key: _first(sorted(c, key=lambda pair: pair[0])) for key, c in candidates.items()}


def _first(candidates: list[tuple[tuple[Any, ...], Measured]]) -> Measured:
    *others, chosen = [measured for _, measured in candidates]
    notes = []
    for other in others:
        value = "failed" if other.value is None else f"{other.value:.4g}"
        how = deviations(other, chosen.conditions) or "older"
        notes.append(f"also stored for {chosen.task}, not shown: {value} ({how})")
    return replace(chosen, notes=(*chosen.notes, *notes))


def _shown(
    rows: list[dict[str, Any]], metric: str, kinds: dict[tuple[str, str], str]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The rows of one measurement that are shown: kind, protocol in the key, row."""
    row = _wanted(rows, metric)
    protocol = row["protocol"]
    assumed = "accuracy" if protocol == "lm-eval" else "perplexity"
    assumed = _AGREEMENT if protocol.startswith(_AGREEMENT) else assumed
    kind = row["kind"] or kinds.get((row["task"], protocol), assumed)
    if kind != _AGREEMENT:
        yield kind, protocol if kind == "perplexity" else "", row
        return
    yield "divergence", protocol, _wanted(rows, "kl_divergence")
    yield "agreement", protocol + TOP_1, _wanted(rows, "top1_agreement")


def _wanted(rows: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    """The row of the wanted metric, or of the nearest one that was measured."""
    by_name = {row["metric"]: row for row in rows}
    order = [metric, "acc", "perplexity", "word_perplexity"]
    if rows[0]["kind"] == "perplexity":
        order = ["word_perplexity", "perplexity", "byte_perplexity"]
    return next((by_name[name] for name in order if name in by_name), rows[0])


def _measured(row: dict[str, Any], kind: str) -> Measured:
    failed = row["task_status"] == "failed"
    error = (row["task_error"] or "no reason was stored").splitlines()[0]
    return Measured(
        task=row["task"],
        kind=kind,
        metric=row["metric"] or "",
        # None became of NaN on the way here, and a finished measurement always has a number
        value=None if failed else float("nan") if row["value"] is None else row["value"],
        stderr=row["stderr"],
        n_items=row["n_items"],
        chance=row["chance"],
        conditions={} if failed else {name: row[name] for name in (*_CONDITIONS, *COLUMNS)},
        notes=(f"{row['task']} failed: {error}",) if failed else (),
    )


def named(found: list[Entry]) -> list[Entry]:
    """Give each measured entry, called by its baseline, a name that tells it apart from others."""
    settings = [_settings(entry.facts) for entry in found]
    varying: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for entry, setting in zip(found, settings, strict=True):
        for name, value in setting.items():
            varying[entry.method][name].add(value)
    told = []
    for entry, setting in zip(found, settings, strict=True):
        differing = [
            f"{name}={value}"
            for name, value in setting.items()
            if len(varying[entry.method][name]) > 1
        ]
        method = " ".join([entry.method, *differing])
        method = "full precision" if entry.full_precision else method
        method = "trained" if entry.trained else method
        told.append(replace(entry, method=method, series=method))
    return _told_apart(told)


def _settings(facts: dict[str, Any]) -> dict[str, str]:
    """What the user chose for a method, beside the scheme; what was not needed is left out."""
    chosen = dict(json.loads(facts["hyperparameters"]))
    for name in ("source", "nsamples", "seqlen", "seed"):
        chosen[f"calibration.{name}"] = facts[f"calibration_{name}"]
    chosen |= {"seed": facts["seed"], "version": facts["baseline_version"]}
    return {name: str(value) for name, value in chosen.items() if value is not None}


def _told_apart(found: list[Entry]) -> list[Entry]:
    """Add to rows that would read the same whatever else differs between them."""
    named: dict[tuple[str, ...], list[Entry]] = defaultdict(list)
    for entry in found:
        named[entry.facts["checkpoint"], entry.facts["label"], entry.method].append(entry)
    told = {}
    for same in named.values():
        schemes: dict[str, list[Entry]] = defaultdict(list)
        for entry in same:
            schemes[entry.scheme_text].append(entry)
        for alike in schemes.values():
            extra = _differences([entry.facts for entry in alike])
            for entry, words in zip(alike, extra, strict=True):
                method = " ".join([entry.method, *words])
                widths = entry.facts["scheme" if len(schemes) > 1 else "label"]
                told[id(entry)] = replace(entry, method=method, name=f"{method} {widths}")
    return [told[id(entry)] for entry in found]


def _differences(rows: list[dict[str, Any]]) -> list[list[str]]:
    """For each of some rows that read the same, what else it has that another has not."""
    hidden = {"quantization_dtype": "dtype", "calibration_tokens": "calibration.tokens"}
    hidden |= {"weights": "weights", "baseline_source": "source", "run": "run"}
    differing = [n for n in hidden if len({str(facts[n]) for facts in rows}) > 1]
    if set(differing) - {"run"}:
        differing.remove("run")  # the folder name is the last resort
    return [
        [f"{hidden[n]}={_shortened(str(facts[n]), rows, n)}" for n in differing] for facts in rows
    ]


def _shortened(value: str, rows: list[dict[str, Any]], name: str) -> str:
    """The end of a hash or path, or all of it where the ends are alike."""
    values = {str(facts[name]) for facts in rows}
    return value[-24:] if len({other[-24:] for other in values}) == len(values) else value


def _matches(column: Any, patterns: Sequence[str], what: str) -> Any:
    return column.isin(_matching(set(column.dropna()), patterns, what))


def _matching(known: set[str], patterns: Sequence[str], what: str) -> set[str]:
    chosen: set[str] = set()
    for pattern in patterns:
        hits = {n for n in known if n == pattern or fnmatch.fnmatchcase(n, pattern)}
        if not hits:
            raise unknown(what, pattern, known)
        chosen |= hits
    return chosen
