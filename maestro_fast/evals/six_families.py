"""Tier 3 of the suite: the prompts of six families that want opposite things, made from word lists.

    python -m maestro_fast.evals.six_families examples/six_families

The families are a short fact, a warm support answer, JSON with given keys, a rewrite under constraints, a list of
exactly n items, and the opening of a story. Each row says in ``truth`` what its answer has to be, so that the utility
can check it by rule. The three files have no fact, customer's item, sentence, kind of list or hero in common.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

SIZES = {"train": 67, "validation": 10, "test": 20}  # prompts of each family
SEED = 0
Row = dict[str, Any]


def _words(text: str) -> list[str]:
    return text.split()


CAPITALS = """France Paris, Italy Rome, Spain Madrid, Germany Berlin, Japan Tokyo, England London, Greece Athens,
Russia Moscow, China Beijing, Egypt Cairo, Austria Vienna, Portugal Lisbon, Ireland Dublin, Sweden Stockholm,
Norway Oslo, Denmark Copenhagen, Finland Helsinki, Poland Warsaw, Hungary Budapest, Belgium Brussels, Canada Ottawa,
Cuba Havana, Peru Lima, Chile Santiago, Kenya Nairobi, Thailand Bangkok, Iran Tehran, Iraq Baghdad, Turkey Ankara,
Ukraine Kyiv, Romania Bucharest, Bulgaria Sofia, Croatia Zagreb, Serbia Belgrade, Indonesia Jakarta, Vietnam Hanoi,
Nepal Kathmandu, Lebanon Beirut, Scotland Edinburgh, Australia Canberra"""
OPPOSITES = """hot cold, big small, fast slow, up down, day night, old young, wet dry, light dark, hard soft,
full empty, rich poor, happy sad, open closed, high low, long short, strong weak, early late, clean dirty, loud quiet,
true false, left right, thick thin, sweet sour, near far"""
YOUNG = """dog puppy, cat kitten, cow calf, sheep lamb, horse foal, duck duckling, lion cub, frog tadpole, goat kid,
pig piglet"""
MONTHS = _words("January February March April May June July August September October November December")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

ITEMS = _words(
    "kettle jacket lamp blender backpack keyboard toaster watch tent printer scooter camera blanket mirror bicycle "
    "guitar umbrella wallet teapot headset"
)
PROBLEMS = ["arrived broken", "never arrived", "came in the wrong colour", "stopped working", "is missing a part"]

FIRST_NAMES = _words(
    "Anna Boris Clara David Elena Felix Greta Hugo Irene Jonas Karin Leo Maria Nils Olga Peter Rosa Simon Tina Viktor "
    "Alice Bruno Carla Dylan Edith Frank Gina Harold Isla Jack"
)
CITIES = _words("Oslo Rome Lima Cairo Paris Delhi Tokyo Berlin Boston Madrid Dublin Vienna Athens Lisbon Sydney")
COLOURS = _words("red blue green black white yellow brown grey purple pink")
THINGS = _words("chair cup shirt bag hat scarf bowl desk clock pen sofa bottle box coat plate")
PETS = _words("dog cat horse rabbit parrot turtle goat hamster duck pony")

WHO = _words(
    "baker teacher farmer doctor sailor painter plumber singer pilot gardener butcher tailor driver captain miner "
    "nurse lawyer waiter judge dentist"
)
DOES = """opens shop, repairs bridge, closes library, sells boat, paints fence, moves piano, cleans kitchen,
visits museum, borrows ladder, inspects tunnel"""
WHY = [
    "it had been raining very hard for several days without any pause at all",
    "the people of the village had asked for it again and again since last summer",
    "there was really not enough money left at the end of the long and cold winter",
    "the old road to the valley had been blocked by a great number of fallen trees",
]
AT_MOST = 10  # words of a rewrite

LISTS = """fruits: apple banana orange pear grape mango peach plum cherry kiwi lemon lime melon strawberry blueberry
raspberry pineapple apricot fig watermelon papaya coconut grapefruit pomegranate
colours: red blue green yellow orange purple black white brown pink grey gray violet indigo turquoise gold silver
animals: dog cat horse cow pig lion tiger elephant bear wolf fox rabbit deer monkey giraffe zebra sheep goat dolphin
whale eagle penguin kangaroo panda snake turtle frog owl bird fish mouse camel leopard cheetah
countries: france germany italy spain japan china india brazil canada mexico egypt kenya russia australia england
greece sweden norway poland portugal argentina chile peru turkey
vegetables: carrot potato tomato onion cabbage spinach broccoli cauliflower lettuce cucumber pepper celery pea bean
garlic pumpkin corn radish beet turnip zucchini eggplant kale asparagus
tools: hammer saw screwdriver wrench drill pliers axe shovel rake chisel knife level tape spade hoe file clamp
metals: iron gold silver copper tin lead zinc nickel aluminum aluminium steel titanium platinum mercury brass bronze
planets: mercury venus earth mars jupiter saturn uranus neptune
sports: football soccer tennis basketball baseball hockey golf swimming rugby cricket volleyball boxing cycling running
skiing badminton gymnastics athletics
instruments: piano guitar violin drum flute trumpet cello harp clarinet saxophone trombone oboe bass organ banjo viola
jobs: teacher doctor nurse farmer baker lawyer engineer pilot chef driver painter writer scientist carpenter plumber
dentist artist accountant architect manager
flowers: rose tulip daisy lily sunflower orchid violet daffodil lavender iris carnation poppy peony marigold jasmine
birds: eagle owl robin sparrow parrot penguin duck swan hawk crow pigeon falcon flamingo peacock ostrich gull goose
hummingbird raven woodpecker cardinal finch
clothes: shirt hat coat sock shoe trouser pant jacket dress skirt scarf glove sweater belt tie jeans boot shorts blouse
drinks: water tea coffee milk juice soda beer wine lemonade cola smoothie cocoa chocolate
subjects: math mathematics history science english biology chemistry physics geography art music economics literature
philosophy psychology
furniture: chair table bed desk sofa couch shelf bookshelf bookcase wardrobe cabinet stool dresser bench nightstand lamp
trees: oak pine maple birch willow elm ash cedar spruce fir beech palm poplar redwood cherry sycamore
months: january february march april may june july august september october november december
weekdays: monday tuesday wednesday thursday friday saturday sunday
languages: english french german spanish italian chinese mandarin japanese russian arabic portuguese hindi korean latin
greek turkish swedish dutch
insects: ant bee butterfly beetle fly mosquito wasp moth cricket grasshopper dragonfly ladybug termite cockroach
vehicles: car bus train truck bicycle bike motorcycle boat ship airplane plane helicopter scooter tram van subway taxi
desserts: cake pie cookie pudding tart brownie cheesecake tiramisu sorbet muffin donut mousse ice
organs: heart liver lung kidney brain stomach skin pancreas spleen intestine bladder"""

HEROES = _words(
    "Mira Tobias Selma Arlo Ines Casper Wanda Edgar Thea Rufus Nadia Oscar Livia Gustav Petra Milo Freya Anton Dora "
    "Emil"
)
ROLES = ["lonely baker", "young sailor", "tired doctor", "brave painter", "poor farmer"]


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(first, second) for first, second in (entry.split() for entry in text.split(","))]


def _parted(things: Sequence[Any], rng: random.Random) -> dict[str, list[Any]]:
    """Shuffles the things and deals them out to the splits in proportion to ``SIZES``."""
    shuffled = rng.sample(list(things), len(things))
    total, begin, parts = sum(SIZES.values()), 0, {}
    for name, end in (("test", SIZES["test"]), ("validation", SIZES["test"] + SIZES["validation"]), ("train", total)):
        until = round(len(shuffled) * end / total)
        parts[name], begin = shuffled[begin:until], until
    return parts


def _crossed(first: Sequence[Any], second: Sequence[Any], rng: random.Random) -> dict[str, list[tuple[Any, Any]]]:
    """Pairs of both, in random order; no member of ``first`` is in two splits."""
    return {
        name: rng.sample(found := [*product(part, second)], len(found)) for name, part in _parted(first, rng).items()
    }


def facts(rng: random.Random) -> dict[str, list[Row]]:
    """Short questions with one right answer; the rivals are the answers to the other questions of the same sort."""
    asked: list[tuple[str, str, list[str]]] = []
    for text, question in (
        (CAPITALS, "What is the capital of {}?"),
        (OPPOSITES, "What is the opposite of {}?"),
        (YOUNG, "What is a young {} called?"),
    ):
        pairs = _pairs(text)
        asked += [(question.format(thing), answer, [other for _, other in pairs]) for thing, answer in pairs]
    for names, question in ((MONTHS, "Which month comes after {}?"), (DAYS, "Which day comes after {}?")):
        following = [*names[1:], names[0]]
        asked += [(question.format(one), after, names) for one, after in zip(names, following, strict=True)]
    numbers = [str(n) for n in range(21)]
    asked += [(f"What is {a} plus {b}?", str(a + b), numbers) for a, b in ((2, 3), (4, 5), (6, 2), (7, 3))]
    rows = []
    for question, answer, rivals in asked:
        known = (answer, *_words(question.rstrip("?")))
        others = [other for other in rivals if other not in known]
        rows.append(_row(question, "fact", {"answer": answer, "rivals": others}))
    return _parted(rows, rng)


def supports(rng: random.Random) -> dict[str, list[Row]]:
    """Complaints of customers."""
    return {
        name: [
            _row(
                f'Write a kind reply to a customer who says: "My {item} {problem}."',
                "support",
                {"item": item},
            )
            for item, problem in pairs
        ]
        for name, pairs in _crossed(ITEMS, PROBLEMS, rng).items()
    }


def objects(rng: random.Random) -> dict[str, list[Row]]:
    """Sentences whose facts go into a JSON object."""

    def record(i: int, name: str) -> tuple[str, dict[str, str | int]]:
        city, colour, pet, thing = (rng.choice(words) for words in (CITIES, COLOURS, PETS, THINGS))
        age, price = rng.randint(18, 79), rng.randint(3, 95)
        records: tuple[tuple[str, dict[str, str | int]], ...] = (
            (f"{name} is {age} and lives in {city}.", {"name": name, "age": age, "city": city}),
            (f"{name} has a {colour} {pet}.", {"owner": name, "pet": pet, "colour": colour}),
            (f"{name} buys a {thing} for {price} dollars.", {"buyer": name, "item": thing, "price": price}),
            (f"The {colour} {thing} belongs to {name}.", {"item": thing, "colour": colour, "owner": name}),
        )
        return records[i]

    def row(sentence: str, values: dict[str, str | int]) -> Row:
        *some, last = (f'"{key}"' for key in values)
        prompt = f"{sentence} Write this as a JSON object with the keys {', '.join(some)} and {last}."
        return _row(prompt, "json", {"values": values})

    crossed = _crossed(FIRST_NAMES, range(4), rng)
    return {name: [row(*record(i, person)) for person, i in pairs] for name, pairs in crossed.items()}


def rewrites(rng: random.Random) -> dict[str, list[Row]]:
    """Long sentences that have to become short, with some words kept and one avoided."""
    deeds = _pairs(DOES)
    found: dict[str, list[Row]] = {}
    for name, pairs in _crossed(WHO, range(len(deeds)), rng).items():
        found[name] = []
        for who, i in pairs:
            (does, what), day = deeds[i], rng.choice(DAYS)
            source = f"The {who} {does} the {what} on {day} because {rng.choice(WHY)}."
            asked = f"Say this in at most {AT_MOST} words, with {who}, {does}, {what} and {day}, and without because."
            truth = {"keep": [who, does, what, day], "avoid": ["because"], "words": AT_MOST, "source": source}
            found[name].append(_row(f"{source} {asked}", "rewrite", truth))
    return found


def lists(rng: random.Random) -> dict[str, list[Row]]:
    """Lists of exactly n members of a kind."""
    return {
        name: [
            _row(f"List exactly {count} {kind}.", "list", {"count": count, "members": members})
            for (kind, members), count in pairs
        ]
        for name, pairs in _crossed(_kinds(), range(3, 7), rng).items()
    }


def _kinds() -> list[tuple[str, list[str]]]:
    """Every kind of list with its members."""
    found: list[tuple[str, list[str]]] = []
    for word in LISTS.split():
        if word.endswith(":"):
            found.append((word[:-1], []))
        else:
            found[-1][1].append(word)
    return found


def openings(rng: random.Random) -> dict[str, list[Row]]:
    """Heroes of stories."""
    return {
        name: [
            _row(
                f"Begin a story about {hero}, a {role}, with two sentences.",
                "opening",
                {"names": [hero, role.split()[-1]]},
            )
            for hero, role in pairs
        ]
        for name, pairs in _crossed(HEROES, ROLES, rng).items()
    }


FAMILIES: tuple[Callable[[random.Random], dict[str, list[Row]]], ...] = (
    facts,
    supports,
    objects,
    rewrites,
    lists,
    openings,
)


def _row(prompt: str, family: str, truth: dict[str, Any]) -> Row:
    return {"prompt": prompt, "family": family, "truth": truth}


def splits() -> dict[str, list[Row]]:
    """The rows of each file; the families take turns."""
    made = [family(random.Random(f"{SEED} {i}")) for i, family in enumerate(FAMILIES)]
    return {name: list(_in_turns([rows[name][:size] for rows in made])) for name, size in SIZES.items()}


def _in_turns(families: Sequence[Sequence[Row]]) -> Iterator[Row]:
    for rows in zip(*families, strict=True):
        yield from rows


def write(folder: Path) -> None:
    """Writes train.jsonl, validation.jsonl and test.jsonl."""
    for name, rows in splits().items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Writes the prompts of six families.")
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)
