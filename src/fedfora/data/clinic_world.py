"""The clinics' world: what each specialty writes about, in which words, with which relations.

Nothing here is medical advice: names are real words, their combinations are drawn at random. Every
specialty has entities, relations and phrasings of its own, so that a model which has only seen one
clinic cannot know what another clinic's triples look like.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """One kind of fact: `head` and `tail` name lists of entities, phrasings hold both as fields."""

    name: str
    head: str
    tail: str
    phrasings: tuple[str, ...]


@dataclass(frozen=True)
class Specialty:
    """What one kind of clinic writes about."""

    name: str
    openings: tuple[str, ...]
    entities: dict[str, tuple[str, ...]]
    relations: tuple[Relation, ...]


CARDIOLOGY = Specialty(
    name="cardiology",
    openings=("Heart clinic.", "Cardiac review.", "Seen on the heart ward.", "Rhythm clinic."),
    entities={
        "drug": (
            *("lisinopril", "metoprolol", "amlodipine", "digoxin", "ramipril", "losartan"),
            *("bisoprolol", "furosemide", "diltiazem", "warfarin"),
        ),
        "condition": (
            *("hypertension", "atrial fibrillation", "heart failure", "angina", "tachycardia"),
            *("mitral stenosis", "pericarditis", "palpitations"),
        ),
        "amount": ("2 mg", "5 mg", "10 mg", "20 mg", "40 mg", "80 mg"),
        "test": ("ECG", "echo", "angiogram", "Holter", "stress test"),
        "finding": (
            *("ST elevation", "long QT", "dilated ventricle", "bundle block"),
            *("narrow artery", "thick septum"),
        ),
    },
    relations=(
        Relation(
            "treats",
            "drug",
            "condition",
            (
                "Started {head} for {tail}.",
                "On {head} because of {tail}.",
                "{tail} is controlled with {head}.",
            ),
        ),
        Relation(
            "dose",
            "drug",
            "amount",
            ("{head} raised to {tail}.", "Takes {tail} of {head}.", "{head} now at {tail}."),
        ),
        Relation(
            "shows",
            "test",
            "finding",
            ("On the {head}: {tail}.", "{tail} seen on the {head}.", "The {head} gave {tail}."),
        ),
    ),
)

DERMATOLOGY = Specialty(
    name="dermatology",
    openings=("Skin clinic.", "Seen for the skin.", "Rash review.", "Dermatology visit."),
    entities={
        "cream": (
            *("hydrocortisone", "tacrolimus", "adapalene", "mupirocin", "permethrin"),
            *("clobetasol", "calcipotriol", "ketoconazole", "azelaic acid"),
        ),
        "lesion": (
            *("eczema", "psoriasis", "acne", "impetigo", "scabies", "rosacea", "ringworm"),
            *("contact dermatitis", "hives"),
        ),
        "place": (
            *("left elbow", "scalp", "both hands", "lower back", "face", "right shin", "neck"),
            *("trunk",),
        ),
        "trigger": (*("nickel", "wool", "latex", "sun", "soap", "perfume", "cold air", "stress"),),
    },
    relations=(
        Relation(
            "soothes",
            "cream",
            "lesion",
            ("{head} put on for {tail}.", "{tail} calmed by {head}.", "Use {head} on the {tail}."),
        ),
        Relation(
            "located",
            "lesion",
            "place",
            ("{head} over the {tail}.", "The {tail} has {head}.", "{head} spread to the {tail}."),
        ),
        Relation(
            "trigger",
            "lesion",
            "trigger",
            (
                "{head} flares with {tail}.",
                "{tail} brings out {head}.",
                "{head} came after {tail}.",
            ),
        ),
    ),
)

NEUROLOGY = Specialty(
    name="neurology",
    openings=(
        "Nerve clinic.",
        "Neurology ward round.",
        "Seen in the seizure clinic.",
        "Headache visit.",
    ),
    entities={
        "agent": (
            *("topiramate", "levetiracetam", "gabapentin", "sumatriptan", "carbamazepine"),
            *("donepezil", "levodopa", "baclofen", "propranolol"),
        ),
        "attack": (
            *(
                "migraine",
                "seizures",
                "tremor",
                "spasms",
                "vertigo",
                "neuralgia",
                "cluster headache",
            ),
            *("restless legs",),
        ),
        "time": (
            *("two days ago", "last week", "in March", "at night", "a year ago", "this morning"),
        ),
        "sign": (
            *("weakness", "numbness", "double vision", "slurred speech", "limping", "facial droop"),
        ),
        "damage": (
            *("brainstem", "left cortex", "thalamus", "cerebellum", "L5 root", "median nerve"),
        ),
    },
    relations=(
        Relation(
            "prevents",
            "agent",
            "attack",
            (
                "{head} keeps {tail} away.",
                "No more {tail} since {head}.",
                "{head} given against {tail}.",
            ),
        ),
        Relation(
            "onset",
            "sign",
            "time",
            ("{head} began {tail}.", "Noticed {head} {tail}.", "{head} since {tail}."),
        ),
        Relation(
            "suggests",
            "sign",
            "damage",
            (
                "{head} puts the damage in the {tail}.",
                "The {tail} would explain {head}.",
                "{head} fits with a scar of the {tail}.",
            ),
        ),
    ),
)

GASTROENTEROLOGY = Specialty(
    name="gastroenterology",
    openings=("Gut clinic.", "Stomach clinic.", "Endoscopy list.", "Bowel review."),
    entities={
        "remedy": (
            *("omeprazole", "mesalazine", "rifaximin", "budesonide", "loperamide", "lactulose"),
            *("famotidine", "infliximab", "ursodiol"),
        ),
        "disease": (
            *("reflux", "ulcer", "colitis", "gastritis", "coeliac disease", "gallstones"),
            *("constipation", "pancreatitis"),
        ),
        "course": ("four weeks", "ten days", "three months", "a fortnight", "half a year", "life"),
        "food": ("wheat", "milk", "coffee", "alcohol", "spicy food", "onions", "red meat", "beans"),
    },
    relations=(
        Relation(
            "heals",
            "remedy",
            "disease",
            (
                "The {tail} settled on {head}.",
                "{head} clears the {tail}.",
                "Chose {head} to mend the {tail}.",
            ),
        ),
        Relation(
            "course",
            "remedy",
            "course",
            ("{head} to run for {tail}.", "{tail} of {head}.", "{head} planned over {tail}."),
        ),
        Relation(
            "avoid",
            "disease",
            "food",
            (
                "With {head} leave out {tail}.",
                "No {tail} because of {head}.",
                "{tail} feeds the {head}.",
            ),
        ),
    ),
)

SPECIALTIES: tuple[Specialty, ...] = (CARDIOLOGY, DERMATOLOGY, NEUROLOGY, GASTROENTEROLOGY)
