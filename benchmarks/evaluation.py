"""Scoring questions: qbench against lm-eval's HFLM at its best fixed batch size.

A seeded random Llama, 512 wide, 8 layers, with a vocabulary of 32,000 (where the output head is 40
% of the model) and of 4,096 (where it hardly counts, as in large models), 300 seeded questions of
each of the eight real task sets, float32. The best batch size is found for every task by trying 1,
4, 8 and 16 on its first questions. Requests are built and tokenized beforehand on both sides and
only scoring is timed; a second table times everything, from the files to the metrics, in fresh
processes.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import common, questions
from benchmarks.common import Report, Table, Times
from benchmarks.models import llama_fields, make_tokenizer, random_llama

BARS = {"hellaswag": 2.5, "arc_easy": 4.0, "piqa": 1.6}
MEAN_BAR = 2.3
AGREEMENT = 2e-4
BATCH_SIZES = (1, 4, 8, 16)
MAX_LENGTH = 2048
TRIED = 32
"""Questions on which batch sizes are tried."""


def build(options: Any) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    fields = llama_fields(512, 8, 1376, 8, options.vocabulary)
    if options.quick:
        fields |= {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
    texts = [Path(t) for t in options.text]
    tokenizer = make_tokenizer(options.work, options.data, options.vocabulary, texts)
    return random_llama(fields), tokenizer


def hflm(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """lm-eval's own model class on a model in memory."""
    import logging

    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=MAX_LENGTH)


def score_with_hflm(lm: Any, encoded: list[Any], batch_size: int) -> list[tuple[float, bool]]:
    """Log-likelihoods by HFLM in batches of so many rows.

    The size is set on the model: lm-eval 0.4.13 reads ``override_bs`` only where it is "auto".
    """
    lm.batch_size_per_gpu = batch_size
    found: list[tuple[float, bool]] = lm._loglikelihood_tokens(encoded, disable_tqdm=True)
    return found


def score_task(options: Any, model: Any, tokenizer: Any, task: str) -> dict[str, Any]:
    """Both sides on one task, requests ready."""
    from qbench.evaluation.evaluate import context_length, prepare_task
    from qbench.evaluation.tasks import EvaluationOptions

    context, given = context_length(model.config), EvaluationOptions(data_dir=options.data)
    prepared: Any = prepare_task(task, tokenizer, context, given)
    lm = hflm(model, tokenizer, 1)
    requests = [r for question in prepared.questions for r in question.requests]
    encoded = [(r.args, *lm._encode_pair(*r.args)) for r in requests]
    sizes = [len(question.requests) for question in prepared.questions]
    tried = encoded[: sum(sizes[:TRIED])]
    score_with_hflm(lm, tried[:4], 1)  # the first call is never typical
    trials = dict.fromkeys(BATCH_SIZES, math.inf)
    for size in (*BATCH_SIZES, *reversed(BATCH_SIZES)):
        started = time.perf_counter()
        score_with_hflm(lm, tried, size)
        trials[size] = min(trials[size], time.perf_counter() - started)
    best = min(trials, key=lambda size: trials[size])
    prepared.run(model)  # what is done once per model is not scoring: self-tests, warm caches
    sides = {
        "qbench": lambda: lambda: prepared.run(model),
        "hflm": lambda: lambda: score_with_hflm(lm, encoded, best),
    }
    times, values = common.take_turns(sides, options.repeats)
    ours = [float(x) for x in values["qbench"].items["loglikelihood"]]
    theirs = [float(x) for x, _ in values["hflm"]]
    characters = [n for question in prepared.questions for n in question.n_characters]
    return {
        "task": task,
        "questions": len(sizes),
        "requests": len(requests),
        "batch": best,
        "trials": trials,
        "seconds": {name: t.seconds for name, t in times.items()},
        "cpu_seconds": {name: t.cpu for name, t in times.items()},
        "difference": max(abs(a - b) for a, b in zip(ours, theirs, strict=True)),
        "changed": changed_answers(ours, theirs, sizes, characters),
        "tokens": questions.token_counts([(c, t) for _, c, t in encoded], sizes, MAX_LENGTH),
    }


