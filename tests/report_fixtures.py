"""A store with items, made up to be known by heart, and readers of the page made of it."""

from __future__ import annotations

import base64
import json
import re
import shutil
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from study_fixtures import add, quantization, task

from qbench.evaluation.data import hash_json
from qbench.record import CalibrationSpec, LayerReport, Metric
from qbench.study.store import Store

N = 60
"""Questions; full precision answers the first 48 right."""
RIGHT = 48
HOSTILE = '</script><img src=x onerror="window.pwned=1"><script>window.pwned=1</script>'


def questions(hostile: bool = False) -> list[dict[str, Any]]:
    """Rows of PIQA: the right answer is the first of two."""
    return [
        {
            "goal": f"How is thing {i} done? {HOSTILE if hostile else ''}",
            "sol1": f"As it should be, {i} times. {HOSTILE if hostile else ''}",
            "sol2": f"Otherwise, {i} times.",
            "label": 0,
        }
        for i in range(N)
    ]


def data_folder(root: Path, hostile: bool = False) -> Path:
    """A data folder with these questions."""
    path = root / "tasks" / "piqa" / "validation.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = questions(hostile)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return root


def items(right: set[int], margin: float = 1.0, hostile: bool = False) -> dict[str, list[Any]]:
    """Stored items of a model that answers these questions right, each by ``margin`` nats."""
    columns: dict[str, list[Any]] = {}
    for i, row in enumerate(questions(hostile)):
        for option in (0, 1):
            wins = (option == 0) == (i in right)
            entry = {
                "doc_id": i,
                "doc_hash": hash_json([row])[:16],
                "option": option,
                "loglikelihood": -10.0 if wins else -10.0 - margin - i / 100,
                "n_tokens": 5,
                "n_characters": 20,
                "is_greedy": False,
                "gold": option == 0,
            }
            for name, value in entry.items():
                columns.setdefault(name, []).append(value)
    return columns


def known_store(root: Path, hostile: bool = False) -> Store:
    """One checkpoint in full precision, at W4A16 with two methods and at W2A16 with one; a twin
    that was trained; a run that failed, one that is not applicable, one that diverged.

    Of the 60 questions full precision answers 0-47 right, "gptq" at four bits 1-48 (one lost, one
    won), "absmax" at four bits 0-45 (two lost), "gptq" at two bits 0-23 (24 lost).
    """
    name = f"model {HOSTILE}" if hostile else "model"
    store = Store(root)
    calibration = CalibrationSpec(source="c4", nsamples=8, seqlen=64, seed=0)
    layers = [
        LayerReport(
            name=f"model.layers.{block}.{kind}",
            shape=(8, 4),
            scheme="W4A16",
            relative_error=0.001 * (block + 1),
            proxy_loss=0.0001 * (block + 1),
            stored_bits=8 * 4 * 4.5,
            damping=0.01,
            fallback="not positive definite" if (block, kind) == (1, "up") else None,
            seconds=0.1,
        )
        for block in range(3)
        for kind in ("up", "down")
    ]
    environment = {"qbench": "0.1.0", "torch": "2.13.0", "device": "cpu"}
    rows = [
        ("none", "W16A16", set(range(48)), [], 10.0),
        ("gptq", "W4A16:w=channel,grid=asym", set(range(1, 49)), layers, 10.5),
        ("absmax", "W4A16:w=tensor,grid=restricted", set(range(46)), layers[:2], 12.0),
        ("gptq", "W2A16:w=channel,grid=asym", set(range(24)), layers[:2], float("inf")),
    ]
    for baseline, scheme, right, reports, perplexity in rows:
        record = quantization(
            name,
            f"{baseline}{HOSTILE}" if hostile and baseline == "gptq" else baseline,
            scheme,
            parameters=1_000_000,
            parameters_of={"percdamp": 0.01} if baseline == "gptq" else {},
            calibration=calibration if baseline == "gptq" else None,
            layers=reports,
            effective_bits=float(scheme[1]) + 0.1 if scheme[1] != "1" else None,
            environment=environment,
        )
        add(store, record, perplexity={"wikitext2@gptq-2048": perplexity})
        accuracy = len(right) / N
        measured = task(record, "piqa", {"acc": accuracy, "acc_norm": accuracy}, n_items=N)
        store.save_task(name, record.key, measured, items(right, hostile=hostile))
    for scheme, status, error in (
        ("W2A16:w=channel,grid=rms", "failed", "the hessian is not finite\nat layer 3"),
        ("W1A8:grid=sign,agrid=restricted", "not_applicable", "QuIP quantizes weights only"),
    ):
        fields = {"status": status, "error": error, "parameters": 1_000_000}
        store.save_quantization(quantization(name, "quip", scheme, **fields))
    trained = quantization("twin", scheme="W1A8:grid=sign,agrid=bitnet", trained=True,
                           parameters=1_000_000, environment=environment)  # fmt: skip
    store.save_quantization(trained)
    measured = task(trained, "piqa", {"acc": 42 / N, "acc_norm": 42 / N}, n_items=N)
    store.save_task("twin", trained.key, measured, items(set(range(42)), hostile=hostile))
    return store


