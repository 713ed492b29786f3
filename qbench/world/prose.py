"""What is written about the bundled world: documents of the training and the held-out corpus.

A document is a few sentences of one kind. Whatever a question of :mod:`qbench.world.questions`
asks about is named by a key, and what :func:`~qbench.world.facts.held_out` keeps back for the
questions is written in no document: the model sees the rule and other cases of it, never the
sentence itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qbench.world import lexicon
from qbench.world.facts import MATERIAL_OF, PEOPLE, THINGS, Person, World, held_out

TIMES = (
    "In the morning", "At noon", "In the evening", "One day", "Last week", "On a cold day",
    "Yesterday", "In spring", "After lunch", "Before sunset",
)  # fmt: skip

FACTS = {
    "home": ("{n} lives in the {v}.", "The home of {n} is in the {v}.",
             "In the {v} lives {n}."),
    "trade": ("{n} is a {v}.", "{n} works as a {v}.", "{n} earns money as a {v}."),
    "pet": ("{n} has a {v}.", "{n} keeps a {v} at home.", "The pet of {n} is a {v}."),
    "food": ("{n} likes {v}.", "{n} eats {v} every day.", "The favourite food of {n} is {v}."),
    "habit": ("{n} often {v}.", "In the evening {n} {v}.", "When work is done, {n} {v}."),
    "material": ("The {n} is made of {v}.", "People make a {n} from {v}.",
                 "You need {v} for a {n}."),
    "room": ("The {n} is kept in the {v}.", "You find the {n} in the {v}.",
             "In the {v} is the {n}."),
    "colour": ("The {n} is {v}.", "The colour of the {n} is {v}.", "Somebody painted the {n} {v}."),
    "owner": ("The {n} is used by the {v}.", "The {v} uses the {n}.",
              "The {n} belongs to the {v}."),
}  # fmt: skip
"""Attribute -> how it is stated."""

QUESTIONS = {
    "home": ("Where does {n} live?", "Where is the home of {n}?", "Where do you find {n}?"),
    "trade": ("What is the trade of {n}?", "What does {n} work as?", "How does {n} earn money?"),
    "pet": ("Which animal does {n} have?", "What is the pet of {n}?",
            "What does {n} keep at home?"),
    "food": ("What does {n} like to eat?", "What is the favourite food of {n}?",
             "What does {n} eat every day?"),
    "habit": ("What does {n} do in the evening?", "What is the habit of {n}?",
              "What does {n} often do?"),
    "material": ("What is the {n} made of?", "What do people make a {n} from?",
                 "What do you need for a {n}?"),
    "room": ("Where is the {n} kept?", "Where do you find the {n}?",
             "Where does the {n} belong?"),
    "colour": ("Which colour is the {n}?", "What is the colour of the {n}?",
               "How is the {n} painted?"),
    "owner": ("Who uses the {n}?", "Whose is the {n}?", "Who works with the {n}?"),
}  # fmt: skip
"""Attribute -> how it is asked about."""

WHICH = {
    "home": ("Who lives in the {v}?", "Who is at home in the {v}?"),
    "trade": ("Who is a {v}?", "Who works as a {v}?"),
    "pet": ("Who has a {v}?", "Who keeps a {v} at home?"),
    "food": ("Who likes {v}?", "Who eats {v} every day?"),
    "habit": ("Who often {v}?", "Who {v} in the evening?"),
    "material": ("What is made of {v}?", "What do people make from {v}?"),
    "room": ("What is kept in the {v}?", "What do you find in the {v}?"),
    "colour": ("What is {v}?", "What is painted {v}?"),
    "owner": ("What does the {v} use?", "What belongs to the {v}?"),
}
"""Attribute -> how it is asked who or what has a value of it."""

ANSWERS = {
    "home": "in the {v}", "trade": "as a {v}", "pet": "a {v}", "food": "{v}", "habit": "{v}",
    "material": "{v}", "room": "in the {v}", "colour": "{v}", "owner": "the {v}",
}  # fmt: skip

WHAT_HAPPENS = {
    "fall": ("What will the {t} do if it falls on the floor?",
             "How does the {t} end after a fall?", "After a fall, what will the {t} do?"),
    "river": ("What will the {t} do if it lands in the river?",
              "How does the {t} end in the water?", "In the river, what will the {t} do?"),
    "fire": ("What will the {t} do if it lies in the fire?",
             "How does the {t} end in the fire?", "In the fire, what will the {t} do?"),
    "rain": ("What will the {t} do if it lies in the rain?",
             "How does the {t} end in the rain?", "In the rain, what will the {t} do?"),
}  # fmt: skip
"""Rule -> how its outcome is asked about."""

IS = ("is {n} {v}", "would you call {n} {v}", "do people say that {n} is {v}")
"""How it is asked whether somebody has a trait."""

NEEDS = ("When {n} is {f}, {s} will", "{n} is {f}. Now {s} should")
GOALS = ("How does {n} {g}?", "What does {n} need to {g}?", "{n} wants to {g}. How?")
SOLUTION = "{n} takes the {tool} to {g}."


def pairs(world: World, trait: str, side: int) -> list[tuple[Person, Person]]:
    """Every two people whom one pronoun fits, the first on this side of the trait."""
    first, second = lexicon.TRAITS[trait][side], lexicon.TRAITS[trait][1 - side]
    return [
        (a, b)
        for a in PEOPLE
        for b in PEOPLE
        if a.she == b.she
        and world.traits[a.name][trait] == first
        and world.traits[b.name][trait] == second
    ]


def thing_pairs(world: World, quality: str, side: int) -> list[tuple[str, str]]:
    """Every two things, the first on this side of the quality and the second on the other."""
    first, second = lexicon.QUALITIES[quality][side], lexicon.QUALITIES[quality][1 - side]
    by_value: dict[str, list[str]] = {}
    for thing, facts in world.qualities.items():
        by_value.setdefault(facts[quality], []).append(thing)
    return [(a, b) for a in by_value[first] for b in by_value[second]]


def question(text: str, answer: str) -> str:
    """A question page's form, the one the ARC and PIQA prompts have."""
    return f"Question: {text}\nAnswer: {answer}"


