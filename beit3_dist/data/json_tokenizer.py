"""Hugging Face's tokenizer.json, read by their library `tokenizers`, in the ids of the released models.

The file's tokens get other ids: <s> = 0, <pad> = 1, </s> = 2, <unk> = 3, all others from 4 on in the order of the
file's, <mask> behind them. So a model, its heads and all that is written for it are the same for any tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from beit3_dist.config import SPECIAL_ROWS
from beit3_dist.opening import one_line, parse_json, text_of, without_mark
from beit3_dist.optional import optional_module

ROLES = {
    "bos": ("<s>", "[CLS]", "<bos>", "<|startoftext|>", "<|begin_of_text|>", "<|bos|>"),
    "pad": ("<pad>", "[PAD]", "<|pad|>"),
    "eos": ("</s>", "[SEP]", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<|eos|>"),
    "unk": ("<unk>", "[UNK]", "<|unk|>"),
    "mask": ("<mask>", "[MASK]", "<|mask|>"),
}
"""What a special token is for -> the names that it may have, the first that a file holds. Ids 0 to 3 in this order."""
MOST_TOKENS = 1 << 22
"""Of a file; the largest in use have 262,144."""
WORD_BEGINS, BYTE_SPACE = "\u2581", "\u0120"
"""What stands for a space in pieces of SentencePiece's kind, and in those of bytes."""
REMEDY = "pip install -e '.[data]' brings it"
REASON = 300
"""Letters of the library's reason that are told."""


class JsonPieces:
    """What `TextTokenizer` asks of a file, by the ids above."""

    def __init__(self, content: bytes, name: str) -> None:
        """Raises ValueError, which calls the file `name`, where it is no tokenizer or lacks a special token."""
        try:
            file = parse_json(text_of(without_mark(content)))
            tokens = _tokens(file)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"text_tokenizer: {name!r} is no tokenizer.json: {one_line(error, REASON)}") from None
        if file["model"].get("dropout"):
            raise ValueError(
                f"text_tokenizer: {name!r} splits words at random (model.dropout), so that no run could be repeated: "
                "set it to null"
            )
        self.specials = _specials(file, tokens, name)
        """Of bos, pad, eos, unk and mask the names."""
        kept = {*self.specials.values()}
        ordinary = [token for token in tokens if token not in kept]
        bos, pad, eos, unk, mask = (self.specials[role] for role in ROLES)
        self.names = [bos, pad, eos, unk, *ordinary, mask]
        """Token of each id."""
        self.pieces = len(self.names) - 2
        self.content = json.dumps(_renumbered(file, self.names), ensure_ascii=False)
        """The file in these ids, for others to read."""
        try:
            self._open()
            known = self.library.get_vocab(with_added_tokens=True)
        except BaseException as error:  # the library's panics are no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"text_tokenizer: {name!r}: {one_line(error, REASON)}") from None
        if known != {token: number for number, token in enumerate(self.names)}:
            raise ValueError(f"text_tokenizer: {name!r}: the library numbers its tokens in another way")
        self._kinds = {part["type"] for part in _parts(file) if isinstance(part.get("type"), str)}
        self._model = file["model"]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "library"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state
        self._open()

    def _open(self) -> None:
        self.library = optional_module("tokenizers", "a tokenizer.json", REMEDY).Tokenizer.from_str(self.content)
        self.library.encode_special_tokens = True  # in a text these are letters as others; the JSON does not keep it

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        found = self.library.encode_batch_fast(texts, add_special_tokens=False)
        return [[word if self._is_word(word) else 3 for word in one.ids] for one in found]

    def _is_word(self, word: int) -> bool:
        return 3 <= word <= self.pieces

    def decode(self, words: list[int]) -> str:
        """Of ids of words and unknown ones."""
        return self.library.decode([word for word in words if word != 3], skip_special_tokens=True).strip()

    def spelled(self, word: int) -> str:
        """A word's piece as it is read, with a space in front where it begins a word."""
        name = self.names[word]
        if "ByteLevel" in self._kinds:
            return self.library.decoder.decode([name])
        if (prefix := self._continues) and name.startswith(prefix):
            return name.removeprefix(prefix)
        if suffix := self._model.get("end_of_word_suffix"):
            return name.replace(suffix, " ")
        return name.replace(WORD_BEGINS, " ") if self._spaced else f" {name}"

    @property
    def _continues(self) -> str:
        """What pieces begin with that go on with a word; empty: nothing."""
        prefix = self._model.get("continuing_subword_prefix")
        return "##" if prefix is None and self._model.get("type") == "WordPiece" else prefix or ""

    @cached_property
    def _spaced(self) -> bool:
        return "Metaspace" in self._kinds or any(name.startswith(WORD_BEGINS) for name in self.names)

    @property
    def begins(self) -> np.ndarray | None:
        """bool [rows]: whether an id begins a word; None where pieces do not tell."""
        if "ByteLevel" in self._kinds:
            begin = [name.startswith(BYTE_SPACE) for name in self.names]
        elif self._spaced:
            begin = [name.startswith(WORD_BEGINS) for name in self.names]
        elif self._continues:
            begin = [not name.startswith(self._continues) for name in self.names]
        elif self._model.get("type") == "WordLevel":
            begin = [True] * len(self.names)
        else:
            return None
        rows = np.zeros(self.pieces + SPECIAL_ROWS, dtype=bool)
        rows[: len(begin)] = begin
        rows[:3], rows[self.pieces + 1] = False, False
        return rows


