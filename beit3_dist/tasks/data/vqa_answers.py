"""Answers of VQA v2: when two are the same, how right one is, and the scores that a model is trained on.

The rule is the benchmark's. Ten people answer a question. An answer is as right as the mean, over the ten, of
min(1, n / 3), where n is how many of the other nine gave it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
"""What is removed, or becomes a space; apostrophe and colon stay."""
PERIOD = re.compile(r"\.(?!\d)")
DIGITS_COMMA = re.compile(r"\d,\d")
NUMBERS = {
    word: str(value) for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
ARTICLES = ("a", "an", "the")
SHORT_FORMS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
""".split()
"""Short forms that are recognised with one of their apostrophes missing."""
APOSTROPHES = {
    form[:place] + form[place + 1 :]: form for form in SHORT_FORMS for place, letter in enumerate(form) if letter == "'"
} | {"somebody'd": "somebodyd"}
"""How they are written then. The last entry is the benchmark's own slip, and counts."""


def normalised(answer: str) -> str:
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    has_number = DIGITS_COMMA.search(text) is not None
    plain = text
    for mark in PUNCTUATION:
        # Next to a space, or anywhere in an answer like "1,000", a mark goes; elsewhere it parts two words.
        beside_space = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if beside_space or has_number else " ")
    words = (NUMBERS.get(word, word) for word in PERIOD.sub("", plain).lower().split())
    return " ".join(APOSTROPHES.get(word, word) for word in words if word not in ARTICLES)


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """How right a prediction is in [0, 1], by the answers of all people asked. All are normalised. (The benchmark's
    program leaves them as they are where everyone gave the same answer, which makes a difference only where that answer
    is not in its normal form.)"""
    predicted = normalised(prediction)
    matches = [normalised(answer) == predicted for answer in answers]
    others = (sum(matches) - match for match in matches)
    return sum(min(1.0, count / 3) for count in others) / len(answers)


def soft_scores(answers: Sequence[str]) -> dict[str, float]:
    """Normalised answers of ten people and their scores, in the order in which they were first given: 0.3, 0.6, 0.9 for
    what one, two or three gave, then 1, which is their mean accuracy."""
    return {answer: min(1.0, round(0.3 * count, 1)) for answer, count in Counter(map(normalised, answers)).items()}