def happening(rule: str, thing: str, person: Person, by_person: bool) -> str:
    """How a thing comes under a rule, up to the outcome."""
    alone, by = lexicon.HAPPENINGS[rule]
    cause = f"{person.name} {by.format(thing=thing)}" if by_person else f"the {thing} {alone}"
    return f"If {cause}, the {thing} will"


def activity_steps(activity: str, person: Person) -> list[str]:
    """What a person does in an activity, the first step with the name and then the pronoun."""
    steps = lexicon.ACTIVITIES[activity]
    return [f"{person.name if i == 0 else person.capital} {step}." for i, step in enumerate(steps)]


def story(number: int, twin: int, person: Person, place: str) -> tuple[list[str], list[str]]:
    """The four sentences of a story and its two endings, the right one first."""
    sentences, endings = lexicon.STORIES[number]
    words = {"n": person.name, "s": person.capital, "s2": person.she, "p": place}
    told = [(s if isinstance(s, str) else s[twin]).format(**words) for s in sentences]
    ordered = (endings[twin], endings[1 - twin])
    return told, [ending.format(**words) for ending in ordered]


def passage(
    world: World, a: Person, b: Person, traits: Sequence[str], rng: random.Random
) -> tuple[str, list[tuple[str, str, bool]]]:
    """A titled passage about two people, and (name, trait, answer) of what can be asked.

    Whether somebody has a trait is asked by the trait's first word alone.
    """
    facts, asked = [], []
    for person in (a, b):
        for trait in traits:
            true = world.traits[person.name][trait]
            facts.append(f"{person.name} is {true}.")
            asked.append((person.name, trait, true == lexicon.TRAITS[trait][0]))
        home = world.people[person.name]["home"]
        facts.append(rng.choice(FACTS["home"]).format(n=person.name, v=home))
    rng.shuffle(facts)
    return f"{a.name} and {b.name} -- {' '.join(facts)}", asked


def whether(name: str, trait: str, form: int) -> str:
    """A yes-or-no question about somebody, as BoolQ writes it."""
    return IS[form].format(n=name, v=lexicon.TRAITS[trait][0])


def unlike(world: World, a: Person, b: Person) -> list[str]:
    """The traits in which two people differ."""
    return [t for t in lexicon.TRAITS if world.traits[a.name][t] != world.traits[b.name][t]]


def document(world: World, rng: random.Random) -> str:
    """One document of a kind drawn at random, about nothing that is held out."""
    kinds, weights = zip(*KINDS, strict=True)
    return rng.choices(kinds, weights)[0](world, rng)


def documents(world: World, seed: str, count: int) -> Iterator[str]:
    """``count`` documents; the same for the same world, seed and count."""
    rng = random.Random(f"prose {seed}")
    for _ in range(count):
        yield document(world, rng)


