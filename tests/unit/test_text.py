"""The tokenizer has the released id layout; windows put together again are the documents."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from beit3_dist.data import text
from beit3_dist.data.index import open_table
from beit3_dist.data.order import Stream
from beit3_dist.data.tars import Tar
from beit3_dist.data.text import TextTokenizer, TokenWindows
from tests.unit.tar_fixtures import sentences, text_tar, train_tokenizer, write_tar


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("model") / "text.spm")


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> TextTokenizer:
    return TextTokenizer(str(model))


def windows_of(folder: Path, tokenizer: TextTokenizer, text_length: int, share: range = range(0)) -> TokenWindows:
    table = open_table(str(folder / "*.tar"), "data.texts", Stream.TEXTS, str(folder / "cache"))
    return TokenWindows(table, tokenizer, text_length, share)


def test_id_layout_is_the_released_one(model: Path, tokenizer: TextTokenizer) -> None:
    """Each piece's id by its name, as XLM-R and the released models have it."""
    plain = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert [plain.id_to_piece(number) for number in range(3)] == ["<unk>", "<s>", "</s>"]
    assert (tokenizer.bos, tokenizer.pad, tokenizer.eos, tokenizer.unk) == (0, 1, 2, 3)
    assert (tokenizer.pieces, tokenizer.mask, tokenizer.rows) == (300, 301, 310)
    assert list(tokenizer.words) == list(range(4, 301))
    for line in sentences()[:20]:
        assert tokenizer.encode(line) == [number + 1 for number in plain.encode(line)]
        assert tokenizer.decode([0, *tokenizer.encode(line), 301, 2, 1, 1]) == plain.decode(plain.encode(line))


def test_unknown_characters_and_written_specials(tokenizer: TextTokenizer) -> None:
    assert 3 in tokenizer.encode("☃")
    assert not {0, 1, 2, 301} & set(tokenizer.encode("<s> a </s> <pad> <mask>"))
    assert tokenizer.encode("   ") == []


def test_vocabulary_check(tokenizer: TextTokenizer) -> None:
    tokenizer.check_vocab(310)
    with pytest.raises(ValueError, match=r"text_tokenizer: .* 300 pieces and needs model.vocab_size=310, not 64010"):
        tokenizer.check_vocab(64010)


def test_bad_tokenizer_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="text_tokenizer: there is no file 'nowhere.spm'"):
        TextTokenizer("nowhere.spm")
    (tmp_path / "junk").write_bytes(b"junk" * 100)
    (tmp_path / "empty").write_bytes(b"")
    for name in ("junk", "empty"):
        with pytest.raises(ValueError, match="text_tokenizer: .* is not a SentencePiece model file"):
            TextTokenizer(str(tmp_path / name))
    assert not capfd.readouterr().err, "SentencePiece has something to say, too"
    other = train_tokenizer(tmp_path / "other.spm", unk_id=3, bos_id=1, eos_id=2, pad_id=0)
    with pytest.raises(ValueError, match=r"text_tokenizer: .*unk, bos, eos = \(3, 1, 2\)"):
        TextTokenizer(str(other))


def test_pieces_that_are_no_text_are_refused(model: Path, tmp_path: Path) -> None:
    """They failed where a text was made of them, long after the start."""
    data, word = model.read_bytes(), "\u2581the".encode()
    assert word in data
    (tmp_path / "words.spm").write_bytes(data.replace(word, word[:-3] + b"\xfft\xfe", 1))
    with pytest.raises(ValueError, match=r"words\.spm.* is not a SentencePiece model file"):
        TextTokenizer(str(tmp_path / "words.spm"))


@pytest.mark.parametrize("kind", ["FIFO", "device"])
def test_what_is_no_file_is_no_tokenizer(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "words.spm"
    os.mkfifo(path) if kind == "FIFO" else path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="text_tokenizer: there is no file"):
        TextTokenizer(str(path))


@pytest.mark.parametrize("text_length", [3, 7, 18, 4000])
def test_windows_reassemble_to_the_documents(tmp_path: Path, tokenizer: TextTokenizer, text_length: int) -> None:
    documents = [sentences()[:9], sentences()[9:20]]
    for number, shard in enumerate(documents):
        text_tar(tmp_path / f"{number}.tar", shard)
    windows = windows_of(tmp_path, tokenizer, text_length)
    found: dict[int, list[int]] = {0: [], 1: []}
    for number in range(len(windows)):
        words = windows.read(number).tolist()
        assert words[0] == 0 and words[-1] == 2 and 3 <= len(words) <= text_length
        shard, window = windows.place(number)
        assert len(found[shard]) == window * (text_length - 2)  # All windows before this one are full.
        found[shard] += words[1:-1]
    for number, shard in enumerate(documents):
        expected: list[int] = []
        for document in shard:
            expected += ([2] if expected else []) + tokenizer.encode(document)
        assert found[number] == expected


