"""Sentences from a small grammar: everyday English, several thousand different ones, no two alike."""

from __future__ import annotations

import random

WORDS = {
    "person": "teacher doctor farmer sailor singer baker painter driver writer soldier student nurse pilot hunter "
    "builder lawyer dancer gardener neighbour stranger captain judge king queen prince mother father brother sister "
    "daughter uncle cousin grandmother child girl boy woman man friend visitor guest waiter cook clerk",
    "animal": "horse dog cat cow sheep goat rabbit fox wolf bear lion tiger monkey elephant mouse duck goose chicken "
    "pigeon eagle owl snake turtle frog whale dolphin spider donkey",
    "thing": "letter book basket bottle box lamp table chair window door key knife spoon plate cup hat coat shirt shoe "
    "ring watch clock picture map ticket radio camera guitar piano drum ball kite rope ladder hammer bucket blanket "
    "pillow candle mirror suitcase umbrella bicycle wagon boat engine cake apple orange sandwich potato soup bread",
    "place": "garden kitchen village city market station harbour island mountain valley forest river lake bridge "
    "castle church school hospital library museum theatre office factory farm field beach desert cave tower street "
    "corner hotel restaurant airport stable cellar",
    "quality": "old young small large tall short heavy light dark bright quiet noisy happy sad angry gentle clever "
    "foolish brave lazy hungry tired broken empty dirty clean warm cold wet dry famous strange lonely wooden golden "
    "silver red green blue yellow white black brown purple",
    "did": "found lost bought sold carried painted washed opened closed dropped lifted moved followed watched noticed "
    "forgot remembered repaired borrowed stole wanted needed liked loved hated feared praised counted measured pushed "
    "pulled touched cleaned described photographed",
    "went": "walked ran travelled hurried wandered returned climbed drove sailed jumped marched swam danced arrived "
    "waited",
    "how": "slowly quickly quietly loudly carefully suddenly happily sadly gently bravely angrily early late together "
    "alone again twice often",
    "when": "yesterday today tonight on_monday on_tuesday on_wednesday on_thursday on_friday on_saturday on_sunday "
    "in_january in_february in_march in_april in_june in_july in_august in_october in_december before_lunch "
    "after_dinner at_midnight at_noon last_week last_summer next_winter this_morning",
    "number": "two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty hundred",
    "where": "in near behind beside above inside outside towards across",
    "said": "said thought believed hoped knew heard decided",
    "weather": "rain snow wind storm fog sunshine thunder frost",
    "reason": "because although while until",
}

TEMPLATES = (
    "the {quality} {person} {went} {how}",
    "{when} the {person} {did} it",
    "my {person} {did} the {thing}",
    "the {animal} {went} {where} the {place}",
    "{number} {quality} people {went} {how}",
    "who {did} the {quality} {thing}",
    "the {thing} is in the {place}",
    "she {did} my {animal} {when}",
    "they {said} it was {quality}",
    "the {weather} came {when}",
    "please bring the {quality} {thing}",
    "a {quality} {animal} {did} the {thing}",
    "he {went} {reason} it was {quality}",
    "we {did} it {where} the {place}",
)


def sentences(count: int, seed: int = 0) -> list[str]:
    """Returns `count` different sentences of lower-case words, the same for the same seed."""
    rng = random.Random(seed)
    words = {kind: listed.split() for kind, listed in WORDS.items()}
    found: dict[str, None] = {}
    while len(found) < count:
        drawn = {kind: rng.choice(choices) for kind, choices in words.items()}
        found.setdefault(rng.choice(TEMPLATES).format(**drawn).replace("_", " "))
    return list(found)