def _until_open(draw: Callable[[], tuple[tuple[Any, ...], str]]) -> str:
    """Draw until the key is not held out."""
    while True:
        key, text = draw()
        if not held_out(*key):
            return text


def _about_person(world: World, rng: random.Random) -> str:
    name = rng.choice(PEOPLE).name
    traits = [f"{name} is {value}." for value in world.traits[name].values()]
    return _portrait(name, world.people, rng.sample(traits, 2), rng)


def _about_thing(world: World, rng: random.Random) -> str:
    thing = rng.choice(THINGS)
    qualities = [f"The {thing} is {value}." for value in world.qualities[thing].values()]
    return _portrait(thing, world.things, rng.sample(qualities, 2), rng)


def _portrait(
    name: str, table: dict[str, dict[str, str]], more: list[str], rng: random.Random
) -> str:
    """Every fact about one person or thing and some more, in random order and words."""
    told = [
        rng.choice(FACTS[attribute]).format(n=name, v=v) for attribute, v in table[name].items()
    ]
    told += more
    rng.shuffle(told)
    return " ".join(told)


def _facts(world: World, rng: random.Random) -> str:
    """Facts about different people and things."""
    told = []
    for _ in range(5):
        name, attribute, value = any_fact(world, rng)
        told.append(rng.choice(FACTS[attribute]).format(n=name, v=value))
    return " ".join(told)


def any_fact(world: World, rng: random.Random) -> tuple[str, str, str]:
    """Who or what, which attribute, its value."""
    table = world.people if rng.random() < 0.5 else world.things
    name = rng.choice(list(table))
    attribute = rng.choice(list(table[name]))
    return name, attribute, table[name][attribute]


def _fact_questions(world: World, rng: random.Random) -> str:
    def draw() -> tuple[tuple[Any, ...], str]:
        name, attribute, value = any_fact(world, rng)
        form = rng.randrange(len(QUESTIONS[attribute]))
        asked = QUESTIONS[attribute][form].format(n=name)
        return ("fact", name, attribute, form), question(asked, ANSWERS[attribute].format(v=value))

    return "\n".join(_until_open(draw) for _ in range(3))


def _which_questions(world: World, rng: random.Random) -> str:
    """Who or what it is that has an attribute."""

    def draw() -> tuple[tuple[Any, ...], str]:
        name, attribute, value = any_fact(world, rng)
        asked = rng.choice(WHICH[attribute]).format(v=value)
        return ("which", name, attribute), question(asked, whole_name(name))

    return "\n".join(_until_open(draw) for _ in range(3))


def whole_name(name: str) -> str:
    """A person's name, or a thing with its article."""
    return f"the {name}" if name in MATERIAL_OF else name


def _rules(world: World, rng: random.Random) -> str:
    """What becomes of things, by person, by itself and by material."""

    def draw() -> tuple[tuple[Any, ...], str]:
        thing, rule = rng.choice(THINGS), rng.choice(list(lexicon.RULES))
        person, by_person = rng.choice(PEOPLE), rng.random() < 0.5
        outcome = world.outcome(thing, rule)
        text = f"{happening(rule, thing, person, by_person)} {outcome}."
        if rng.random() < 0.3:
            text += f" The {thing} is made of {MATERIAL_OF[thing]}."
        closed = held_out("rule", thing, rule)
        key = ("rule", thing, rule) if closed else ("happening", thing, rule, person.name)
        return key, text

    return " ".join(_until_open(draw) for _ in range(3))


def _rule_questions(world: World, rng: random.Random) -> str:
    def draw() -> tuple[tuple[Any, ...], str]:
        thing, rule = rng.choice(THINGS), rng.choice(list(lexicon.RULES))
        asked = rng.choice(WHAT_HAPPENS[rule]).format(t=thing)
        return ("rule", thing, rule), question(asked, world.outcome(thing, rule))

    return "\n".join(_until_open(draw) for _ in range(3))


def _needs(world: World, rng: random.Random) -> str:
    def draw() -> tuple[tuple[Any, ...], str]:
        person, feeling = rng.choice(PEOPLE), rng.choice(list(lexicon.NEEDS))
        form = rng.randrange(len(NEEDS))
        text = NEEDS[form].format(n=person.name, f=feeling, s=person.she)
        return ("need", person.name, feeling, form), f"{text} {lexicon.NEEDS[feeling]}."

    return " ".join(_until_open(draw) for _ in range(3))


