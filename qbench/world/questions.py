"""Questions about the bundled world, nine tasks in the columns of the real data sets.

Every question is about something :func:`~qbench.world.facts.held_out` keeps out of the corpus. A
right answer cannot be told from a wrong one by itself: Winograd, Winogrande, StoryCloze and BoolQ
come in twins with opposite answers, and elsewhere every answer is as often wrong as its share of
the options.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qbench.world import lexicon, prose
from qbench.world.facts import (
    PEOPLE,
    PERSON_ATTRIBUTES,
    THING_ATTRIBUTES,
    THINGS,
    World,
    held_out,
)

Row = dict[str, Any]
LETTERS = ("A", "B", "C", "D")


def items(world: World, task: str, count: int) -> list[Row]:
    """The first ``count`` questions of a task; the same for the same world."""
    rng = random.Random(f"questions {task}")
    make = TASKS[task][1]
    rows = list(make(world, rng))
    return rows[:count]


def _winograd(world: World, rng: random.Random) -> Iterator[Row]:
    """Twins of one sentence whose pronoun means the one or the other."""
    keys = [
        (number, a, b)
        for number, (_, trait, side) in enumerate(lexicon.BECAUSE)
        for a, b in prose.pairs(world, trait, side)
        if held_out("because", number, a.name, b.name)
    ]
    for number, a, b in _shuffled(keys, rng):
        deed, trait, side = lexicon.BECAUSE[number]
        for twin in (0, 1):
            start = f"{a.name} {deed.format(b=b.name)} because "
            text = f"{start}{a.she} was {lexicon.TRAITS[trait][side if twin == 0 else 1 - side]}."
            yield {
                "text": text,
                "pronoun": a.she,
                "pronoun_loc": len(start),
                "quote": text[len(start) : -1],
                "quote_loc": len(start),
                "options": [a.name, b.name],
                "label": twin,
                "source": "the bundled world",
            }


def _winogrande(world: World, rng: random.Random) -> Iterator[Row]:
    """Sentences with a gap for one of two people or two things, in twins."""
    people = [
        (f"{deed.format(a=a.name, b=b.name)}, so _ {{}}.", a.name, b.name, results[::step])
        for number, (deed, trait, results) in enumerate(lexicon.SO)
        for side, step in ((0, 1), (1, -1))
        for a, b in prose.pairs(world, trait, side)
        if held_out("so", number, a.name, b.name)
    ]
    things = [
        (
            f"{deed.format(a=a, b=b)} because the _ was {{}}.",
            a,
            b,
            lexicon.QUALITIES[quality][::step],
        )
        for number, (deed, quality, side) in enumerate(lexicon.BETWEEN_THINGS)
        for step in ((1, -1)[side],)
        for a, b in prose.thing_pairs(world, quality, side)
        if held_out("between", number, a, b)
    ]
    half = min(len(people), len(things))
    drawn = _shuffled(people, rng)[:half] + _shuffled(things, rng)[:half]
    for sentence, a, b, clauses in _shuffled(drawn, rng):
        for twin in (0, 1):
            yield {
                "sentence": sentence.format(clauses[twin]),
                "option1": a,
                "option2": b,
                "answer": str(twin + 1),
            }


def _hellaswag(world: World, rng: random.Random) -> Iterator[Row]:
    """The next step of an activity, among a later one and steps of other activities.

    Some wrong ending shares as many words with title and context as the right one does, none is
    told by its length, and none repeats the context: what the scene is about does not give the
    answer away.
    """
    steps = lexicon.ACTIVITIES
    keys = [
        (activity, person, step)
        for activity in steps
        for person in PEOPLE
        if held_out("activity", activity, person.name)
        for step in (1, 2, 3)
    ]
    for number, (activity, person, step) in enumerate(_shuffled(keys, rng)):
        context = " ".join(prose.activity_steps(activity, person)[:step])
        right = steps[activity][step]
        seen = f"{activity} {context}"
        later = steps[activity][step + 1 :]
        near = [text for text in later if _shared(text, seen) >= _shared(right, seen)]
        others = [
            text
            for name in steps
            if name != activity
            for text in steps[name][1:]
            if near or _shared(text, seen) >= _shared(right, seen)
        ]
        if len(others) < 2:
            continue
        wrong = [rng.choice(near or later)]
        long = [text for text in others if len(text) >= len(right)]
        wrong.append(rng.choice(long if long and rng.random() < 0.5 else others))
        wrong.append(rng.choice([text for text in others if text not in wrong]))
        endings, label = _options(f"{right}.", [f"{w}." for w in wrong], rng)
        yield {
            "ind": number,
            "activity_label": activity,
            "ctx_a": context,
            "ctx_b": person.she,
            "ctx": f"{context} {person.she}",
            "endings": endings,
            "source_id": "",
            "split": "val",
            "split_type": "",
            "label": str(label),
        }


def _shared(ending: str, context: str) -> int:
    """How many words an ending shares with what stands before it."""
    return len(set(ending.lower().split()) & set(re.findall(r"\w+", context.lower())))


def _storycloze(world: World, rng: random.Random) -> Iterator[Row]:
    """Stories in twins: the third sentence decides which of two endings is right."""
    keys = [
        (number, person, place)
        for number in range(len(lexicon.STORIES))
        for person in PEOPLE
        for place in lexicon.PLACES
        if held_out("story", number, person.name, place)
    ]
    for number, person, place in _shuffled(keys, rng):
        for twin in (0, 1):
            told, endings = prose.story(number, twin, person, place)
            shown, label = _options(endings[0], endings[1:], rng)
            row: Row = {"story_id": f"{number}-{person.name}-{place}-{twin}"}
            row |= {f"input_sentence_{i}": text for i, text in enumerate(told, start=1)}
            row |= {"sentence_quiz1": shown[0], "sentence_quiz2": shown[1]}
            yield row | {"answer_right_ending": label + 1}


def _arc_easy(world: World, rng: random.Random) -> Iterator[Row]:
    """One fact about a person or a thing, asked in a way the corpus does not ask about it."""
    values = PERSON_ATTRIBUTES | THING_ATTRIBUTES
    keys = [
        (name, attribute, form, value)
        for table in (world.people, world.things)
        for name, facts in table.items()
        for attribute, value in facts.items()
        for form in range(len(prose.QUESTIONS[attribute]))
        if held_out("fact", name, attribute, form)
    ]
    for name, attribute, form, value in _shuffled(keys, rng):
        wrong = rng.sample([v for v in values[attribute] if v != value], 3)
        said = [prose.ANSWERS[attribute].format(v=v) for v in (value, *wrong)]
        asked = prose.QUESTIONS[attribute][form].format(n=name)
        yield _arc(f"fact-{name}-{attribute}-{form}", asked, said[0], said[1:], rng)


def _arc_challenge(world: World, rng: random.Random) -> Iterator[Row]:
    """What becomes of a thing, told only of others of its material; and facts asked backwards."""
    keys = [
        (rule, thing, form)
        for rule in lexicon.RULES
        for thing in THINGS
        for form in range(len(prose.WHAT_HAPPENS[rule]))
        if held_out("rule", thing, rule)
    ]
    rows = []
    for rule, thing, form in _balanced(keys, lambda key: world.outcome(key[1], key[0]), rng):
        asked = prose.WHAT_HAPPENS[rule][form].format(t=thing)
        right = world.outcome(thing, rule)
        wrong = _other_outcomes(rule, right, rng)
        rows.append(_arc(f"rule-{rule}-{thing}-{form}", asked, right, wrong, rng))
    for table in (world.people, world.things):
        rows += _which(table, rng)
    yield from _shuffled(rows, rng)


def _which(table: dict[str, dict[str, str]], rng: random.Random) -> Iterator[Row]:
    """Which of four has this home, this colour, ..."""
    for name, facts in table.items():
        for attribute, value in facts.items():
            if held_out("which", name, attribute):
                asked = rng.choice(prose.WHICH[attribute]).format(v=value)
                others = [n for n, known in table.items() if known[attribute] != value]
                said = [prose.whole_name(n) for n in (name, *rng.sample(others, 3))]
                yield _arc(f"which-{name}-{attribute}", asked, said[0], said[1:], rng)


def _arc(name: str, asked: str, right: str, wrong: Sequence[str], rng: random.Random) -> Row:
    options, label = _options(right, wrong, rng)
    choices = {"text": options, "label": list(LETTERS)}
    return {"id": name, "question": asked, "choices": choices, "answerKey": LETTERS[label]}


def _openbookqa(world: World, rng: random.Random) -> Iterator[Row]:
    """What becomes of things in somebody's hands, and what helps somebody."""
    needs = [
        (person, feeling, form)
        for person in PEOPLE
        for feeling in lexicon.NEEDS
        for form in range(len(prose.NEEDS))
        if held_out("need", person.name, feeling, form)
    ]
    happenings = [
        (rule, thing, person)
        for rule in lexicon.RULES
        for thing in THINGS
        for person in PEOPLE
        if held_out("happening", thing, rule, person.name) and not held_out("rule", thing, rule)
    ]
    rows = []
    for person, feeling, form in _balanced(needs, lambda key: key[1], rng):
        stem = prose.NEEDS[form].format(n=person.name, f=feeling, s=person.she)
        right = lexicon.NEEDS[feeling]
        wrong = rng.sample([help for help in lexicon.NEEDS.values() if help != right], 3)
        rows.append((stem, right, wrong))
    chosen = _balanced(happenings, lambda key: world.outcome(key[1], key[0]), rng)
    for rule, thing, person in chosen[: 3 * len(rows)]:
        right = world.outcome(thing, rule)
        stem = prose.happening(rule, thing, person, by_person=True)
        rows.append((stem, right, _other_outcomes(rule, right, rng)))
    for number, (stem, right, wrong) in enumerate(_shuffled(rows, rng)):
        options, label = _options(right, wrong, rng)
        yield {
            "id": f"world-{number}",
            "question_stem": stem,
            "choices": {"text": options, "label": list(LETTERS)},
            "answerKey": LETTERS[label],
        }


