"""What is handed to flash-attn: a stand-in with the package's signatures (2.8, and 3 in the module
`flash_attn_interface`), which does in float64 what its documentation says."""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from rondo.kernels import attention, backend
from rondo.kernels import softmax_attention as attention_module
from rondo.kernels.softmax_attention import flash
from rondo.tests.kernels import attention_checks as checks
from rondo.tests.kernels.test_attention import documents

pytestmark = pytest.mark.quick
WHERE = checks.Where("flash", "cpu", torch.float64, 1e-12)
Calls = list[dict[str, Any]]


def one_sequence(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, window: tuple[int, int]
) -> Tensor:
    """`(Tq, H, D)` of one sequence: query i sees the keys from `i + Tk - Tq - left` to
    `i + Tk - Tq + right`, -1 being no bound; `causal` makes right 0. No keys give zeros."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    at = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0]
    key = torch.arange(k.shape[0])
    left, right = window[0], 0 if causal else window[1]
    seen = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool)
    seen &= (key <= at + right) if right >= 0 else True
    seen &= (key >= at - left) if left >= 0 else True
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
    return torch.einsum("hij,jhd->ihd", weights, v)


def package(name: str, calls: Calls) -> ModuleType:
    """The stand-in for version 2 (`flash_attn`) or 3."""

    def dense(
        q: Tensor, k: Tensor, v: Tensor, scale: Any, causal: bool, window: Any, same: bool
    ) -> Tensor:
        call = {"name": "dense", "window": window, "scale": scale, "causal": causal}
        calls.append(call | {"deterministic": same})
        rows = zip(q, k, v, strict=True)
        return torch.stack([one_sequence(*row, scale, causal, window) for row in rows])

    def varlen(
        qkv: tuple[Tensor, Tensor, Tensor], bounds: Any, longest: Any, *options: Any
    ) -> Tensor:
        scale, causal, window, same = options
        call = {"name": "varlen", "bounds": bounds, "longest": longest, "window": window}
        calls.append(call | {"deterministic": same})
        for x, bound, most in zip(qkv, (*bounds, bounds[1]), (*longest, longest[1]), strict=True):
            assert x.ndim == 3 and x.stride(-1) == 1
            assert bound.dtype == torch.int32 and bound[0] == 0 and bound[-1] == x.shape[0]
            assert bound.diff().min() >= 0 and bound.diff().max() <= most
        out = []
        for (a, b), (c, d) in zip(*(itertools.pairwise(x.tolist()) for x in bounds), strict=True):
            q, k, v = qkv[0][a:b], qkv[1][c:d], qkv[2][c:d]
            out.append(one_sequence(q, k, v, scale, causal, window))
        return torch.cat(out)

    # fmt: off
    def func2(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
              softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False):
        return dense(q, k, v, softmax_scale, causal, window_size, deterministic)

    def varlen2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None):
        return varlen((q, k, v), (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k),
                      softmax_scale, causal, window_size, deterministic)

    def func3(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
              v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
              pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False):
        return dense(q, k, v, softmax_scale, causal, window_size, deterministic)

    def varlen3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
                seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None,
                k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0,
                softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
                return_attn_probs=False):
        return varlen((q, k, v), (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k),
                      softmax_scale, causal, window_size, deterministic)
    # fmt: on

    module: Any = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    second = name == "flash_attn"
    module.flash_attn_func = func2 if second else func3
    module.flash_attn_varlen_func = varlen2 if second else varlen3
    return module


@pytest.fixture
def anew() -> Iterator[None]:
    """Packages are looked for again, now and after."""
    flash._find.cache_clear()
    yield
    flash._find.cache_clear()


@pytest.fixture(params=["flash_attn", "flash_attn_interface"])
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, anew: None) -> Calls:
    """The package is there and takes CPU tensors of float64; what it is called with."""
    found: Calls = []
    monkeypatch.setitem(sys.modules, request.param, package(request.param, found))
    monkeypatch.setattr(flash, "flash_refusal", lambda *qkv: None)
    monkeypatch.setattr(attention_module, "flash_refusal", lambda *qkv: None)
    monkeypatch.setattr(flash, "is_hopper", lambda device: request.param != "flash_attn")
    return found


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("window", (None, 1, 3, 40))
def test_outputs_and_gradients_are_the_references(
    calls: Calls, window: int | None, packed: bool
) -> None:
    for shape, groups in itertools.product(checks.SHAPES[:3], (1, 2, 4)):
        calls.clear()
        checks.check_reference(WHERE, shape, window, packed, groups)
        (call,) = calls
        assert call["name"] == ("varlen" if packed else "dense")
        assert call["deterministic"] is True  # its default is not, and resume is bit by bit
        # The query itself is not counted; a window over all keys is none.
        left = -1 if window is None or window >= shape[1] else window - 1
        assert call["window"] == (left, 0)


def test_documents_are_sequences_of_their_own(calls: Calls) -> None:
    """By the lengths of queries and of keys, a cache in front included."""
    q, k, v = checks.inputs(3, 6)
    ids = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 4, 4]])
    attention(q, k, v, segment_ids=ids[:, 3:], key_segment_ids=ids, backend="flash")
    queries, keys = calls[0]["bounds"]
    assert queries.tolist() == [0, 0, 2, 3, 4, 6] and keys.tolist() == [0, 2, 5, 6, 10, 12]
    assert calls[0]["longest"] == (3, 6)


def test_scale_and_the_rest_of_attention(calls: Calls) -> None:
    checks.check_scale(WHERE)
    assert calls[0]["scale"] == 0.7 and calls[0]["causal"] is True
    checks.check_cache(WHERE)
    checks.check_separate(WHERE)
    checks.check_other_documents(WHERE)
    checks.check_large_scores(WHERE)


def test_auto_takes_the_package_where_it_serves_and_says_why(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    qkv, ids = checks.inputs(9), documents(9)
    expected = attention(*qkv, segment_ids=ids, backend="flash")
    monkeypatch.setattr(backend, "_logged", {})
    with caplog.at_level(logging.INFO, backend.logger.name):
        torch.testing.assert_close(attention(*qkv, segment_ids=ids), expected)
    assert [call["name"] for call in calls] == ["varlen", "varlen"]
    assert "attention runs on backend flash (first of flash, chunked" in caplog.text


def test_a_package_that_cannot_be_imported_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, anew: None
) -> None:
    """It is tried once; "auto" then takes what it can, and says why."""
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    monkeypatch.setattr(flash, "is_hopper", lambda device: False)
    q, k, v = (x.bfloat16() for x in checks.inputs(9))
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda"), raising=False)
    reason = flash.flash_refusal(q, k, v)
    assert reason is not None
    assert "installed but cannot be imported: undefined symbol: _ZN3c10" in reason
    assert attention_module._best(q, k, v, False) == ("chunked", f"flash cannot: {reason}")
    (tmp_path / "flash_attn.py").unlink()
    assert flash.flash_refusal(q, k, v) == reason


def test_a_compiled_graph_is_not_broken(calls: Calls) -> None:
    qkv = checks.inputs(9)
    run = torch.compile(lambda *qkv: attention(*qkv), backend="eager", fullgraph=True)
    torch.testing.assert_close(run(*qkv), attention(*qkv, backend="reference"))
    assert calls


def test_without_hopper_version_3_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, anew: None
) -> None:
    for name in ("flash_attn", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, package(name, []))
    assert flash._package(False) == "flash_attn"
    assert flash._package(True) == "flash_attn_interface"