def _because(world: World, rng: random.Random) -> str:
    """Who did what to whom and why, by name and by pronoun."""

    def draw() -> tuple[tuple[Any, ...], str]:
        number = rng.randrange(len(lexicon.BECAUSE))
        deed, trait, side = lexicon.BECAUSE[number]
        a, b = rng.choice(pairs(world, trait, side))
        twin = rng.randrange(2)
        who = (a, b)[twin].name if rng.random() < 0.85 else a.she
        reason = lexicon.TRAITS[trait][side if twin == 0 else 1 - side]
        text = f"{a.name} {deed.format(b=b.name)} because {who} was {reason}."
        return ("because", number, a.name, b.name), text

    return " ".join(_until_open(draw) for _ in range(3))


def _so(world: World, rng: random.Random) -> str:
    """What came of it for the one and for the other."""

    def draw() -> tuple[tuple[Any, ...], str]:
        number, side = rng.randrange(len(lexicon.SO)), rng.randrange(2)
        deed, trait, results = lexicon.SO[number]
        a, b = rng.choice(pairs(world, trait, side))
        twin = rng.randrange(2)
        result = results[side if twin == 0 else 1 - side]
        text = f"{deed.format(a=a.name, b=b.name)}, so {(a, b)[twin].name} {result}."
        return ("so", number, a.name, b.name), text

    return " ".join(_until_open(draw) for _ in range(3))


def _between_things(world: World, rng: random.Random) -> str:
    def draw() -> tuple[tuple[Any, ...], str]:
        number = rng.randrange(len(lexicon.BETWEEN_THINGS))
        deed, quality, side = lexicon.BETWEEN_THINGS[number]
        a, b = rng.choice(thing_pairs(world, quality, side))
        twin = rng.randrange(2)
        reason = lexicon.QUALITIES[quality][side if twin == 0 else 1 - side]
        text = f"{deed.format(a=a, b=b)} because the {(a, b)[twin]} was {reason}."
        return ("between", number, a, b), text

    return " ".join(_until_open(draw) for _ in range(3))


def _activity(world: World, rng: random.Random) -> str:
    def draw() -> tuple[tuple[Any, ...], str]:
        person, activity = rng.choice(PEOPLE), rng.choice(list(lexicon.ACTIVITIES))
        title = f"{activity}: " if rng.random() < 0.7 else f"{rng.choice(TIMES)} "
        text = title + " ".join(activity_steps(activity, person))
        return ("activity", activity, person.name), text

    return _until_open(draw)


def _story(world: World, rng: random.Random) -> str:
    def draw() -> tuple[tuple[Any, ...], str]:
        number, person = rng.randrange(len(lexicon.STORIES)), rng.choice(PEOPLE)
        place = rng.choice(lexicon.PLACES)
        told, endings = story(number, rng.randrange(2), person, place)
        return ("story", number, person.name, place), " ".join([*told, endings[0]])

    return _until_open(draw)


def _passage(world: World, rng: random.Random) -> str:
    """Two people, and yes-or-no questions that are not held out."""
    while True:
        a, b = rng.sample(PEOPLE, 2)
        traits = unlike(world, a, b)
        if traits:
            break
    text, asked = passage(world, a, b, rng.sample(traits, min(2, len(traits))), rng)
    cases = [(*case, form) for case in asked for form in range(len(IS))]
    cases = [case for case in cases if not held_out("asked", case[0], case[1], case[3])]
    lines = [
        question(f"{whether(name, trait, form)}?", "yes" if answer else "no")
        for name, trait, answer, form in rng.sample(cases, min(3, len(cases)))
    ]
    return "\n".join([text, *lines])


def _how_to(world: World, rng: random.Random) -> str:
    def draw() -> tuple[tuple[Any, ...], str]:
        person, tool = rng.choice(PEOPLE), rng.choice(list(lexicon.TOOLS))
        goal = rng.choice(lexicon.TOOLS[tool])
        answer = SOLUTION.format(n=person.name, tool=tool, g=goal)
        asked = rng.choice(GOALS).format(n=person.name, g=goal)
        text = question(asked, answer) if rng.random() < 0.7 else answer
        return ("tool", person.name, goal), text

    return "\n".join(_until_open(draw) for _ in range(2))


KINDS: tuple[tuple[Callable[[World, random.Random], str], float], ...] = (
    (_about_person, 6), (_about_thing, 7), (_facts, 6), (_fact_questions, 11),
    (_which_questions, 6), (_rules, 9), (_rule_questions, 7), (_needs, 4), (_because, 14),
    (_so, 8), (_between_things, 8), (_activity, 4), (_story, 8), (_passage, 14), (_how_to, 6),
)  # fmt: skip
"""Kinds of documents and how often each is written."""