def _tokens(file: Any) -> list[str]:
    """All tokens of a file, in the order of their ids."""
    vocabulary = file["model"]["vocab"]
    if isinstance(vocabulary, list):  # a unigram model's: pairs of a piece and its score
        numbered = {piece: number for number, (piece, _) in enumerate(vocabulary)}
    else:
        numbered = dict(vocabulary.items())
    for added in file.get("added_tokens") or ():
        numbered.setdefault(added["content"], added["id"])
    for token, number in numbered.items():
        if type(token) is not str or type(number) is not int:
            raise ValueError(f"the id of {token!r} is {number!r}")
    if len(numbered) > MOST_TOKENS:
        raise ValueError(f"it has {len(numbered)} tokens, more than {MOST_TOKENS}")
    return sorted(numbered, key=lambda token: (numbered[token], token))


def _specials(file: Any, tokens: list[str], name: str) -> dict[str, str]:
    """Role -> token. Raises ValueError for a role that no token has. Where no word is unknown, as of bytes, unk is a
    new one."""
    there, found = {*tokens}, {}
    for role, names in ROLES.items():
        own = [file["model"].get("unk_token")] if role == "unk" else []
        token = next((token for token in (*own, *names) if token in there), None)
        if token is None and role == "unk" and file["model"].get("type") == "BPE":
            token = names[0]
        if token is None:
            raise ValueError(
                f"text_tokenizer: {name!r} has no token for {role}, none of {', '.join(names)}: add one, as by "
                f"tokenizers' Tokenizer.add_special_tokens(['{names[0]}'])"
            )
        found[role] = token
    return found


def _renumbered(file: Any, names: list[str]) -> dict[str, Any]:
    """The file with the ids that `names` gives, and with <s> and </s> around what others encode."""
    numbers = {token: number for number, token in enumerate(names)}
    model = dict(file["model"])
    if isinstance(model["vocab"], list):
        scores = {piece: score for piece, score in model["vocab"]}
        lowest = min(scores.values(), default=0.0)
        unknown = model.get("unk_id")
        model["vocab"] = [[token, scores.get(token, lowest)] for token in names]
        model["unk_id"] = None if unknown is None else 3
    else:
        model["vocab"] = numbers
    added = {one["content"]: {**one, "id": numbers[one["content"]]} for one in file.get("added_tokens") or ()}
    for role, token in zip(("bos", "pad", "eos", "unk", "mask"), (*names[:4], names[-1]), strict=True):
        plain = {"single_word": False, "lstrip": role == "mask", "rstrip": False, "normalized": False}
        added[token] = {**plain, **added.get(token, {}), "id": numbers[token], "content": token, "special": True}
    bos, eos = names[0], names[2]
    start, end = ({"SpecialToken": {"id": token, "type_id": 0}} for token in (bos, eos))
    first, second = ({"Sequence": {"id": letter, "type_id": 0}} for letter in "AB")
    frame = {
        "type": "TemplateProcessing",
        "single": [start, first, end],
        "pair": [start, first, end, second, end],
        "special_tokens": {token: {"id": token, "ids": [numbers[token]], "tokens": [token]} for token in (bos, eos)},
    }
    return {
        **file,
        "model": model,
        "added_tokens": sorted(added.values(), key=lambda one: one["id"]),
        "post_processor": frame,
        "truncation": None,
        "padding": None,
    }


def _parts(file: Any) -> Iterator[dict[str, Any]]:
    """Normalizers, pre-tokenizers and decoders of a file, those in sequences, too."""
    waiting = [file.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield part
            for name in ("normalizers", "pretokenizers", "decoders"):
                waiting += part.get(name) or ()
