"""Models by size, before they are drawn or tabled: families, their losses, the laws through them.

A family is what is compared across sizes: full precision, "trained at W1.58A8", "gptq W4A16". The
size is the number of all parameters of the checkpoint. A loss is the logarithm to base 2 of a
perplexity, so bits per token (per word where the protocol counts words), as in BitNet (arXiv
2310.11453) Fig. 3; bits per byte compare models whose tokens differ. Each family of at least four
sizes gets a power law through the points that were measured alike. Of a published curve, only the
points that its paper fitted.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

from qbench.comparison.entries import Entry, Key, Measured, common, deviations, perplexity_keys
from qbench.comparison.headings import size_text
from qbench.comparison.panels import Panel, Point, Tasks, averages, caption
from qbench.comparison.scaling import PowerLaw, count_sizes, fit
from qbench.errors import QBenchError

LOSSES = ("perplexity", "bits_per_byte")
"""What a loss can be made of."""
ROLES = ("full precision", "trained", "ptq")

_UNITS = {"perplexity": "token", "word_perplexity": "word", "byte_perplexity": "byte"}
_SAME_TOKENS = 1.01  # bytes per token within this factor are one vocabulary on one text
_LATENT = "-latent"  # what qbench.models.checkpoints adds to the name of such a checkpoint
_LEFT_OUT = "quantized rows are shown where --baseline or --scheme names them; stored"
_PUBLISHED = "hollow: published"
_ELSEWHERE = "hollow: published, measured on another text with other tokens"
_OWN_TASKS = "hollow: published, the mean of the paper's own tasks in its own metric"

Line = tuple[str, bool]
"""A family, and whether its numbers are published ones: what one curve goes through."""


@dataclass
class SizePanel(Panel):
    """One set of axes with sizes across; the series of its points are families."""

    unit: str = ""
    """A loss is in bits per this."""
    laws: dict[Line, PowerLaw] = field(default_factory=dict)
    lawless: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Why there is no law, or what to know of it -> what it is about."""

    def lines(self) -> dict[Line, list[Point]]:
        """The points by family, smallest model first."""
        found: dict[Line, list[Point]] = defaultdict(list)
        for point in self.points:
            found[point.series, point.published].append(point)
        return {line: sorted(points, key=lambda p: p.x) for line, points in found.items()}


def role(entry: Entry) -> str:
    """``full precision``, ``trained`` or ``ptq``; published rows have no scheme to tell it by.

    Latent weights that nothing quantizes are no full-precision model: they were trained to be
    rounded, and count with the quantized rows.
    """
    if entry.trained:
        return "trained"
    if is_latent(entry):
        return "ptq"
    widths = entry.facts["wbits"], entry.facts["abits"]
    whole = entry.full_precision or (entry.source == "published" and min(widths) >= 16)
    return "full precision" if whole else "ptq"


def is_latent(entry: Entry) -> bool:
    """Whether the row is about the latent weights of a trained low-bit checkpoint."""
    return str(entry.facts["checkpoint"]).endswith(_LATENT)


def in_families(
    entries: Sequence[Entry], asked: Collection[str] | None = None, published_ptq: bool = False
) -> tuple[list[Entry], list[str]]:
    """The rows with their family as ``series``, and the names of quantized ones left out.

    Args:
        entries: rows, measured and published.
        asked: the runs of quantized rows that are wanted; None wants all.
        published_ptq: whether published quantized rows are shown.
    """
    shown: list[Entry] = []
    left_out: list[Entry] = []
    for entry in entries:
        published = entry.source != "measured"
        if role(entry) == "ptq" and published and not published_ptq:
            continue
        own = role(entry) != "ptq" or published
        wanted = own or asked is None or entry.facts["run"] in asked
        (shown if wanted else left_out).append(entry)
    schemes: dict[str, set[str]] = defaultdict(set)
    for entry in shown:
        if entry.source == "measured":
            schemes[_family(entry)].add(entry.scheme_text)
    named = []
    for entry in shown:
        name = _family(entry)
        if len(schemes[name]) > 1 and entry.scheme_text:
            name = f"{name}:{entry.scheme_text}"
        named.append(replace(entry, series=name))
    return sorted(named, key=_order), sorted({_family(entry) for entry in left_out})


def loss_of(number: Measured, metric: str = "perplexity") -> Measured | None:
    """A loss in bits with its standard error; None where it cannot be told.

    Args:
        number: a perplexity; infinite or NaN gives the same.
        metric: ``perplexity`` (its logarithm) or ``bits_per_byte`` (as stored).
    """
    if number.value is None:
        return None
    if metric == "bits_per_byte":
        if metric not in number.also:
            return None
        value, stderr = number.also[metric]
        return replace(number, metric=metric, value=value, stderr=stderr, draws=())
    if not math.isfinite(number.value):
        return replace(number, metric=f"log2 {number.metric}", stderr=None)
    error = None if number.stderr is None else number.stderr / (number.value * math.log(2))
    value = math.log2(number.value)
    draws = tuple(math.log2(draw) for draw in number.draws if draw > 0)
    metric = f"log2 {number.metric}"
    return replace(number, metric=metric, value=value, stderr=error, draws=draws)