def test_bad_documents_are_left_out_and_told(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    good = [json.dumps({"text": "one good line"}).encode(), b'{"text": "   "}', b"   "]
    bad = [b'{"text": 3}', b"not json", b"[1]", b'{"text": "\xff"}', b'{"text": "\\ud800"}']
    write_tar(
        tmp_path / "a.tar",
        [
            {"__key__": "r", "jsonl": b"\n".join(good + bad + good)},
            {"__key__": "t", "txt": b"plain line\r\n\xff\xfe\n\nlast line"},
        ],
    )
    windows = windows_of(tmp_path, tokenizer, 500)
    lines = ["one good line", "one good line", "plain line", "last line"]
    expected = [0]
    for line in lines:
        expected += [*tokenizer.encode(line), 2]
    assert windows.read(0).tolist() == expected
    assert [(fault.key, fault.reason) for fault in windows.shard(0).faults] == [
        ("r:4", "no field 'text' that is a string"),
        ("r:5", "malformed JSON"),
        ("r:6", "no field 'text' that is a string"),
        ("r:7", "invalid UTF-8"),
        ("r:8", "invalid UTF-8"),
        ("t:2", "invalid UTF-8"),
    ]


def test_tokens_are_made_once_per_shard_and_tokenizer(
    tmp_path: Path, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        text_tar(tmp_path / f"{number}.tar", sentences()[5 * number : 5 * number + 5])
    built: list[str] = []
    build = text.TokenShard._build

    def counted(self: text.TokenShard, *rest: object) -> None:
        built.append(Path(self.path).name)
        build(self, *rest)

    monkeypatch.setattr(text.TokenShard, "_build", counted)
    first = windows_of(tmp_path, tokenizer, 20, share=range(2, 3))
    assert built == ["2.tar", "0.tar", "1.tar"]  # its own share, then what no other process has made
    again = windows_of(tmp_path, tokenizer, 20)
    assert len(built) == 3
    assert all(np.array_equal(first.read(number), again.read(number)) for number in range(len(first)))
    text_tar(tmp_path / "1.tar", sentences()[40:44])
    windows_of(tmp_path, tokenizer, 20)
    assert built[3:] == ["1.tar"]
    windows_of(tmp_path, TextTokenizer(str(train_tokenizer(tmp_path / "other.spm", 280))), 20)
    assert len(built) == 7


def test_few_token_files_are_open_at_a_time(
    tmp_path: Path, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be more shards than a process may open files."""
    monkeypatch.setattr(text, "OPEN_FILES", 2)
    for number in range(5):
        text_tar(tmp_path / f"{number}.tar", sentences()[5 * number : 5 * number + 5])
    windows = windows_of(tmp_path, tokenizer, 20)
    expected = [windows.read(number).tolist() for number in range(len(windows))]
    for number in (*range(len(windows)), *reversed(range(len(windows)))):
        assert windows.read(number).tolist() == expected[number]
        mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/cache/" in line}
        assert sum(path.startswith(str(tmp_path)) and path.endswith(".npy") for path in mapped) <= 3  # and the table


def test_a_ready_cache_is_one_file_to_look_at(
    tmp_path: Path, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what a cleaned cache lacks is made when it is read."""
    for number in range(3):
        text_tar(tmp_path / f"{number}.tar", sentences()[5 * number : 5 * number + 5])
    write_tar(tmp_path / "bad.tar", [{"__key__": "r", "jsonl": b"not json"}, {"__key__": "t", "txt": b"a line"}])
    first = windows_of(tmp_path, tokenizer, 20)
    expected = [first.read(number).tolist() for number in range(len(first))]
    with monkeypatch.context() as patched:
        patched.setattr(text.TokenShard, "make", lambda self: pytest.fail("a shard's own files were looked at"))
        again = windows_of(tmp_path, tokenizer, 20)
    assert len(again) == len(expected) and again.faults == first.faults
    [(path, [fault])] = again.faults.items()
    assert (Path(path).name, fault.key, fault.reason) == ("bad.tar", "r:1", "malformed JSON")
    for shard in map(again.shard, range(len(again.ends))):
        shard.file.unlink()
    assert [again.read(number).tolist() for number in range(len(again))] == expected


def test_small_vocabularies_are_kept_in_two_bytes(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    text_tar(tmp_path / "a.tar", sentences()[:4])
    assert windows_of(tmp_path, tokenizer, 20).shard(0).tokens.dtype == np.uint16


def test_batches_of_documents_make_no_difference(
    tmp_path: Path, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text_tar(tmp_path / "one/a.tar", sentences()[:15])
    text_tar(tmp_path / "two/a.tar", sentences()[:15])
    whole = windows_of(tmp_path / "one", tokenizer, 50)
    monkeypatch.setattr(text, "DOCUMENTS_AT_ONCE", 4)
    parts = windows_of(tmp_path / "two", tokenizer, 50)
    assert np.array_equal(whole.shard(0).tokens, parts.shard(0).tokens)


def test_lines_stop_at_the_end_of_the_member(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"xxone\ntwo\nthree" + b"next member\n")
    with Tar(str(tmp_path / "file")) as file:
        assert list(file.lines(2, 13)) == [b"one\n", b"two\n", b"three"]
    assert [line for line, _ in text.documents(io.BytesIO(b"a\n\nb"), jsonl=False)] == [1, 3]
