"""Words as numbers: text tokenizers with the released id layout, and documents cut into fixed windows.

A shard's documents are tokenised once and kept in the cache folder; a text sample is a window of them, framed by <s>
and </s>. Windows, not documents, are what the order permutes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property

import numpy as np
import sentencepiece

from beit3_dist.config import SPECIAL_ROWS, require
from beit3_dist.data.cache import Content, DamagedCache, cached, digest, mapped, parsed, write_whole
from beit3_dist.data.faults import BadSample, Fault, check_size
from beit3_dist.data.index import PROGRESS_SECONDS, Table
from beit3_dist.data.json_tokenizer import JsonPieces
from beit3_dist.data.kinds import JSONL
from beit3_dist.data.lines import LONGEST_LINE
from beit3_dist.data.reader import OPEN_FILES
from beit3_dist.data.tars import Tar
from beit3_dist.data.text_files import unmarked
from beit3_dist.looking import of_node
from beit3_dist.opening import is_json_object, open_regular

log = logging.getLogger(__name__)

MOST_MODEL = 1 << 28
"""Bytes (256 MiB) that are read of a tokenizer's file; SentencePiece's of a million pieces has 25 million."""
TOKENS_FORMAT = 2
DOCUMENTS_AT_ONCE, CHARACTERS_AT_ONCE = 4096, 1 << 20
"""Documents, and characters of them, that are tokenised in one call, over several threads: SentencePiece takes some
hundred bytes for each character."""
LONGEST_READ = 1 << 16
"""Characters that hold more tokens than any model reads."""


class SentencePieces:
    """The pieces of a SentencePiece file by the released ids: piece i, i >= 3, is i + 1."""

    def __init__(self, content: bytes, name: str) -> None:
        """Raises ValueError, which calls the file `name`, where it is no such model, or numbered otherwise."""
        try:
            if not content:  # of which SentencePiece makes a processor that complains on the terminal
                raise RuntimeError("empty")
            self.model = sentencepiece.SentencePieceProcessor(model_proto=content)
            self.pieces = self.model.get_piece_size()
            self.model.decode(list(range(self.pieces)))  # a piece that is no text in UTF-8 fails here, not in use
        except (RuntimeError, UnicodeError):
            self.pieces = 0
        reason = "is not a SentencePiece model file, nor a tokenizer.json"
        require(self.pieces != 0, f"text_tokenizer: {name!r} {reason}")
        controls = (self.model.unk_id(), self.model.bos_id(), self.model.eos_id())
        if controls != (0, 1, 2):
            raise ValueError(
                f"text_tokenizer: {name!r} has unk, bos, eos = {controls}; train it with unk_id=0, "
                "bos_id=1, eos_id=2 (tools/train_text_tokenizer.py does)"
            )
        self.fingerprint = hashlib.sha256(content).hexdigest()

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        pieces = self.model.encode(texts, num_threads=min(8, os.cpu_count() or 1) if len(texts) > 1 else 1)
        return [[3 if piece == 0 else piece + 1 for piece in text] for text in pieces]

    def decode(self, words: list[int]) -> str:
        return self.model.decode([0 if word == 3 else word - 1 for word in words])

    def spelled(self, word: int) -> str:
        """A word's piece as it is read, with a space in front where it begins a word."""
        return self.model.id_to_piece(word - 1).replace("\u2581", " ")

    @property
    def begins(self) -> np.ndarray:
        """bool [rows]: whether an id begins a word, as pieces with a space in front do."""
        spaced = [self.model.id_to_piece(piece).startswith("\u2581") for piece in range(self.pieces)]
        return np.array([False, *spaced, *[False] * (SPECIAL_ROWS - 1)])


