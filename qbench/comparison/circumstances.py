"""What rows differ in without being incomparable: software, device, calibration text, overlap.

Conditions (protocol, limit, shots...) decide whether two numbers may stand in one column at all
(:func:`qbench.comparison.entries.deviations`). What is here may move a number or flatter it, and is
told in a footnote. Left out: processors and threads, which move the last bit only.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qbench.comparison.pairing import ENVIRONMENT

if TYPE_CHECKING:
    from qbench.comparison.entries import Entry, Measured

COLUMNS = ("environment", "calibration_overlap")
"""Columns of the long table that say how a number came about beside its conditions."""
OVERLAP = 0.01
"""The share of shared text that is told; texts of one kind share a phrase now and then."""
_CALIBRATION = ("calibration_source", "calibration_nsamples", "calibration_seqlen")


def environment_text(environment: Mapping[str, str]) -> str:
    """What of an environment may move a number: "torch 2.7, transformers 5.0, device cpu"."""
    return ", ".join(f"{name} {environment[name]}" for name in ENVIRONMENT if name in environment)


def told(entries: Sequence[Entry]) -> list[Entry]:
    """The same rows with notes where their circumstances differ from those of most others."""
    found = [_other_calibration(entry, _usual_calibrations(entries)) for entry in entries]
    columns: dict[Any, Counter[str]] = defaultdict(Counter)
    for entry in found:
        for key, number in entry.cells.items():
            if number.conditions.get("environment"):
                columns[key][number.conditions["environment"]] += 1
    usual = {key: counts.most_common(1)[0][0] for key, counts in columns.items()}
    return [
        replace(entry, cells={k: _noted(n, usual.get(k, "")) for k, n in entry.cells.items()})
        for entry in found
    ]


def _noted(number: Measured, usual: str) -> Measured:
    notes = list(number.notes)
    own, others = (
        dict(part.split(" ", 1) for part in text.split(", ") if part)
        for text in (number.conditions.get("environment") or "", usual)
    )
    differing = [name for name in ENVIRONMENT if own.get(name) != others.get(name)]
    if own and differing:
        here, there = (
            ", ".join(f"{name} {have.get(name, 'none')}" for name in differing)
            for have in (own, others)
        )
        notes.append(f"measured with {here}; most of the column with {there}")
    notes += overlap_notes(number)
    return replace(number, notes=tuple(notes)) if len(notes) > len(number.notes) else number


def overlap_notes(number: Measured) -> list[str]:
    """The note that a number was measured on text its method was calibrated on, if it was."""
    overlap = number.conditions.get("calibration_overlap") or 0.0
    if overlap < OVERLAP:
        return []
    return [
        f"{overlap:.0%} of the text of {number.task} stands in the calibration text of this "
        "row too: it has seen what it is tested on"
    ]


def _usual_calibrations(entries: Sequence[Entry]) -> dict[str, tuple[Any, ...]]:
    """The calibration that most rows of each checkpoint share; the seed is chance, not choice."""
    counts: dict[str, Counter[tuple[Any, ...]]] = defaultdict(Counter)
    for entry in entries:
        if entry.facts.get("calibration_source") is not None:
            own = tuple(entry.facts[name] for name in _CALIBRATION)
            counts[str(entry.facts["checkpoint"])][own] += 1
    return {name: found.most_common(1)[0][0] for name, found in counts.items()}


def _other_calibration(entry: Entry, usual: Mapping[str, tuple[Any, ...]]) -> Entry:
    """A note on a row calibrated otherwise than most, unless its name says so already."""
    named = any(name.replace("_", ".", 1) in entry.method for name in _CALIBRATION)
    if entry.facts.get("calibration_source") is None or named:
        return entry
    own = tuple(entry.facts[name] for name in _CALIBRATION)
    others = usual[str(entry.facts["checkpoint"])]
    if own == others:
        return entry
    note = f"calibrated on {_in_words(own)}; most rows on {_in_words(others)}"
    return replace(entry, facts=entry.facts | {"notes": (*(entry.facts.get("notes") or ()), note)})


def _in_words(calibration: tuple[Any, ...]) -> str:
    source, nsamples, seqlen = calibration
    return f"{nsamples} windows of {seqlen} tokens of {source}"
