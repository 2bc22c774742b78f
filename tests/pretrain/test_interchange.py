"""`rondo export` and `rondo import`: checkpoints become folders of transformers, and again one."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import io
import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as Fast

from rondo.launch.cli import main
from rondo.models import Decoder, ModelConfig, load, manifest
from rondo.pretrain import interchange
from rondo.pretrain.data import Tokenizer, load_tokenizer
from rondo.pretrain.data.tokenizer import SentencePieceTokenizer
from rondo.pretrain.data.tokenizer_json import to_json
from rondo.pretrain.data.train_tokenizer import train_sentencepiece

transformers = pytest.importorskip("transformers")


def checkpoint(folder: Path, words: Tokenizer | None = None, **changes: Any) -> Path:
    """That of a small model, of bytes if no `words` are given."""
    words = words or load_tokenizer("bytes")
    sizes: dict[str, Any] = {"dim": 32, "num_layers": 2, "ffn_dim": 48, "pattern": ["attention"]}
    sizes["mixers"] = {"attention": {"num_heads": 2, "qk_norm": False}}
    config = ModelConfig(vocab_size=words.vocab_size, **{**sizes, **changes})
    for part in ("model", "tokenizer"):
        (folder / part).mkdir(parents=True)
    save_file(Decoder(config, seed=1).state_dict(), folder / "model" / "model.safetensors")
    (folder / "model" / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    words.save(folder / "tokenizer")
    paths = [path for path in folder.rglob("*") if path.is_file()]
    manifest.write(folder, 7, {p.relative_to(folder).as_posix(): manifest.record(p) for p in paths})
    return folder


def test_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = checkpoint(tmp_path / "start")
    there, back = tmp_path / "there", tmp_path / "back"
    assert main(["export", str(start), "--output", str(there)]) == 0
    assert "LlamaForCausalLM, float32; tokenizer: tokenizer.json" in capsys.readouterr().out
    model = transformers.AutoModelForCausalLM.from_pretrained(there)
    tokenizer = transformers.AutoTokenizer.from_pretrained(there)
    text = "naïve café — \t\n\x00€ 'll  two"
    ids = tokenizer(text).input_ids
    assert ids == load_tokenizer("bytes").encode(text) and tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == model.config.eos_token_id == 256
    ours = load(start)
    rows = torch.tensor([ids])
    with torch.no_grad():
        logits = ours.logits(ours(rows).hidden)
        torch.testing.assert_close(model(rows).logits, logits, rtol=1e-4, atol=1e-4)

    words = ["import", str(there), "--output", str(back), "--tokenizer", "bytes"]
    assert main(words) == 0
    assert manifest.damage(back) is None
    for name, value in load(back).state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name
    assert main(["generate", str(back), "--prompt", "a", "--max_tokens", "3"]) == 0


@pytest.mark.quick
def test_mistakes_are_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start, there = checkpoint(tmp_path / "start"), tmp_path / "there"
    there.mkdir()
    (there / "file").touch()
    assert main(["export", str(start), "--output", str(there)]) == 2
    assert "is not empty" in capsys.readouterr().err
    words = ["export", str(start), "--output", str(tmp_path / "new")]
    assert main([*words, "--architecture", "Qwen3ForCausalLM"]) == 2
    assert "Qwen3ForCausalLM needs qk_norm True, not False" in capsys.readouterr().err
    assert main(["import", str(there), "--output", str(tmp_path / "new")]) == 2
    assert "no config.json; expected a Hugging Face model folder" in capsys.readouterr().err
    assert main(["import", str(there), "--output", str(start)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_an_import_says_its_source_and_an_export_gives_it_back(tmp_path: Path) -> None:
    """Special tokens and the longest sequence, which our configuration has not."""
    there, back, again = (tmp_path / name for name in ("there", "back", "again"))
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    ends = {"bos_token_id": 257, "eos_token_id": [256, 258], "pad_token_id": 259}
    config = transformers.LlamaConfig(
        **small, **ends, vocab_size=260, num_hidden_layers=1, max_position_embeddings=77
    )
    transformers.LlamaForCausalLM(config).save_pretrained(there)
    fast = Fast.from_str(to_json(load_tokenizer("bytes"))[0])
    fast.add_special_tokens(["<begin>", "<turn>", "<pad>"])
    names = {"bos_token": "<begin>", "eos_token": "<turn>", "pad_token": "<pad>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **names).save_pretrained(there)
    assert main(["import", str(there), "--output", str(back)]) == 0
    assert manifest.damage(back) is None and "source.json" in manifest.read(back).files
    source = json.loads((back / "source.json").read_text())
    assert source["folder"] == "there"
    for name in ("config.json", "model.safetensors"):
        digest = hashlib.sha256((there / name).read_bytes()).hexdigest()
        assert source["files"][name]["sha256"] == digest
    assert main(["export", str(back), "--output", str(again)]) == 0
    found = transformers.AutoConfig.from_pretrained(again)
    for key, value in {**ends, "max_position_embeddings": 77}.items():
        assert getattr(found, key) == value, key
    tokenizer = transformers.AutoTokenizer.from_pretrained(again)
    assert {name: getattr(tokenizer, name) for name in names} == names
    assert len(tokenizer) == 260
    words = ["export", str(back), "--output", str(tmp_path / "given"), "--max_positions", "99"]
    assert main(words) == 0
    given = transformers.AutoConfig.from_pretrained(tmp_path / "given")
    assert given.max_position_embeddings == 99 and given.bos_token_id == 257
    other, last = (str(tmp_path / name) for name in ("other", "last"))
    assert main(["import", str(there), "--output", other, "--tokenizer", "bytes"]) == 0
    assert main(["export", other, "--output", last]) == 0
    found = transformers.AutoConfig.from_pretrained(last)
    assert (found.eos_token_id, found.bos_token_id) == (256, None)  # of the bytes
    assert found.max_position_embeddings == 77


def live_bytes() -> int:
    """Of all tensors with data that Python holds."""
    return sum(x.nbytes for x in gc.get_objects() if type(x) is torch.Tensor and not x.is_meta)


def test_import_holds_one_file_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a folder that was not written to its end is not there."""
    start, there = checkpoint(tmp_path / "start", num_layers=12), tmp_path / "there"
    assert main(["export", str(start), "--output", str(there)]) == 0
    whole = load(start)
    sizes = [value.nbytes for value in whole.state_dict().values()]
    limit, held = max(sizes), []
    monkeypatch.setattr(interchange, "SHARD_BYTES", limit)

    def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
        held.append(live_bytes() - before)
        if stops and len(held) == 3:
            raise OSError("the disk is full")
        save_file(tensors, path)

    monkeypatch.setattr(interchange, "save_file", save)
    words = ["import", str(there), "--output", str(tmp_path / "back"), "--tokenizer", "bytes"]
    gc.collect()
    before, stops = live_bytes(), True
    with pytest.raises(OSError, match="the disk is full"):
        main(words)
    assert {path.name for path in tmp_path.iterdir()} == {"start", "there"}
    held, stops = [], False
    assert main(words) == 0
    assert "tensors" in capsys.readouterr().err
    assert 4 * limit < sum(sizes)
    assert len(held) > 4 and max(held) <= 2 * limit
    assert manifest.damage(tmp_path / "back") is None
    found = load(tmp_path / "back").state_dict()
    assert all(torch.equal(found[name], x) for name, x in whole.state_dict().items())


