"""Training a sentencepiece tokenizer on a bounded, deterministic sample of a corpus."""

from __future__ import annotations

import hashlib
import heapq
import io
import itertools
from collections.abc import Iterable, Iterator

from rondo.pretrain.data.errors import DataError
from rondo.pretrain.data.tokenizer import END_OF_DOCUMENT, SentencePieceTokenizer

PREFIX = "sentencepiece:"
PIECE_CHARACTERS = 2000
"""Documents are sampled in pieces of about this size: the trainer drops long sentences."""
READ_FACTOR = 32
"""Reading stops after this many times the sample's size."""


def parse_pieces(spec: str) -> int | None:
    """N of "sentencepiece:N"; None for other forms. Raises DataError when N will not do."""
    if not spec.startswith(PREFIX):
        return None
    number = spec.removeprefix(PREFIX)
    if not number.isdecimal() or not 300 <= int(number) <= 1_000_000:
        raise DataError(
            f"{spec!r}: expected sentencepiece:N with N from 300 (256 bytes and some pieces) to "
            "1000000"
        )
    return int(number)


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """A unigram-LM model with byte fallback that gives every text back unchanged.

    Text is taken as it is (no normalisation, no prefix, all white space kept), digits are single
    pieces. One thread: sums of floats depend on the number of threads.
    """
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            character_coverage=0.9995,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            eos_piece=END_OF_DOCUMENT,
            # Half the library's training time for the same characters a token.
            shrinking_factor=0.5,
            num_sub_iterations=1,
            max_sentence_length=8 * PIECE_CHARACTERS,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1].strip() or "the sample has no text"
        raise DataError(f"'{PREFIX}{vocab_size}' cannot be trained: {reason}") from None
    return SentencePieceTokenizer(model.getvalue(), "trained model")


def sample(texts: Iterable[str], budget: int) -> list[str]:
    """Pieces of `texts` with the smallest hashes, `budget` characters in all.

    Which pieces are taken does not depend on the order of the texts, unless there is so much
    text (READ_FACTOR times the budget) that the rest stays unread.
    """
    kept: list[tuple[int, str]] = []  # a heap with the largest hash on top
    held = seen = 0
    for piece in itertools.chain.from_iterable(map(_pieces, texts)):
        digest = hashlib.blake2b(piece.encode("utf-8", "replace"), digest_size=8).digest()
        rank = -int.from_bytes(digest, "little")
        seen += len(piece)
        if held < budget or rank > kept[0][0]:
            heapq.heappush(kept, (rank, piece))
            held += len(piece)
        while held - len(kept[0][1]) >= budget:
            held -= len(heapq.heappop(kept)[1])
        if seen > READ_FACTOR * budget:
            break
    return [piece for _, piece in sorted(kept)]


def _pieces(text: str) -> Iterator[str]:
    """Cut `text` at line ends into pieces of about PIECE_CHARACTERS characters."""
    start = 0
    while start < len(text):
        end = text.rfind("\n", start, start + PIECE_CHARACTERS) + 1
        if end <= start:
            end = start + PIECE_CHARACTERS
        yield text[start:end]
        start = end