def planted_difference(
    root: Path, lost: int, won: int, n: int = 300, right: int | None = None
) -> Store:
    """Full precision and one method on ``n`` questions, of which so many are lost and won.

    Full precision is right on ``right`` of them, or on all that are not won.
    """
    store = Store(root)
    kept = set(range(won + lost, n if right is None else won + right))
    for baseline, scheme, own in (
        ("none", "W16A16", kept | set(range(won, won + lost))),
        ("rtn", "W4A16:w=channel,grid=asym", kept | set(range(won))),
    ):
        record = quantization("model", baseline, scheme, parameters=1_000_000)
        store.save_quantization(record)
        rows = [
            {
                "doc_id": i, "doc_hash": f"{i:016d}", "option": option,
                "loglikelihood": -1.0 if (option == 0) == (i in own) else -2.0,
                "n_tokens": 1, "n_characters": 1, "is_greedy": False, "gold": option == 0,
            }
            for i in range(n) for option in (0, 1)
        ]  # fmt: skip
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        metric = Metric.of(len(own) / n, 0.02)
        measured = task(record, "piqa", n_items=n).model_copy(update={"metrics": {"acc": metric}})
        store.save_task("model", record.key, measured, columns)
    return store


class Page(HTMLParser):
    """A page as an HTML parser sees it: elements with their attributes, texts, scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self._table = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag == "table":
            self._table = dict(attrs).get("id") or ""
        if self._table == "table-rows" and tag == "tr":
            self.rows.append([])
        if self._table == "table-rows" and tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self._table = ""
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
        elif inside != "style":
            self.text += data
            if self.rows and self.rows[-1] and self._table == "table-rows":
                self.rows[-1][-1] += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of every element of a kind."""
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def data(self) -> dict[str, Any]:
        """What the page's script starts with."""
        return json.loads(next(text for a, text in self.scripts if a.get("id") == "data"))

    def block(self, name: str) -> Any:
        """A packed block."""
        text = next(text for a, text in self.scripts if a.get("data-block") == name)
        return json.loads(zlib.decompress(base64.b64decode(text)))

    def run(self, start: str) -> Any:
        """The page of the only run whose anchor begins so."""
        (name,) = [anchor for anchor in self.data["runs"] if anchor.startswith(f"run-{start}")]
        return self.block(name)


def run_of(page: Page, title: str) -> dict[str, Any]:
    """The page of the run with this title."""
    runs = [page.block(anchor) for anchor in page.data["runs"]]
    (found,) = [run for run in runs if run["title"] == title]
    return found


def chromium() -> str | None:
    """A Chromium that can be driven; None where none is installed."""
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if found := shutil.which(name):
            return found
    return None


def plain(text: str) -> str:
    """Text with its white space as single blanks."""
    return re.sub(r"\s+", " ", text).strip()


def loads_torch(code: str) -> bool:
    """Whether running some code in another process imports torch."""
    import subprocess

    run = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.strip().splitlines()[-1] == "True"
