"""What is true in the bundled world: one draw of everybody's and everything's attributes.

The values of every attribute are dealt out evenly, so that no answer is more frequent than another.
"""

from __future__ import annotations

import hashlib
import random
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

SHARES = {"fact": 0.3, "which": 0.3, "rule": 0.3}
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
    """The facts of one seed."""

    def __init__(self, seed: int = 0) -> None:
        rng = random.Random(f"world {seed}")
        self.people: dict[str, dict[str, str]] = {p.name: {} for p in PEOPLE}
        for attribute, values in PERSON_ATTRIBUTES.items():
            dealt = _deal(values, len(PEOPLE), rng)
            for person, value in zip(PEOPLE, dealt, strict=True):
                self.people[person.name][attribute] = value
        self.things: dict[str, dict[str, str]] = {
            thing: {"material": material} for thing, material in MATERIAL_OF.items()
        }
        for attribute, values in list(THING_ATTRIBUTES.items())[1:]:
            for thing, value in zip(THINGS, _deal(values, len(THINGS), rng), strict=True):
                self.things[thing][attribute] = value

    def outcome(self, thing: str, rule: str) -> str:
        """How a thing ends under a rule, by what it is made of."""
        return lexicon.BEHAVIOUR[MATERIAL_OF[thing]][list(lexicon.RULES).index(rule)]


def held_out(kind: str, *key: object) -> bool:
    """Whether what this key names is kept out of the training corpus, for the questions.

    The same answer always: it hangs on the key alone.
    """
    digest = hashlib.sha256(repr((kind, *key)).encode()).digest()
    return int.from_bytes(digest[:4], "big") < SHARES.get(kind, 0.15) * 2**32


def _deal(values: tuple[str, ...], count: int, rng: random.Random) -> list[str]:
    dealt = [values[i % len(values)] for i in range(count)]
    rng.shuffle(dealt)
    return dealt
