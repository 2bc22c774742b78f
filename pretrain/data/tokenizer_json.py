"""Tokenizers as a `tokenizer.json`, which transformers reads, with the same ids."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from rondo.pretrain.data.tokenizer import (
    END_OF_DOCUMENT,
    SPACE,
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)

UNKNOWN, CONTROL, UNUSED, BYTE = 2, 3, 5, 6
"""Types of sentencepiece's pieces that no text is encoded to by its letters."""
PROBES = (
    "The cat sat, 12 3456.\n\n\tIt  was   naïve; Straße, 漢字 and 😀!",
    " one space before, two after  ",
    "\r\n\x00 a\u0301 \u00a0 \u3000 ½ ﬁ Ⅳ",
    "<0x41> <unk> <s> </s> <|endoftext|> <pad>",
    "",
)
"""What both forms of a tokenizer are compared on before one is written."""


def to_json(tokenizer: Tokenizer) -> tuple[str, str] | None:
    """The `tokenizer.json` of a tokenizer and the name of its end of a document; None where the
    library's form of a sentencepiece model does not give the same ids on `PROBES`.

    The one text that may have other ids is U+2581, sentencepiece's own sign for a space.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.content.decode(), tokenizer.piece(tokenizer.eod)
    if isinstance(tokenizer, ByteTokenizer):
        fast, end = _of_bytes(tokenizer), END_OF_DOCUMENT
    else:
        assert isinstance(tokenizer, SentencePieceTokenizer), "there are three kinds"
        fast, end = _of_pieces(tokenizer.content)
    fast.encode_special_tokens = True
    for text in PROBES:
        if fast.encode(text, add_special_tokens=False).ids != tokenizer.encode(text):
            return None
    return fast.to_str(), end


def json_vocabulary(content: str) -> dict[str, int]:
    """Ids by token of a `tokenizer.json`, added tokens included."""
    from tokenizers import Tokenizer as Fast

    return Fast.from_str(content).get_vocab(with_added_tokens=True)


def _of_bytes(tokenizer: ByteTokenizer) -> Any:
    """Without merges, so that every byte is a token."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Fast

    letters = _letters()
    fast = Fast(models.BPE(vocab={letters[i]: i for i in range(256)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(END_OF_DOCUMENT, special=True)])
    assert fast.token_to_id(END_OF_DOCUMENT) == tokenizer.eod, "the next after 256 bytes"
    return fast


def _letters() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies: itself where it can be
    printed, else the next one from 256 on."""
    printed = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(i) if i in printed else chr(next(others)) for i in range(256)]


def _of_pieces(model: bytes) -> tuple[Any, str]:
    """By transformers' own conversion, with what it leaves out of sentencepiece's normalizer."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers
    from transformers.convert_slow_tokenizer import SentencePieceExtractor, SpmConverter

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        path.write_bytes(model)
        extractor = SentencePieceExtractor(str(path))
    parts: Any = extractor.extract(None)  # which says that it is a tuple
    proto = extractor.proto
    fast: Any = SpmConverter.build_tokenizer_from_spm_proto(
        proto, parts["vocab"], parts.get("merges")
    )
    fast.add_tokens(parts["additional_special_tokens"])
    spaces: list[Any] = []
    if proto.normalizer_spec.precompiled_charsmap:
        spaces.append(normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap))
    if proto.normalizer_spec.remove_extra_whitespaces:
        spaces += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if proto.normalizer_spec.add_dummy_prefix:
        spaces.append(normalizers.Prepend(SPACE))
        fast.decoder = decoders.Sequence([fast.decoder, decoders.Strip(content=" ", left=1)])
    fast.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", SPACE)])
    names = [p.piece for p in proto.pieces if p.type in (UNKNOWN, CONTROL, UNUSED)]
    rest = [f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names if len(name) > 1]
    if any(p.type == BYTE for p in proto.pieces):
        rest.append("<(?=0x[0-9A-F]{2}>)")
    # Apart from its first letter, what is written like such a piece is not taken for it.
    fast.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(rest)), "isolated")
    return fast, proto.pieces[proto.trainer_spec.eos_id].piece