class TextTokenizer:
    """A tokenizer's file, SentencePiece's or Hugging Face's tokenizer.json, by the ids of the released models. <s> = 0,
    <pad> = 1, </s> = 2, <unk> = 3; words are 4 to `pieces`; <mask> = pieces + 1. The embedding has `rows` = pieces + 10
    rows: eight are spare."""

    bos, pad, eos, unk = 0, 1, 2, 3

    def __init__(self, path: str) -> None:
        """Raises a one-line ValueError for a file that is missing, or no tokenizer that fits."""
        self.path = os.path.expanduser(path)
        content = of_node(self._read)
        kind = JsonPieces if is_json_object(content) else SentencePieces
        self.file: SentencePieces | JsonPieces = kind(content, path)
        self.pieces, self.fingerprint = self.file.pieces, self.file.fingerprint
        self.mask = self.pieces + 1
        self.rows = self.pieces + SPECIAL_ROWS
        self.words = range(4, self.pieces + 1)
        self.specials = (self.bos, self.pad, self.eos)

    def _read(self) -> bytes:
        """The file, which one process reads for its node."""
        if not os.path.isfile(self.path):
            raise ValueError(f"text_tokenizer: there is no file {self.path!r}; tools/train_text_tokenizer.py makes one")
        with open_regular(self.path) as file:
            return file.read(MOST_MODEL)

    @cached_property
    def begins(self) -> np.ndarray:
        """bool [rows]: whether an id begins a word. Raises ValueError where a piece does not tell."""
        if (begins := self.file.begins) is None:
            raise ValueError(
                f"text_tokenizer: {self.path}: its pieces do not tell where words begin, as those with a space or "
                "without ## do: leave objectives.masked_data_modeling.whole_words off"
            )
        return begins

    def check_vocab(self, config_vocab_size: int) -> None:
        """Raises ValueError unless the model's word embedding has this tokenizer's number of rows."""
        if config_vocab_size != self.rows:
            raise ValueError(
                f"text_tokenizer: {self.path} has {self.pieces} pieces and needs "
                f"model.vocab_size={self.rows}, not {config_vocab_size}"
            )

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without <s> and </s>."""
        parts = (self.file.encode_all([part])[0] for part in pieces_of(text, CHARACTERS_AT_ONCE))
        return [word for part in parts for word in part]

    def encode_beginning(self, text: str) -> list[int]:
        """`encode` for what is cut afterwards: of a text that is longer than any model reads, the beginning alone."""
        return self.encode(next(pieces_of(text, LONGEST_READ)))

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        if any(len(text) > CHARACTERS_AT_ONCE for text in texts):
            return [self.encode(text) for text in texts]
        return self.file.encode_all(texts)

    def decode(self, ids: list[int]) -> str:
        """Text of the ids; <s>, <pad>, </s>, <mask> and spare rows are left out."""
        return self.file.decode([int(word) for word in ids if word == self.unk or word in self.words])

    def spelled(self, word: int) -> str:
        """A word's piece as it is read, with a space in front where it begins a word."""
        return self.file.spelled(word)


def pieces_of(text: str, longest: int) -> Iterator[str]:
    """The text in pieces of so many characters at most, cut before a space, where words end; most texts are one."""
    at = 0
    while len(text) - at > longest:
        end = max(text.rfind(" ", at + 1, at + longest + 1), 0) or at + longest
        yield text[at:end]
        at = end
    yield text[at:]


def documents(data: Iterable[bytes], jsonl: bool) -> Iterator[tuple[int, str | BadSample]]:
    """Line number (from 1) and text of each document of a member, or what is wrong with it; empty lines are skipped."""
    for number, line in enumerate(unmarked(data), start=1):
        if not line.strip():
            continue
        try:
            check_size("a line", len(line), LONGEST_LINE)
            text = line.decode("utf-8").strip()
            if jsonl:
                text = _text_field(text).strip()
                text.encode("utf-8")  # JSON can escape half a surrogate pair, which is no character.
        except UnicodeError:
            yield number, BadSample("invalid UTF-8")
        except BadSample as bad:
            yield number, bad
        else:
            if text:
                yield number, text


