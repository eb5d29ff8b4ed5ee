"""SentencePiece pieces with the released numbers: <s> = 0, <pad> = 1, </s> = 2, <unk> = 3; piece i >= 3 of the file is
i + 1, <mask> = pieces + 1, and eight spare rows follow."""

from __future__ import annotations

import os
import shutil
from typing import Any

import sentencepiece
from transformers import AddedToken, PreTrainedTokenizer

SPECIAL = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
SPARE = 8


class Beit3Tokenizer(PreTrainedTokenizer):
    """Texts as ids, framed by <s> and </s>."""

    vocab_files_names = {"vocab_file": "tokenizer.spm"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str, **settings: Any) -> None:
        """`vocab_file`: a SentencePiece model with unk, bos, eos = 0, 1, 2."""
        self.vocab_file = vocab_file
        self.model = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        self.pieces = self.model.get_piece_size()
        tokens = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>",
                  "mask_token": AddedToken("<mask>", lstrip=True, special=True, normalized=False)}  # fmt: skip
        super().__init__(**{**tokens, "clean_up_tokenization_spaces": False, **settings})

    @property
    def vocab_size(self) -> int:
        """Rows of the model's word embedding."""
        return self.pieces + 2 + SPARE

    def get_vocab(self) -> dict[str, int]:
        pieces = {self.model.id_to_piece(piece): piece + 1 for piece in range(3, self.pieces)}
        return pieces | SPECIAL | {"<mask>": self.pieces + 1} | self.added_tokens_encoder

    def _tokenize(self, text: str, **settings: Any) -> list[str]:
        return self.model.encode(text, out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        if token == "<mask>":
            return self.pieces + 1
        piece = self.model.piece_to_id(token)
        return SPECIAL.get(token, piece + 1 if piece else SPECIAL["<unk>"])

    def _convert_id_to_token(self, index: int) -> str:
        if index < len(SPECIAL):
            return list(SPECIAL)[index]
        if index <= self.pieces:
            return self.model.id_to_piece(index - 1)
        return "<mask>" if index == self.pieces + 1 else ""  # spare rows say nothing

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.model.decode([token for token in tokens if token])

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """<s> A </s>, or <s> A </s> B </s>."""
        second = [] if token_ids_1 is None else [*token_ids_1, SPECIAL["</s>"]]
        return [SPECIAL["<s>"], *token_ids_0, SPECIAL["</s>"], *second]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        if not already_has_special_tokens:
            token_ids_0 = self.build_inputs_with_special_tokens(token_ids_0, token_ids_1)
        special = {0, 1, 2, self.pieces + 1}
        return [int(token in special) for token in token_ids_0]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        name = self.vocab_files_names["vocab_file"]
        file = os.path.join(save_directory, f"{filename_prefix}-{name}" if filename_prefix else name)
        if os.path.abspath(self.vocab_file) != os.path.abspath(file):
            shutil.copyfile(self.vocab_file, file)
        return (file,)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "model": self.model.serialized_model_proto()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {**state, "model": sentencepiece.SentencePieceProcessor(model_proto=state["model"])}