def unit_of(number: Measured, metric: str) -> str:
    """What the bits of a loss are counted per: token, word or byte."""
    return "byte" if metric == "bits_per_byte" else _UNITS.get(number.metric, "token")


def prediction(entry: Entry, key: Key) -> Measured | None:
    """The perplexity a row has on a text; published rows have one text, the authors' own."""
    if entry.source == "published":
        return next((number for own, number in entry.cells.items() if own[1]), None)
    return entry.cells.get(key)


def average(entry: Entry) -> Measured | None:
    """The average accuracy that a published row prints."""
    return entry.cells.get(("average", ""))


def loss_panels(entries: Sequence[Entry], metric: str = "perplexity") -> list[SizePanel]:
    """One panel per text and protocol, from rows :func:`in_families` named."""
    measured = perplexity_keys([entry for entry in entries if entry.source == "measured"])
    panels = []
    for key in measured or perplexity_keys(entries):
        usual = common(e.cells[key] for e in entries if key in e.cells)
        limits = {f"{key[0]} {key[1]}": usual["limit"]} if usual.get("limit") else {}
        panel = SizePanel(f"{key[0]}, {key[1]}", limits=limits)
        lengths: dict[Line, list[float]] = defaultdict(list)
        for entry in _on(entries, key, measured):
            number = prediction(entry, key)
            if number is None or number.value is None:
                continue
            panel.unit = panel.unit or unit_of(number, metric)
            loss = loss_of(number, metric)
            if loss is None:
                panel.remarks["not shown, as its bits per byte are not known"].append(_name(entry))
                continue
            where = _PUBLISHED if key in entry.cells else _ELSEWHERE
            if _add(panel, entry, loss, {deviations(number, usual)} - {""}, where):
                lengths[entry.series, entry.source == "published"] += _token_length(number, loss)
        _add_laws(panel, lengths)
        panels.append(panel)
    return [panel for panel in panels if panel.points or panel.remarks]


def accuracy_panels(entries: Sequence[Entry]) -> list[SizePanel]:
    """One panel with the mean accuracy of each run, from rows :func:`in_families` named."""
    panel = SizePanel("")
    measured = [entry for entry in entries if entry.source == "measured"]
    for entry, mean, different in averages(panel, measured, Tasks.of(measured), _name):
        _add(panel, entry, mean, different)
    for entry in entries:
        number = average(entry) if entry.source == "published" else None
        if number is not None:
            _add(panel, entry, number, set(), _OWN_TASKS)
    return [panel]


def with_sizes(panels: Sequence[SizePanel], what: str) -> list[SizePanel]:
    """The panels that have two sizes to compare; the first one says which have not.

    Raises:
        QBenchError: if there is none.
    """
    counts = [count_sizes([point.x for point in panel.points]) for panel in panels]
    kept = [panel for panel, count in zip(panels, counts, strict=True) if count > 1]
    if not kept:
        there = {(p.x, p.name) for panel in panels for p in panel.points}
        stored = ", ".join(f"{name} ({size_text(int(size))})" for size, name in sorted(there))
        raise QBenchError(
            f"nothing to draw against size: it takes {what} of two sizes, and there is "
            f"{stored or 'none'}; measure more, or add published points with "
            "--against bitnet-scaling"
        )
    for panel, count in zip(panels, counts, strict=True):
        if count < 2:
            kept[0].remarks["not drawn, as it has fewer than two sizes"].append(
                panel.title.replace(", ", " ")
            )
    return kept


def law_lines(panels: Sequence[SizePanel]) -> list[str]:
    """The fitted laws in words, each with its distance from its points, and why others are not."""
    found = []
    for panel in panels:
        for (family, published), law in panel.laws.items():
            where = f"{panel.title}: " if len(panels) > 1 and not published else ""
            name = f"{family}, published" if published else family
            near = math.ceil(1000 * law.worst) / 1000
            line = f"{where}{name}: L(N) = {law}, within {near:.3f} of {law.n_sizes} sizes"
            found += [line] if line not in found else []  # published ones stand in every panel
    if found:
        found.append("N in billions. Compare curves: their coefficients are ill-conditioned.")
    reasons: dict[str, list[str]] = {}
    for panel in panels:
        for text, names in panel.lawless.items():
            told = reasons.setdefault(text, [])
            told += [name for name in names if name not in told]
    return found + [f"{text}: {', '.join(names)}" for text, names in reasons.items()]