def _text_field(line: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise BadSample("malformed JSON") from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise BadSample("no field 'text' that is a string")
    return record["text"]


class TokenShard:
    """The tokens of one shard's documents, separated by </s>, and the documents that had to be left out."""

    def __init__(self, table: Table, number: int, tokenizer: TextTokenizer) -> None:
        self.path, self.table, self.number, self.tokenizer = table.paths[number], table, number, tokenizer
        name = digest(TOKENS_FORMAT, self.path, *table.marks[number], tokenizer.fingerprint)
        self.file = table.file.with_name(f"{name}.npy")

    def make(self) -> None:
        """Tokenises the shard unless the cache holds the tokens of this very shard and tokenizer."""
        if not self.file.exists():
            self._cached(self.file.stat)

    def _cached(self, read: Callable[[], Content]) -> Content:
        return cached(read, self._build, self.file)

    @property
    def tokens(self) -> np.ndarray:
        """uint16 or uint32 [tokens], memory-mapped."""
        whole = lambda tokens: tokens.dtype in (np.uint16, np.uint32) and tokens.ndim == 1  # noqa: E731
        return self._cached(lambda: mapped(self.file, "tokens", whole))

    @property
    def faults(self) -> list[Fault]:
        notes = self._cached(lambda: parsed(self.file.with_suffix(".json")))
        return [Fault("texts", self.path, *fault) for fault in notes]

    def _build(self) -> None:
        table, number, tokenizer = self.table, self.number, self.tokenizer
        kind = np.uint16 if tokenizer.rows <= 1 << 16 else np.uint32
        first, last = np.searchsorted(table.rows["shard"], [number, number + 1])
        faults: list[tuple[str, str]] = []

        def good() -> Iterator[str]:
            with Tar(table.files[number]) as tar:
                for index in range(first, last):
                    row = table.rows[index]
                    for line, text in documents(tar.lines(*map(int, row["text"])), row["kind"] == JSONL):
                        if isinstance(text, str):
                            yield text
                        else:
                            faults.append((f"{table.key(index)}:{line}", str(text)))

        parts: list[np.ndarray] = []
        told = time.monotonic()
        for texts in _batched(good()):
            for ids in tokenizer.encode_all(texts):
                if ids:
                    parts.append(np.array([tokenizer.eos] * bool(parts) + ids, dtype=kind))
            if time.monotonic() - told > PROGRESS_SECONDS:
                told = time.monotonic()
                log.info("tokenising %s: %d documents", self.path, len(parts))
        tokens = np.concatenate(parts) if parts else np.empty(0, dtype=kind)
        notes = json.dumps(faults).encode()
        write_whole(self.file.with_suffix(".json"), lambda file: file.write(notes))
        write_whole(self.file, lambda file: np.save(file, tokens))


def _batched(texts: Iterator[str]) -> Iterator[list[str]]:
    """Lists of texts that are tokenised in one call: so many, or so many characters, but for a single longer one."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        if batch and (len(batch) == DOCUMENTS_AT_ONCE or characters + len(text) > CHARACTERS_AT_ONCE):
            yield batch
            batch, characters = [], 0
        batch.append(text)
        characters += len(text)
    if batch:
        yield batch


class TokenWindows:
    """The text samples of one source: windows of `width` tokens, the last window of a shard being shorter."""

    def __init__(self, table: Table, tokenizer: TextTokenizer, text_length: int, share: range = range(0)) -> None:
        """Tokenises what the cache lacks: first of all the shards of this process's `share`."""
        self.width = text_length - 2
        self.frame = (tokenizer.bos, tokenizer.eos)
        self.table, self.tokenizer = table, tokenizer
        contents = self._contents(share)
        self.ends = np.cumsum([-(-length // self.width) for length in contents["lengths"]])
        self.faults = {
            (path := table.paths[number]): [Fault("texts", path, *fault) for fault in faults]
            for number, faults in contents["faults"]
        }
        """Documents that were left out, by the shard's path."""
        self.open: OrderedDict[int, np.ndarray] = OrderedDict()
        """Tokens of the shards that were read last; each mapping holds a file descriptor."""

    def shard(self, number: int) -> TokenShard:
        return TokenShard(self.table, number, self.tokenizer)

    def _contents(self, share: range) -> dict[str, list]:
        """lengths: tokens of each shard. faults: pairs of a shard's number and its documents' keys and reasons. One
        file for all shards, made when all are tokenised: at 10,000 shards and hundreds of ranks a look at each shard's
        files would keep a file system busy. One process reads it for its node."""
        table, shards = self.table, range(len(self.table.paths))
        file = table.file.with_name(f"{digest(TOKENS_FORMAT, table.file.name, self.tokenizer.fingerprint)}.json")
        if not of_node(file.exists):
            for number in share:
                self.shard(number).make()

        def make() -> None:
            lengths, faults = [], []
            for number in shards:
                shard = self.shard(number)
                lengths.append(len(shard.tokens))
                if some := [(fault.key, fault.reason) for fault in shard.faults]:
                    faults.append((number, some))
            contents = {"lengths": lengths, "faults": faults}
            write_whole(file, lambda target: target.write(json.dumps(contents).encode()))

        def read() -> dict[str, list]:
            contents = parsed(file)
            if not isinstance(contents, dict) or len(contents.get("lengths", [])) != len(shards):
                raise DamagedCache(f"{file} is damaged: it holds no lengths of {len(shards)} shards")
            return contents

        return of_node(lambda: cached(read, make, file))

    def __len__(self) -> int:
        return int(self.ends[-1])

    def place(self, index: int) -> tuple[int, int]:
        """Shard number and number of the window in it."""
        shard = int(np.searchsorted(self.ends, index, side="right"))
        return shard, index - (int(self.ends[shard - 1]) if shard else 0)

    def read(self, index: int) -> np.ndarray:
        """int64 [at most text_length]: <s>, the window's tokens, </s>."""
        shard, window = self.place(index)
        if shard not in self.open:
            self.open[shard] = self.shard(shard).tokens
            if len(self.open) > OPEN_FILES:
                self.open.popitem(last=False)
        self.open.move_to_end(shard)
        tokens = self.open[shard][window * self.width : (window + 1) * self.width]
        bos, eos = self.frame
        return np.concatenate(([bos], tokens, [eos])).astype(np.int64)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "open": OrderedDict()}