def _boolq(world: World, rng: random.Random) -> Iterator[Row]:
    """A passage about two unlike people and a question about each: one to answer yes, one no.

    The passage tells what is always so in this world: it can be read, or known by heart.
    """
    keys = [
        (a, b, trait, form)
        for a in PEOPLE
        for b in PEOPLE
        if a != b
        for trait in prose.unlike(world, a, b)
        for form in range(len(prose.IS))
        if all(held_out("asked", person.name, trait, form) for person in (a, b))
    ]
    often: Counter[str] = Counter()
    for number, (a, b, trait, form) in enumerate(_shuffled(keys, rng)):
        pair = [prose.whether(person.name, trait, form) for person in (a, b)]
        if any(often[question] == 2 for question in pair):
            continue
        often.update(pair)
        others = [other for other in prose.unlike(world, a, b) if other != trait]
        shown = [trait, *rng.sample(others, min(1, len(others)))]
        text, asked = prose.passage(world, a, b, shown, rng)
        for name, about, answer in asked:
            if about == trait:
                yield {
                    "question": prose.whether(name, trait, form),
                    "passage": text,
                    "idx": 2 * number + int(answer),
                    "label": int(answer),
                }


def _piqa(world: World, rng: random.Random) -> Iterator[Row]:
    """How to reach a goal: with the tool for it, or with one for something else."""
    keys = [
        (person, tool, goal)
        for person in PEOPLE
        for tool, goals in lexicon.TOOLS.items()
        for goal in goals
        if held_out("tool", person.name, goal)
    ]
    for person, tool, goal in _shuffled(keys, rng):
        useless = [t for t in lexicon.TOOLS if t != tool and t not in lexicon.ALSO.get(goal, ())]
        other = rng.choice(useless)
        said = [prose.SOLUTION.format(n=person.name, tool=t, g=goal) for t in (tool, other)]
        options, label = _options(said[0], said[1:], rng)
        asked = rng.choice(prose.GOALS).format(n=person.name, g=goal)
        yield {"goal": asked, "sol1": options[0], "sol2": options[1], "label": label}


