"""Hugging Face's tokenizer.json by the released ids: of each kind of pieces the same words, and no special one."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from beit3_dist.data.text import TextTokenizer
from tests.unit.tar_fixtures import sentences

NAMES = ["<unk>", "<s>", "</s>", "<pad>", "<mask>"]
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def train_json_tokenizer(path: Path, kind: str = "bytes", pieces: int = 300) -> Path:
    """A file of the library's: byte-level BPE as RoBERTa's, WordPiece as BERT's, a unigram model as XLM-R's."""
    trainer: Any
    if kind == "bytes":
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=pieces, special_tokens=NAMES[1:], initial_alphabet=alphabet, show_progress=False
        )
    elif kind == "wordpiece":
        made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=pieces, special_tokens=BERT, show_progress=False)
    else:
        made = tokenizers.Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=pieces, special_tokens=NAMES, unk_token="<unk>", show_progress=False
        )
    made.train_from_iterator(sentences()[:600], trainer)
    made.enable_truncation(4)
    made.enable_padding(length=9, pad_token=BERT[0] if kind == "wordpiece" else "<pad>")
    made.save(str(path))
    return path


@pytest.mark.parametrize("kind", ["bytes", "wordpiece", "unigram"])
def test_words_are_the_librarys_by_the_released_ids(tmp_path: Path, kind: str) -> None:
    path = train_json_tokenizer(tmp_path / "tokenizer.json", kind)
    ours, plain = TextTokenizer(str(path)), tokenizers.Tokenizer.from_file(str(path))
    plain.no_truncation()
    plain.no_padding()
    special = 5 - (kind == "bytes")
    words = plain.get_vocab_size() - special
    assert (ours.words, ours.mask, ours.rows) == (range(4, 4 + words), 4 + words, 4 + words + 9)
    for line in (line for line in sentences()[600:640] if "  " not in line):
        expected = plain.encode(line, add_special_tokens=False)
        found = ours.encode(line)
        assert [ours.file.names[word] for word in found] == expected.tokens and len(found) > 4
        assert ours.decode([0, *found, ours.mask, 2, 1]) == plain.decode(expected.ids).strip()
        if kind != "wordpiece" and line.isascii():  # of bytes, a letter may be several pieces
            assert "".join(map(ours.spelled, found)).strip() == line
        heads = sum(ours.begins[word] for word in found)
        split = len(line.split()) - (kind == "bytes")  # whose first word has no space before it
        assert heads >= split if kind == "wordpiece" else heads == split
    assert ours.encode_all(sentences()[:3]) == [ours.encode(line) for line in sentences()[:3]]
    written = ours.encode("a <s> </s> <pad> <mask> [CLS] [SEP] [MASK] [PAD] b")
    assert not {0, 1, 2, ours.mask} & {*written} and ours.encode("   ") in ([], ours.encode(" " * 3))
    again = pickle.loads(pickle.dumps(ours))  # as loader processes get it
    assert again.encode("a </s> b") == ours.encode("a </s> b")
    renumbered = tmp_path / "renumbered.json"
    renumbered.write_text(ours.file.content)
    same = TextTokenizer(str(renumbered))
    assert same.fingerprint == ours.fingerprint and same.encode(sentences()[700]) == ours.encode(sentences()[700])
    assert tokenizers.Tokenizer.from_file(str(renumbered)).encode("a").ids[:: len(ours.encode("a")) + 1] == [0, 2]


def without(token: str) -> Callable[[dict], None]:
    def change(file: dict) -> None:
        file["added_tokens"] = [added for added in file["added_tokens"] if added["content"] != token]
        del file["model"]["vocab"][token]

    return change


REFUSED: dict[str, tuple[Callable[[dict], None], str]] = {
    "no mask": (without("<mask>"), r"has no token for mask, none of <mask>, \[MASK\], .*add_special_tokens"),
    "no end": (without("</s>"), "has no token for eos"),
    "random": (lambda file: file["model"].update(dropout=0.1), "splits words at random"),
    "no vocabulary": (lambda file: file["model"].pop("vocab"), "is no tokenizer.json: 'vocab'"),
    "odd ids": (lambda file: file["model"]["vocab"].update(a="first"), "the id of 'a' is 'first'"),
    "another kind": (lambda file: file["model"].update(type="Nonsense"), "tokenizer.json'"),
    "lost pieces": (lambda file: file["model"]["merges"].append("never there"), "tokenizer.json'"),
    "nothing": (lambda file: file.clear(), "is no tokenizer.json: 'model'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, case: str) -> None:
    change, message = REFUSED[case]
    path = train_json_tokenizer(tmp_path / "tokenizer.json")
    file = json.loads(path.read_text())
    change(file)
    path.write_text(json.dumps(file))
    with pytest.raises(ValueError, match=message) as caught:
        TextTokenizer(str(path))
    assert "text_tokenizer: " in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_words_and_words_without_a_beginning(tmp_path: Path) -> None:
    file = json.loads(train_json_tokenizer(tmp_path / "a.json", "wordpiece").read_text())
    ours = TextTokenizer(str(tmp_path / "a.json"))
    assert ours.encode("\u2603") == [3] and ours.decode([3, *ours.encode("dog")]) == "dog"
    bpe = {"type": "BPE", "vocab": {t: n for n, t in enumerate([*BERT, *"abc"])}, "merges": [], "unk_token": "[UNK]"}
    (tmp_path / "b.json").write_text(json.dumps({**file, "model": bpe, "decoder": None}))
    other = TextTokenizer(str(tmp_path / "b.json"))
    assert other.encode("abx") == [4, 5, 3]
    with pytest.raises(ValueError, match="its pieces do not tell where words begin"):
        _ = other.begins
