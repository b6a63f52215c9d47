"""`clinic`: short clinical notes with their triples, generated from a seed.

A note is an opening and one to three facts of one specialty; the output lists the facts in the
order of the text, one `head_relation_tail` per line, as in the original's extraction task. The rows
carry a `specialty` column, so that `--partition by-column:specialty` makes the clinics.

`clinic.json` holds the words. Each specialty has entities, relations and phrasings of its own, so a
model that has seen only one clinic cannot know what another clinic's triples look like. Nothing in
it is medical advice: the names are real words, and their combinations are drawn at random.
"""

import json
import random
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True)
class Relation:
    """One kind of fact: `head` and `tail` name lists of entities, phrasings hold both as fields."""

    name: str
    head: str
    tail: str
    phrasings: list[str]


@dataclass(frozen=True)
class Specialty:
    """What one kind of clinic writes about."""

    name: str
    openings: list[str]
    entities: dict[str, list[str]]
    relations: list[Relation]


SPECIALTIES = [
    Specialty(**{**entry, "relations": [Relation(**relation) for relation in entry["relations"]]})
    for entry in json.loads(files("fedfora.data").joinpath("clinic.json").read_text("utf-8"))
]
INSTRUCTION = "List the triples of this note.\n"
_SPLITS = {"train": (1, 2400), "test": (2, 240)}  # seed, and number of rows

Fact = tuple[Relation, str, str]


def clinic_rows(split: str = "train") -> list[dict[str, str]]:
    """Return the rows of a split: instruction, input, output, specialty; the same ones every time.

    "train" has 2,400 rows, "test" 240, and no note of it is in "train". The specialties take turns,
    so every prefix of a multiple of four rows is balanced.

    Raises:
        ValueError: If there is no such split.
    """
    if split not in _SPLITS:
        raise ValueError(f"clinic has no split {split!r} (it has: {', '.join(_SPLITS)})")
    seed, num_rows = _SPLITS[split]
    rng = random.Random(f"clinic:{seed}")
    seen = {row["input"] for row in clinic_rows("train")} if split == "test" else set()
    rows: list[dict[str, str]] = []
    while len(rows) < num_rows:
        specialty = SPECIALTIES[len(rows) % len(SPECIALTIES)]
        row = note_row(specialty, draw_facts(specialty, rng), rng)
        if row["input"] not in seen:
            seen.add(row["input"])
            rows.append(row)
    return rows


def draw_facts(specialty: Specialty, rng: random.Random) -> list[Fact]:
    """Draw one to three different facts of a specialty."""
    entities = specialty.entities
    return [
        (relation, rng.choice(entities[relation.head]), rng.choice(entities[relation.tail]))
        for relation in rng.sample(specialty.relations, rng.choice((1, 2, 2, 3)))
    ]


def note_row(specialty: Specialty, facts: list[Fact], rng: random.Random) -> dict[str, str]:
    """Write facts as a note in the specialty's words, with the triples as the output."""
    return {
        "instruction": INSTRUCTION,
        "input": note_text(specialty, facts, rng),
        "output": "\n".join(f"{head}_{relation.name}_{tail}" for relation, head, tail in facts),
        "specialty": specialty.name,
    }


def note_text(specialty: Specialty, facts: list[Fact], rng: random.Random) -> str:
    """Write facts as a note: an opening, then one sentence for each fact."""
    sentences = [rng.choice(specialty.openings)]
    for relation, head, tail in facts:
        sentence = rng.choice(relation.phrasings).format(head=head, tail=tail)
        sentences.append(sentence[0].upper() + sentence[1:])
    return " ".join(sentences)