def _other_outcomes(rule: str, right: str, rng: random.Random) -> list[str]:
    """The rule's other outcomes, and one of another rule."""
    same = [outcome for outcome in lexicon.RULES[rule] if outcome != right]
    elsewhere = rng.choice([name for name in lexicon.RULES if name != rule])
    return [*same, rng.choice(lexicon.RULES[elsewhere])]


def _options(right: str, wrong: Sequence[str], rng: random.Random) -> tuple[list[str], int]:
    """All options in random order, and where the right one is."""
    options = [right, *wrong]
    rng.shuffle(options)
    return options, options.index(right)


def _shuffled(keys: Sequence[Any], rng: random.Random) -> list[Any]:
    drawn = list(keys)
    rng.shuffle(drawn)
    return drawn


def _balanced(keys: Sequence[Any], answer: Callable[[Any], str], rng: random.Random) -> list[Any]:
    """As many keys of every answer, in random order."""
    groups: dict[str, list[Any]] = {}
    for key in _shuffled(keys, rng):
        groups.setdefault(answer(key), []).append(key)
    least = min(len(group) for group in groups.values())
    return _shuffled([key for group in groups.values() for key in group[:least]], rng)


TASKS: dict[str, tuple[str, Callable[[World, random.Random], Iterator[Row]]]] = {
    "wsc273": ("test", _winograd),
    "winogrande": ("validation", _winogrande),
    "hellaswag": ("validation", _hellaswag),
    "storycloze_2016": ("test", _storycloze),
    "arc_easy": ("test", _arc_easy),
    "arc_challenge": ("test", _arc_challenge),
    "boolq": ("validation", _boolq),
    "openbookqa": ("test", _openbookqa),
    "piqa": ("validation", _piqa),
}
"""Task -> the split that is evaluated, and who writes its rows."""
