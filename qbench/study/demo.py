"""``qbench demo``: the main job on a model that is made on the spot, without any download.

A small Llama learns, in well under a minute, texts about who does what to which thing. Then the
cells of BitNet's Table 3 are run on it: perplexity on unseen texts, and a four-way choice of facts.
It knows its little world well at 16 bits, so there is something to lose. It says nothing about
large models, which lose far less at 4 bits and have outlier channels this one does not have.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from qbench.progress import Reporter
from qbench.study.commands import run_sweep
from qbench.study.plots import plot
from qbench.study.store import Store
from qbench.study.sweep import Sweep
from qbench.study.tables import table

NAMES = "Ada Ben Cora Dan Eva Finn Gus Hana Ivo Jon Kim Lea Mia Ned Olga Pia".split()
VERBS = "finds sells paints carries loses wants makes hides breaks sees".split()
THINGS = "bread boat candle basket cheese rope drum honey lamp wheel shirt key".split()
CONTEXT, STEPS, BATCH = 32, 500, 32

CELLS: list[Any] = [
    "none",
    {"name": "absmax", "schemes": ["W8A8", "W4A4", "W1A8"]},
    {"name": "smoothquant", "schemes": ["W8A8", "W4A4", "W1A8"]},
    {"name": "gptq", "schemes": ["W4A16", "W2A16"]},
    {"name": "quip", "schemes": ["W4A16", "W2A16"]},
]
"""BitNet 2310.11453 Table 3, and QuIP at 4 bits, which its section 4.1 announces."""


def demo(results: Path, full: bool = False) -> int:
    """Make the model, run the cells, print the table, draw the figure; returns the exit code."""
    home = results / "world"
    reporter = Reporter()
    if not (home / "little-world" / "config.json").is_file():
        make_world(home, reporter)
    sweep = Sweep(
        checkpoints=[str(home / "little-world")],
        baselines=CELLS,
        schemes=["W16A16"],
        calibration={"source": str(home / "train.txt"), "nsamples": 64, "seqlen": CONTEXT},  # type: ignore[arg-type]
        tasks=[str(home / "unseen.txt"), str(home / "facts.yaml")],
        limit=None if full else 128,
        results=results,
    )
    code = run_sweep(sweep, reporter)
    store, figure = Store(results), results / "accuracy_vs_bits.png"
    print(table(store, format="terminal", width=shutil.get_terminal_size((110, 24)).columns))
    plot(store, "accuracy-vs-bits", output=figure)
    print(f"figure:   {figure}\nresults:  {results}", file=sys.stdout)
    print(
        f"next:     qbench run {home / 'little-world'} --baseline gptq --scheme W3A16g32 "
        f"--calibration {home / 'train.txt'} --nsamples 64 --seqlen {CONTEXT} "
        f"--tasks {home / 'unseen.txt'} --results {results}"
    )
    return code


def make_world(home: Path, reporter: Reporter) -> None:
    """Write texts, questions and a trained checkpoint under ``home``; the checkpoint comes last."""
    home.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    facts = {(name, verb): rng.choice(THINGS) for name in NAMES for verb in VERBS}
    train = [story(rng, facts) for _ in range(3000)]
    unseen = [story(rng, facts) for _ in range(200)]
    (home / "train.txt").write_text("\n\n".join(train), encoding="utf-8")
    (home / "unseen.txt").write_text("\n\n".join(unseen), encoding="utf-8")
    write_questions(home, facts, rng)
    tokenizer = train_tokenizer(train)
    model = train_model(tokenizer, train, reporter)
    partial = home / ".little-world.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(home / "little-world", ignore_errors=True)
    partial.rename(home / "little-world")


def story(rng: random.Random, facts: dict[tuple[str, str], str]) -> str:
    """Six true sentences; which thing it is takes both the person and the deed."""
    chosen = rng.sample(sorted(facts), 6)
    return " ".join(f"{name} {verb} the {facts[name, verb]}." for name, verb in chosen)


def write_questions(home: Path, facts: dict[tuple[str, str], str], rng: random.Random) -> None:
    """A four-way multiple-choice task as an lm-eval YAML with its rows."""
    rows = []
    for (name, verb), thing in facts.items():
        for _ in range(2):
            options = [thing, *rng.sample([t for t in THINGS if t != thing], 3)]
            rng.shuffle(options)
            stem = f"{name} {verb} the"
            rows.append({"stem": stem, "options": options, "gold": options.index(thing)})
    rng.shuffle(rows)
    path = home / "facts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (home / "facts.yaml").write_text(
        f"""task: facts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {json.dumps(str(path.resolve()))}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: stem
doc_to_target: gold
doc_to_choice: options
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0, summary: facts of the demo's little world, chance: 0.25}}
""",
        encoding="utf-8",
    )


def train_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE tokenizer of the world's few words, BOS in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def train_model(tokenizer: Any, texts: list[str], reporter: Reporter) -> Any:
    """A 3-block Llama of about 0.1 M parameters, trained on ``texts`` with AdamW."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=CONTEXT,
        bos_token_id=0, eos_token_id=1, tie_word_embeddings=True, initializer_range=0.08,
    )  # fmt: skip
    rows = [tokenizer(text)["input_ids"][:CONTEXT] for text in texts]
    ids = torch.full((len(rows), CONTEXT), 1)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).train()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
    with reporter.step("train a 0.1 M-parameter Llama on the demo's world") as progress:
        for step in range(STEPS):
            batch = ids[torch.randint(len(ids), (BATCH,), generator=generator)]
            labels = batch.masked_fill(batch == 1, -100)
            loss = model(input_ids=batch, labels=labels, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress(step + 1, STEPS)
    return model.eval()