def size_caption(
    entries: Sequence[Entry], panels: Sequence[SizePanel], accuracy: bool, metric: str
) -> list[str]:
    """What the numbers are, the fitted laws, and everything that is not like the rest."""
    first = []
    if not accuracy:
        units = list(dict.fromkeys(panel.unit for panel in panels))
        names = {"byte": "bits per byte", "word": "log2 of the perplexity per word"}
        first = [names.get(unit, "log2 of perplexity, bits per token") for unit in units]
        bars = any(point.stderr is not None for panel in panels for point in panel.points)
        first = [f"Loss: {' and '.join(first)}{'; bars: standard error' if bars else ''}."]
    return [*first, *law_lines(panels), *caption(entries, panels, accuracy, metric)]


def left_out_line(families: Sequence[str]) -> list[str]:
    """Which quantized families nobody asked for."""
    more = f" and {len(families) - 5} more" if len(families) > 5 else ""
    return [f"{_LEFT_OUT}: {', '.join(families[:5])}{more}"] if families else []


def _on(entries: Sequence[Entry], key: Key, measured: Sequence[Key]) -> Iterator[Entry]:
    """The rows of a panel: published ones in that of their own text, or else in every one."""
    for entry in entries:
        own = set(entry.cells) & set(measured) if entry.source == "published" else set()
        if not own or key in own:
            yield entry


def _add(
    panel: SizePanel,
    entry: Entry,
    number: Measured,
    different: set[str],
    if_published: str = _PUBLISHED,
) -> bool:
    """Put a row's point into the panel, in place; or say why not."""
    size, value = entry.facts["parameters"], number.value
    if not size:
        panel.remarks["not shown, as its size is unknown"].append(_name(entry))
    elif value is None or not math.isfinite(value):
        panel.remarks["not shown, as it diverged"].append(_name(entry))
    else:
        published = entry.source == "published"
        if published:
            told = panel.remarks[if_published]
            told += [] if entry.facts["reference"] in told else [entry.facts["reference"]]
        if different:
            how = f"measured differently ({', '.join(sorted(different))}), not fitted"
            panel.remarks[how].append(_name(entry))
        panel.points.append(
            Point(
                x=float(size),
                y=value,
                stderr=number.stderr,
                role=role(entry),
                series=entry.series,
                wbits=entry.facts["wbits"],
                abits=entry.facts["abits"],
                name=entry.facts["checkpoint"],
                comparable=not different,
                mixed=entry.mixed,
                published=published,
                fitted=bool(entry.facts.get("fitted", True)),
                run=entry.facts.get("run") or "",
                draws=number.draws,
            )
        )
        return True
    return False


def _add_laws(panel: SizePanel, lengths: dict[Line, list[float]]) -> None:
    """Fit each family of the panel, in place; where that cannot be, say why."""
    every = [length for own in lengths.values() for length in own]
    if every and max(every) > _SAME_TOKENS * min(every):
        how = f"{min(every):.2f} to {max(every):.2f} bytes a token"
        advice = "other vocabularies; --metric bits_per_byte compares"
        panel.lawless[f"losses per token do not compare, {advice}"] = [how]
    for line, points in panel.lines().items():
        own = lengths.get(line, [])
        chosen = [point for point in points if point.comparable and point.fitted]
        name = f"{line[0]}, published" if line[1] else line[0]
        try:
            if own and max(own) > _SAME_TOKENS * min(own):
                raise QBenchError("the models have different vocabularies")
            panel.laws[line] = fit([p.x for p in chosen], [p.y for p in chosen])
        except QBenchError as error:
            panel.lawless[f"not fitted: {error}"].append(name)


def _token_length(number: Measured, loss: Measured) -> list[float]:
    """Bytes per token of the text, where the run knows its bits per byte; else nothing."""
    per_byte = number.also.get("bits_per_byte", (0.0, None))[0]
    per_token = loss.value if number.metric == "perplexity" else None
    if loss.metric == "bits_per_byte" or not per_token or not per_byte > 0:
        return []
    return [per_token / per_byte]


def _family(entry: Entry) -> str:
    kind = role(entry)
    widths = entry.facts["scheme" if entry.mixed else "label"]
    if kind == "full precision":
        return kind
    if kind == "trained":
        return f"trained at {widths}"
    return f"{entry.series} {widths}{' of latent weights' if is_latent(entry) else ''}"


def _order(entry: Entry) -> tuple[object, ...]:
    facts = entry.facts
    widths = (-facts["wbits"], -facts["abits"])
    names = (entry.series, entry.source != "measured", facts["parameters"] or 0)
    return ROLES.index(role(entry)), *widths, *names, facts["checkpoint"]


def _name(entry: Entry) -> str:
    return f"{entry.series} of {entry.facts['checkpoint']}"