def changed_answers(
    ours: list[float], theirs: list[float], sizes: list[int], characters: list[int]
) -> int:
    """Questions whose likeliest option differs, by sum or per character."""
    changed, start = 0, 0
    for size in sizes:
        span = range(start, start + size)
        start += size
        for weight in ([1] * len(characters), [max(n, 1) for n in characters]):
            one, other = (max(span, key=lambda i: x[i] / weight[i]) for x in (ours, theirs))  # noqa: B023
            if one != other:
                changed += 1
                break
    return changed


def everything(options: Any) -> dict[str, Any]:
    """One side from files to metrics; imports of the libraries it needs are part of it."""
    model, tokenizer = build(options)
    tasks = options.tasks.split(",")
    started = time.perf_counter()
    if options.child == "qbench":
        from qbench import evaluate

        found = evaluate(model, tokenizer, tasks, data_dir=options.data)
        accuracy = {t: r.metrics["acc"].as_float() for t, r in found.items()}
    else:
        import lm_eval
        from lm_eval.tasks import TaskManager

        with tempfile.TemporaryDirectory() as folder:
            questions.lm_eval_definitions(options.data, Path(folder), tasks)
            manager = TaskManager(include_path=folder, include_defaults=False)
            lm = hflm(model, tokenizer, options.batch)
            outcome: Any = lm_eval.simple_evaluate(model=lm, tasks=tasks, task_manager=manager)
        accuracy = {t: r["acc,none"] for t, r in outcome["results"].items()}
    return {"seconds": time.perf_counter() - started, "accuracy": accuracy}


def scoring_table(found: list[dict[str, Any]], vocabulary: int) -> Table:
    """A row for each task and the geometric mean."""
    columns = ["task", "questions", "best batch", "HFLM", "qbench", "ratio"]
    columns += ["by processor time", "bar"]
    columns += ["largest difference, nats", "changed answers"]
    made = Table(f"Scoring only, vocabulary of {vocabulary:,} tokens", columns)
    ratios = []
    for row in found:
        cpu = row["cpu_seconds"]
        times = {name: Times(s, cpu[name]) for name, s in row["seconds"].items()}
        middle, shown = common.ratio(times["hflm"], times["qbench"])
        ratios.append(middle)
        barred = vocabulary == 32000 and row["task"] in BARS
        bar = common.against(middle, BARS[row["task"]]) if barred else ""
        cells = [row["task"], f"{row['questions']}", f"{row['batch']}", str(times["hflm"])]
        cells += [str(times["qbench"]), shown, common.cpu_ratio(times["hflm"], times["qbench"])]
        made.rows.append([*cells, bar, f"{row['difference']:.1e}", str(row["changed"])])
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    bar = common.against(mean, MEAN_BAR) if vocabulary == 32000 and len(found) == 8 else ""
    worst, changed = max(r["difference"] for r in found), sum(r["changed"] for r in found)
    blank = ["geometric mean", "", "", "", "", f"{mean:.2f}x", "", bar]
    made.rows.append([*blank, f"{worst:.1e}", str(changed)])
    made.notes = [
        f"Differences may be {AGREEMENT:g} nats, and no answer may change. A pass of each side "
        "beforehand does not count; what qbench tests once per model before it shares prefixes is "
        "in the table of everything."
    ]
    return made


def token_table(found: list[dict[str, Any]], vocabulary: int) -> Table:
    """What sharing prefixes can give at most where the body of the model is all that counts."""
    columns = ["task", "HFLM's tokens", "a trie per question", "one trie", "bound", "measured"]
    made = Table(f"Tokens through the model, vocabulary of {vocabulary:,} tokens", columns)
    for row in found:
        tokens, seconds = row["tokens"], {n: Times(s) for n, s in row["seconds"].items()}
        bounds = [tokens["hflm"] / tokens[part] for part in ("questions", "task")]
        cells = [f"{tokens[part]:,}" for part in ("hflm", "questions", "task")]
        bound = " / ".join(f"{b:.2f}x" for b in bounds)
        measured = seconds["hflm"].median / seconds["qbench"].median
        made.rows.append([row["task"], *cells, bound, f"{measured:.2f}x"])
    made.notes = [
        "Bound: HFLM's tokens (padding aside) by those of tries, per question / over all questions."
        " A head that is computed at scored positions alone comes on top of it."
    ]
    return made


