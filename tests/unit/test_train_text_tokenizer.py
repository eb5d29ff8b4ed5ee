"""The text tokenizer is trained as the released one was, on all text of the shards, and the same every time."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
import sentencepiece

from beit3_dist.data.text import TextTokenizer
from tests.unit.tar_fixtures import exit_code, pair_tar, sentences, text_tar, write_tar
from tools import build_shards, train_text_tokenizer


def run(*arguments: object) -> int:
    """Exit code of the tool, in this process."""
    return exit_code(train_text_tokenizer.main, list(map(str, arguments)))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A shard of 1,500 English documents."""
    return text_tar(tmp_path / "text.tar", sentences()[:1500])


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_settings_are_the_released_ones(
    kind: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "text.spm"
    assert run("--shards", text, "--out", out, "--pieces", 500, "--model-type", kind) == 0
    model = sentencepiece.SentencePieceProcessor(model_file=str(out))
    assert (model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()) == (0, 1, 2, -1)
    assert max(len(model.id_to_piece(piece)) for piece in range(500)) <= 16
    assert not any(model.is_byte(piece) for piece in range(500))
    # NFKC joins the ligature and the full-width letter, nmt's rules turn the tabulator into a space, and spaces at the
    # ends go; the first word gets its mark.
    assert model.encode("  of\ufb01ce\t\uff21  ", out_type=str) == model.encode("office A", out_type=str)
    assert model.encode("the", out_type=str) == ["\u2581the"]
    assert model.encode("\u4e16") == [model.piece_to_id("\u2581"), 0]  # No byte fallback: unknown is unknown.
    printed = capsys.readouterr().out
    assert "500 pieces\nmodel.vocab_size: 510\nid of <mask>: 501\nsample: " in printed
    assert TextTokenizer(str(out)).rows == 510


def test_the_same_text_gives_the_same_file(text: Path, tmp_path: Path) -> None:
    # Fewer sentences than there are, so that the random choice among them counts, too.
    for out in ("first", "second"):
        assert run("--shards", text, "--out", tmp_path / out, "--pieces", 300, "--max-sentences", 700) == 0
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    assert run("--shards", text, "--out", tmp_path / "all", "--pieces", 300) == 0
    assert (tmp_path / "all").read_bytes() != (tmp_path / "first").read_bytes()


def test_every_kind_of_source_is_read(tmp_path: Path) -> None:
    words = sentences()
    text_tar(tmp_path / "text-0.tar", words[:10])
    pair_tar(tmp_path / "pairs-0.tar", 3, seed=10)
    (tmp_path / "plain.txt").write_text("\n".join(words[13:20]))
    (tmp_path / "records.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in words[20:30]))
    patterns = [str(tmp_path / name) for name in ("{text,pairs}-*.tar", "plain.txt", "records.jsonl", "text-0.tar")]
    # The patterns name text-0.tar twice; it is read once. A pattern's files come in the order of their names.
    assert list(train_text_tokenizer.sentences(patterns)) == [*words[10:13], *words[:10], *words[13:30]]


def test_shards_are_read_as_in_pretraining(tmp_path: Path) -> None:
    """Extensions in any case, compressed and upper-case tars, and no file attributes of a Mac."""
    words = sentences()[:60]
    hidden = {"__key__": "._a", "txt": b"\0\5\x16\7\xff\xfe"}
    for name, members in (
        ("0.tar", [hidden, {"__key__": "a", "txt": words[0].encode()}]),
        ("1.TAR", [{"__key__": "b", "TXT": words[1].encode()}]),
        ("2.tar", [{"__key__": "c", "JSONL": json.dumps({"text": words[2]}).encode()}, {"__key__": "d", "cls": b"1"}]),
        ("3.plain", [{"__key__": "e", "txt": words[3].encode()}]),
    ):
        write_tar(tmp_path / name, members)
    for name in ("3.tar.gz", "4.TGZ"):
        (tmp_path / name).write_bytes(gzip.compress((tmp_path / "3.plain").read_bytes()))
    (tmp_path / "5.JSONL").write_text(json.dumps({"text": words[5]}) + "\n")
    patterns = [str(tmp_path / name) for name in ("*.tar", "*.TAR", "*.tar.gz", "*.TGZ", "*.JSONL")]
    found = list(train_text_tokenizer.sentences(patterns, str(tmp_path / "cache")))
    assert found == [words[0], words[2], words[1], words[3], words[3], words[5]]


def test_long_documents_are_cut_and_not_left_out(tmp_path: Path) -> None:
    long = "word " * 5000 + "end"
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "first line\n" + long}) + "\n")
    found = list(train_text_tokenizer.sentences([str(tmp_path / "long.jsonl")]))
    assert found[0] == "first line"
    assert " ".join(found[1:]) == long
    assert max(map(len, found)) <= train_text_tokenizer.LONGEST


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_too_many_pieces_names_the_largest_number(
    kind: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--shards", text, "--out", tmp_path / "text.spm", "--model-type", kind)
    assert run(*arguments) == 2
    found = re.fullmatch(
        r"train_text_tokenizer.py: error: --pieces 64000 is too many for this text: it holds at most (\d+)\n",
        capsys.readouterr().err,
    )
    assert found
    assert not (tmp_path / "text.spm").exists()
    assert run(*arguments, "--pieces", int(found[1]) + 1) == 2
    assert run(*arguments, "--pieces", found[1]) == 0


def test_bad_input_is_one_line_and_code_2(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "text.spm"
    cut = tmp_path / "cut.tar"
    cut.write_bytes(text.read_bytes()[:2000])
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"good\n\xff\n")
    pictures = write_tar(tmp_path / "pictures.tar", [{"__key__": "a", "png": b"no text"}])
    cases: list[tuple[str, tuple[object, ...]]] = [
        ("no file matches", ("--shards", tmp_path / "absent.tar", "--out", out)),
        ("cut.tar is damaged: cut at byte 2000", ("--shards", text, cut, "--out", out)),
        ("bad.txt, line 2: not UTF-8", ("--shards", text, bad, "--out", out)),
        ("no .txt or .jsonl member or file holds a text", ("--shards", pictures, "--out", out)),
        ("--pieces 20 is too few: the text's characters alone need", ("--shards", text, "--out", out, "--pieces", 20)),
        ("--pieces 0 is less than 1", ("--shards", text, "--out", out, "--pieces", 0)),
        ("--coverage 2 is not in", ("--shards", text, "--out", out, "--coverage", 2)),
        ("is a folder: name a file in it, such as", ("--shards", text, "--out", tmp_path)),
        ("there is no folder", ("--shards", text, "--out", tmp_path / "absent" / "text.spm")),
    ]
    for message, arguments in cases:
        assert run(*arguments) == 2, message
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
        assert not out.exists()


@pytest.mark.slow
def test_64000_pieces_are_numbered_as_released(tmp_path: Path) -> None:
    text = tmp_path / "dictionary.txt"
    text.write_text("\n".join(build_shards.dictionary_documents()))
    assert run("--shards", text, "--out", tmp_path / "text.spm", "--model-type", "bpe") == 0
    tokenizer = TextTokenizer(str(tmp_path / "text.spm"))
    assert (tokenizer.pieces, tokenizer.mask, tokenizer.rows) == (64000, 64001, 64010)
    assert max(tokenizer.words) == 64000
    tokenizer.check_vocab(64010)
    sample = "A genus of birds including the corncrake."
    assert tokenizer.decode(tokenizer.encode(sample)) == sample
