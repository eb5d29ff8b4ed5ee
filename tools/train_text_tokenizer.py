#!/usr/bin/env python3
"""Trains the SentencePiece text tokenizer on shards or text files, with the released tokenizer's settings.

Those are: 64,000 unigram pieces of at most 16 characters, character coverage 0.99999, NFKC with nmt's rules, a space
before the first word, no byte fallback, digits not split, <unk> 0, <s> 1, </s> 2 and no padding piece. The model's word
embedding then needs pieces + 10 rows. The same text gives the same file.
"""

from __future__ import annotations

import io
import re
import textwrap
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from beit3_dist.command_line import refusing
from beit3_dist.config import DataConfig, require
from beit3_dist.data.cache import cache_folder, write_whole
from beit3_dist.data.faults import BadSample
from beit3_dist.data.index import expand
from beit3_dist.data.kinds import JSONL, TXT, is_tar, key_and_kind
from beit3_dist.data.tables import texts_in
from beit3_dist.data.tars import DamagedTar, Tar
from beit3_dist.data.text import TextTokenizer, documents
from beit3_dist.data.unpack import plain_tar

PROGRAM = "train_text_tokenizer.py"
SEED = 0
"""Of the choice of sentences when there are more than asked for."""
THREADS = 16
"""A constant: unigram training adds up in the order of the threads, so their number is part of the result."""
LONGEST = 4000
"""Characters of a training sentence. SentencePiece silently leaves out longer ones; here they are cut at a space."""
BYTES_PER_CHARACTER = 4
"""At most, in UTF-8."""


def sentences(patterns: Iterable[str], cache: str = DataConfig.cache) -> Iterator[str]:
    """The sentences of all .txt and .jsonl members of tars, captions included, and of plain files of texts. `cache`:
    folder for the unpacked copies of compressed tars. Raises ValueError for a pattern without a file, a damaged tar,
    and a line that is no text, with its place."""
    for path in dict.fromkeys(path for pattern in patterns for path in expand(pattern, "--shards")):
        for text in texts_of_tar(path, cache) if is_tar(path) else texts_in(Path(path)):
            for line in text.split("\n"):
                yield from textwrap.wrap(line, LONGEST) if len(line) > LONGEST else [line]


def texts_of_tar(path: str, cache: str) -> Iterator[str]:
    """The texts in a tar. Raises ValueError where it is damaged, or a line of it is no text."""
    with Tar(plain_tar(path, cache_folder(cache, "--cache")), path) as tar:
        try:
            for member, offset, size, odd in tar:
                _, kind = key_and_kind(member)
                if kind not in (TXT, JSONL):
                    continue
                name = member.decode(errors="replace")
                if odd:
                    raise ValueError(f"{path}: {name} is {odd}")
                for number, text in documents(tar.lines(offset, size), kind == JSONL):
                    if isinstance(text, BadSample):
                        raise ValueError(f"{path}: {name}, line {number}: {text}")
                    yield text
        except DamagedTar as damage:
            raise ValueError(f"{path} is damaged: {damage}") from None


def train(text: Iterable[str], options: Namespace) -> bytes:
    """The model file of a tokenizer. Raises ValueError if the text is empty, or too little for so many pieces."""
    faults: list[Exception] = []

    def watched() -> Iterator[str]:
        # SentencePiece turns an exception of its source into an error of its own; the first one says what is wrong.
        try:
            yield from text
        except (ValueError, OSError) as error:
            faults.append(error)
            raise

    sentencepiece.set_random_generator_seed(SEED)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=watched(),
            model_writer=model,
            model_type=options.model_type,
            vocab_size=options.pieces,
            character_coverage=options.coverage,
            input_sentence_size=options.max_sentences,
            shuffle_input_sentence=True,
            max_sentence_length=LONGEST * BYTES_PER_CHARACTER,
            num_threads=THREADS,
            max_sentencepiece_length=16,
            normalization_rule_name="nmt_nfkc",
            add_dummy_prefix=True,
            remove_extra_whitespaces=True,
            byte_fallback=False,
            split_digits=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise (faults[0] if faults else ValueError(plain(str(error), options))) from None
    return model.getvalue()


def plain(error: str, options: Namespace) -> str:
    """SentencePiece's error as one line that says what to change."""
    if found := re.search(r"too high .*<= (\d+)", error):
        return f"--pieces {options.pieces} is too many for this text: it holds at most {found[1]}"
    if found := re.search(r"smaller than required_chars\D+\d+ vs (\d+)", error):
        return f"--pieces {options.pieces} is too few: the text's characters alone need {found[1]} (or less --coverage)"
    return f"SentencePiece stopped: {' '.join(error.split())}"


def parse(arguments: list[str] | None) -> Namespace:
    """The command line. Raises ValueError for a number out of range; exits with code 2 on anything else wrong."""
    text = f"  {PROGRAM} --shards 'data/texts/train/*.tar' 'data/pairs/train/*.tar' --out text.spm"
    example = f"Example:\n{text}"
    raw = RawDescriptionHelpFormatter
    parser = ArgumentParser(prog=PROGRAM, description=__doc__, formatter_class=raw, epilog=example)
    text = (
        "brace or glob patterns of tars, whose .txt and .jsonl members are read, or of .txt and .jsonl files, one "
        "document or caption a line, or .json files with an array of them, any also as .gz or .zst"
    )
    parser.add_argument("--shards", nargs="+", required=True, metavar="PATTERN", help=text)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="model file to write, or to replace")
    parser.add_argument("--pieces", type=int, default=64000, metavar="N", help="size of the vocabulary; 64000")
    text = "unigram, as released; bpe trains ten times as fast"
    parser.add_argument("--model-type", choices=("unigram", "bpe"), default="unigram", help=text)
    text = "share of the text's characters that get a piece; 0.99999"
    parser.add_argument("--coverage", type=float, default=0.99999, metavar="SHARE", help=text)
    text = "train on N random sentences where there are more; 15000000"
    parser.add_argument("--max-sentences", type=int, default=15_000_000, metavar="N", help=text)
    parser.add_argument("--cache", default=DataConfig.cache, help="where compressed tars are unpacked, as data.cache")
    options = parser.parse_args(arguments)
    for name in ("pieces", "max_sentences"):
        require(getattr(options, name) >= 1, f"--{name.replace('_', '-')} {getattr(options, name)} is less than 1")
    require(0.98 <= options.coverage <= 1, f"--coverage {options.coverage:g} is not in [0.98, 1]")
    require(options.out.parent.is_dir(), f"--out {options.out}: there is no folder {options.out.parent}")
    if options.out.is_dir():
        raise ValueError(f"--out {options.out} is a folder: name a file in it, such as {options.out / 'text.spm'}")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Trains, writes and describes the tokenizer."""
    with refusing(PROGRAM):
        options = parse(arguments)
        first = next(sentences(options.shards, options.cache), None)
        if first is None:
            raise ValueError(f"--shards {' '.join(options.shards)}: no .txt or .jsonl member or file holds a text")
        model = train(sentences(options.shards, options.cache), options)
        write_whole(options.out, lambda file: file.write(model), "--out")
        tokenizer = TextTokenizer(str(options.out))
    sample = first[:80]
    print(f"{options.out}: {tokenizer.pieces} pieces\nmodel.vocab_size: {tokenizer.rows}")
    print(f"id of <mask>: {tokenizer.mask}\nsample: {sample}")
    pieces = (tokenizer.spelled(word).replace(" ", "\u2581") for word in tokenizer.encode(sample))
    print(f"        {' '.join(pieces)}")


if __name__ == "__main__":
    main()