def passed_on(options: Any, data: Path) -> list[str]:
    """The options a child needs."""
    arguments = ["--data", str(data), "--work", str(options.work), "--tasks", options.tasks]
    arguments += ["--repeats", str(options.repeats), *(f"--text={t}" for t in options.text)]
    return [*arguments, *(["--quick"] if options.quick else [])]


def measure(options: Any, report: Report, data: Path) -> None:
    """Both vocabularies, each scored in one process; then everything, in turns."""
    tasks = options.tasks.split(",")
    for vocabulary in (int(v) for v in options.vocabularies.split(",")):
        options.vocabulary = vocabulary
        # made before its children, from the whole data and not from the sample
        make_tokenizer(options.work, options.data, vocabulary, [Path(t) for t in options.text])
        common_arguments = [*passed_on(options, data), "--vocabulary", str(vocabulary)]
        found = []
        for part in [tasks] if options.quick else [[task] for task in tasks]:
            asked = [*common_arguments, "--child", f"score:{','.join(part)}"]
            found += common.own_child("evaluation", asked, options.threads)["rows"]
            print(f"{vocabulary} {', '.join(part)} done", file=sys.stderr, flush=True)
        report.add(scoring_table(found, vocabulary))
        report.add(token_table(found, vocabulary))
        report.measurements[f"scoring {vocabulary}"] = found
        if vocabulary != 32000 or not options.everything:
            continue
        totals = {b: sum(row["trials"][str(b)] for row in found) for b in BATCH_SIZES}
        best = min(totals, key=lambda size: totals[size])
        sides: dict[str, list[Any]] = {"qbench": [], "lm-eval": []}
        for turn in range(1 if options.quick else options.everything):
            for side in list(sides)[:: 1 if turn % 2 == 0 else -1]:
                asked = [*common_arguments, "--child", side, "--batch", str(best)]
                sides[side].append(common.own_child("evaluation", asked, options.threads))
        report.add(everything_table(sides, best))
        report.measurements["everything"] = sides


def everything_table(sides: dict[str, list[Any]], batch: int) -> Table:
    """One row a side."""
    times = {name: Times([a["seconds"] for a in answers]) for name, answers in sides.items()}
    _, shown = common.ratio(times["lm-eval"], times["qbench"])
    made = Table("Everything, all tasks, vocabulary of 32,000 tokens", ["", "seconds", "ratio"])
    made.rows = [
        [f"lm-eval simple_evaluate, batch {batch}", str(times["lm-eval"]), shown],
        ["qbench.evaluate", str(times["qbench"]), ""],
    ]
    equal = sides["qbench"][0]["accuracy"] == sides["lm-eval"][0]["accuracy"]
    made.notes = [
        "From the files to the metrics with the model in memory: libraries imported, tasks read, "
        "prompts built, tokenized, scored. lm-eval reads only the eight definitions (its own "
        f"catalogue would add 7 s). Accuracies {'are equal' if equal else 'DIFFER'}."
    ]
    return made


def main() -> None:
    given = common.parser(__doc__ or "")
    given.add_argument("--items", type=int, default=300, help="questions of each task")
    given.add_argument("--tasks", default=",".join(questions.TASK_SPLITS))
    given.add_argument("--vocabularies", default="32000,4096")
    given.add_argument("--text", action="append", default=[], help="train the tokenizer on this")
    given.add_argument("--everything", type=int, default=3, help="turns of the second table")
    given.add_argument("--vocabulary", type=int, default=32000, help="of a child")
    given.add_argument("--batch", type=int, default=8, help="of a child")
    options = given.parse_args()
    if options.child:
        kind, _, names = options.child.partition(":")
        if kind == "score":
            made = build(options)
            rows = [score_task(options, *made, task) for task in names.split(",")]
            print(json.dumps({"rows": rows}))
        else:
            print(json.dumps(everything(options)))
        return
    if options.quick:
        options.tasks = "hellaswag,arc_easy,piqa"
    tasks = options.tasks.split(",")
    if absent := common.missing(options, questions.task_files(tasks), "evaluation"):
        sys.exit(absent)
    report = Report("evaluation", "Evaluation: scoring questions", str(options.threads))
    with tempfile.TemporaryDirectory() as folder:
        items = 8 if options.quick else options.items
        measure(options, report, questions.sample(options.data, Path(folder), tasks, items))
    report.save(options)


if __name__ == "__main__":
    main()