def test_any_model_in_bfloat16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixers = {"mamba2": {"head_dim": 8, "state_dim": 4}}
    start = checkpoint(tmp_path / "start", pattern=["mamba2"], mixers=mixers)
    there, back = tmp_path / "there", tmp_path / "back"
    assert main(["export", str(start), "--output", str(there), "--dtype", "bfloat16"]) == 0
    assert "import rondo.models.hf.modeling" in capsys.readouterr().out
    assert main(["import", str(there), "--output", str(back)]) == 0
    ours, again = load(start), load(back)
    for name, value in ours.state_dict().items():
        kept = name in ours.float32_names()
        expected = value if kept else value.bfloat16().float()
        assert torch.equal(again.state_dict()[name], expected), name


PROSE = "\n".join(topics.values())[:60_000].splitlines(keepends=True)
TEXTS = [
    "".join(PROSE),
    "  two before, three   inside, one after ",
    "\n\n\ttab \r\n\x00 \u00a0 \u3000 nothing",
    "漢字 😀 a\u0301 ½ ﬁ: not in the vocabulary",
    "<0x41> <unk> <s> </s> <|endoftext|>",
    "1234567890 x1y22",
    "",
    " ",
]


def pieces(kind: str) -> SentencePieceTokenizer:
    """The project's own kind of sentencepiece model, or one as Llama 2 has it."""
    if kind == "unigram":
        return train_sentencepiece(PROSE, 400)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
    )
    return SentencePieceTokenizer(model.getvalue(), kind)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_sentencepiece_is_read_by_transformers(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same ids, bytes of what has no piece and spaces included, and the same text back."""
    words = pieces(kind)
    start, there = checkpoint(tmp_path / "start", words), tmp_path / "there"
    assert main(["export", str(start), "--output", str(there)]) == 0
    assert "tokenizer: tokenizer.json" in capsys.readouterr().out
    theirs = transformers.AutoTokenizer.from_pretrained(there)
    assert theirs.eos_token_id == words.eod and len(theirs) == words.vocab_size
    for text in TEXTS:
        ids = words.encode(text)
        assert theirs(text, add_special_tokens=False).input_ids == ids, text[:60]
        assert theirs.decode(ids) == words.decode(ids) == text
    assert main(["import", str(there), "--output", str(tmp_path / "back")]) == 0
    back = load_tokenizer(tmp_path / "back" / "tokenizer")
    assert [back.encode(text) for text in TEXTS] == [words.encode(text) for text in TEXTS]


def test_sentencepiece_that_would_have_other_ids_is_written_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE), model_writer=model, model_type="word", vocab_size=300
    )
    words = SentencePieceTokenizer(model.getvalue(), "whole words")
    start, there = checkpoint(tmp_path / "start", words), tmp_path / "there"
    assert main(["export", str(start), "--output", str(there)]) == 0
    assert "tokenizer.model, which is to be read with sentencepiece" in capsys.readouterr().out
    assert (there / "tokenizer.model").read_bytes() == words.content
    assert not (there / "tokenizer.json").exists()
