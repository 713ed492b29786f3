"""What is true in the bundled world: one draw of everybody's and everything's attributes.

The values of an attribute are dealt out evenly, so that no answer is more frequent than another;
only what follows from a thing's material is not drawn.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qbench.world import lexicon

MATERIAL_OF = {thing: made for made, things in lexicon.THINGS.items() for thing in things}
THINGS = tuple(MATERIAL_OF)

PERSON_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "home": lexicon.PLACES,
    "trade": lexicon.TRADES,
    "pet": lexicon.ANIMALS,
    "food": lexicon.FOODS,
    "habit": lexicon.HABITS,
}
THING_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "material": tuple(lexicon.THINGS),
    "room": lexicon.ROOMS,
    "colour": lexicon.COLOURS,
    "owner": lexicon.TRADES,
}

SHARES = {"fact": 0.3, "which": 0.3, "rule": 0.3, "so": 0.25, "asked": 0.3}
"""Share of a kind's cases that is kept for the questions, where it is not 0.15."""


@dataclass(frozen=True)
class Person:
    """Somebody, with the pronouns that stand for them."""

    name: str
    she: str
    her: str

    @property
    def capital(self) -> str:
        """The pronoun at the start of a sentence."""
        return self.she.capitalize()


PEOPLE = tuple(
    [Person(name, "she", "her") for name in lexicon.WOMEN]
    + [Person(name, "he", "his") for name in lexicon.MEN]
)


class World:
    """The facts of one seed: who and what has which value of every attribute, trait and quality."""

    def __init__(self, seed: int = 0) -> None:
        rng = random.Random(f"world {seed}")
        names = [person.name for person in PEOPLE]
        self.people = _deal(PERSON_ATTRIBUTES, names, rng)
        self.things = _deal(THING_ATTRIBUTES, THINGS, rng)
        self.traits = _deal(lexicon.TRAITS, names, rng)
        self.qualities = _deal(lexicon.QUALITIES, THINGS, rng)
        for thing, material in MATERIAL_OF.items():
            self.things[thing]["material"] = material
            hard = material in lexicon.HARD
            self.qualities[thing]["hardness"] = "hard" if hard else "soft"

    def outcome(self, thing: str, rule: str) -> str:
        """How a thing ends under a rule, by what it is made of."""
        return lexicon.BEHAVIOUR[MATERIAL_OF[thing]][list(lexicon.RULES).index(rule)]


def held_out(kind: str, *key: object) -> bool:
    """Whether what this key names is kept out of the training corpus, for the questions.

    The same answer always: it hangs on the key alone.
    """
    digest = hashlib.sha256(repr((kind, *key)).encode()).digest()
    return int.from_bytes(digest[:4], "big") < SHARES.get(kind, 0.15) * 2**32


def _deal(
    attributes: Mapping[str, tuple[str, ...]], names: Sequence[str], rng: random.Random
) -> dict[str, dict[str, str]]:
    """Every name's value of every attribute, each value as often as the others."""
    table: dict[str, dict[str, str]] = {name: {} for name in names}
    for attribute, values in attributes.items():
        dealt = [values[i % len(values)] for i in range(len(names))]
        rng.shuffle(dealt)
        for name, value in zip(names, dealt, strict=True):
            table[name][attribute] = value
    return table
