"""A scan of the logits, in loops and in passes, against float64."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcache import Selection, select
from kdcache.selection import scan_cpu, scan_torch
from kdcache.selection.scan_dispatch import ScanRows
from tests.sampling import KINDS, logits_of

WAYS = {"loops": scan_cpu.scan_rows, "passes": scan_torch.scan_rows}
if find_spec("triton"):
    from kdcache.selection import scan_triton

    WAYS["kernels"] = scan_triton.scan_rows  # in Triton's interpreter
SCANS = pytest.mark.parametrize("scan_rows", WAYS.values(), ids=WAYS)
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, of the interpreter
TEMPERATURES = [0.3, 4.0, 1.0]


def rows(kind: str, vocab: int) -> Tensor:
    return logits_of(kind, vocab, 8).float()


def nobody(x: Tensor) -> Tensor:
    return torch.full((len(x),), x.shape[-1])


def in_blocks(x: Tensor) -> Tensor:
    """`[n, B]` sums over blocks of 64 of `[n, V]`."""
    blocks = x.shape[-1] // 64 + 1
    return torch.nn.functional.pad(x, (0, blocks * 64 - x.shape[-1])).unflatten(-1, (blocks, 64)).sum(-1)


def bound(x: Tensor, factor: Tensor | float = 1.0) -> Tensor:
    """How far a block's sum of exp(x) factor may be off; x is rounded three times: x - centre, 1 / T, their product."""
    return in_blocks(x.exp() * factor * (5e-7 + 3 * 2**-24 * x.clamp(min=-700).abs())) + 64 * 2**-126


def require_scanned(x: Tensor, width: int, outside: Tensor, found: Sequence[Tensor], room: float = 1.0) -> None:
    """Values are the logits of the ids; sums and entropy terms are those of float64, within `room` times `bound`.

    Args:
        x: `[n, V]` logits in float32.
        width: of the head.
        outside: `[n]` an id that is left out of the sums; V for none.
        found: values, ids, sums and entropy terms of a scan at TEMPERATURES.
        room: how much less exact than on a CPU an exponential may be.
    """
    values, ids, sums, terms = found
    assert torch.equal(values, x.gather(-1, ids))
    skip = torch.cat([ids[:, :width], outside[:, None]], -1)
    below = x.double() - values[:, -1:].double()
    below = torch.cat([below, below[:, :1]], -1).scatter(-1, skip, -torch.inf)[:, :-1]
    for column, t in enumerate(TEMPERATURES):
        assert ((sums[:, column] - in_blocks((below / t).exp())).abs() <= room * bound(below / t)).all()
    exact = in_blocks(torch.where(below > -700, -below * below.exp(), 0))
    # Where e is a normal number; below that it may be 0.
    assert ((terms - exact).abs() <= room * bound(below, -below.clamp(min=-700)) + 1e-34).all()


def cases() -> Iterator[Any]:
    """Ways, sizes and characters of rows; fewer for kernels, which are slow in an interpreter."""
    for way, vocab, kind in itertools.product(WAYS, (1, 2, 63, 64, 65, 500, 4096, 32_003), KINDS):
        if way != "kernels" or (vocab > 1 and kind in ("random", "tied", "wide")[: 3 if vocab < 5000 else 1]):
            slow = [pytest.mark.slow] if way == "kernels" and vocab > 500 else []
            yield pytest.param(way, vocab, kind, id=f"{way}-{vocab}-{kind}", marks=slow)


@pytest.mark.parametrize(("way", "vocab", "kind"), list(cases()))
def test_a_scan_against_float64(way: str, vocab: int, kind: str) -> None:
    scan_rows, x = WAYS[way], rows(kind, vocab)[: 4 if way == "kernels" else 8]
    x[0, ::2], x[0, 1::2] = 0.0, -0.0  # alike
    order = x.sort(dim=-1, descending=True, stable=True).indices
    outside = nobody(x)
    outside[2:] = torch.arange(len(x) - 2) * 131 % vocab  # a label, in the head or not
    widths = {1, 70, vocab - 1} if way == "kernels" else {1, 12, 70, vocab - 1, vocab}
    for width in {max(1, min(width, vocab)) for width in widths}:
        values, ids, sums, entropy_terms = scan_rows(x, width, outside, TEMPERATURES)
        assert torch.equal(ids, order[:, : min(width + 1, vocab)])
        require_scanned(x, width, outside, (values, ids, sums, entropy_terms))


@SCANS
def test_sums_are_as_exact_as_float32(scan_rows: ScanRows) -> None:
    """Where differences are exact: what is left is the exponential and a sum of 64."""
    x = torch.randint(-8 * 64, 1, (16, 6400), generator=torch.Generator().manual_seed(0)) / 64
    values, _, sums, _ = scan_rows(x, 1, nobody(x), [1.0])
    exact = in_blocks((x.double() - values[:, 1:].double()).scatter(-1, x.argmax(-1, keepdim=True), -torch.inf).exp())
    error = (sums[:, 0].double() - exact).abs() / exact.clamp(min=1e-30)
    assert error.max() < 8e-7  # a quarter of it is usual
    total = (sums[:, 0].double().sum(-1) - exact.sum(-1)).abs() / exact.sum(-1)
    assert total.max() < 6e-8  # errors of a hundred blocks, which do not lean to one side: a third of it is usual


@SCANS
@pytest.mark.parametrize("poison", [float("nan"), -float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("width", [1, 5, 130])
def test_a_logit_that_is_not_finite_shows(width: int, poison: float, scan_rows: ScanRows) -> None:
    x = rows("random", 130)[:5]
    for row, at in ((0, 0), (2, 77), (3, 129)):
        x[row, at] = poison
    values, _, _, entropy_terms = scan_rows(x, width, nobody(x), TEMPERATURES)
    sound = torch.isfinite(values).all(-1) & torch.isfinite(entropy_terms).all(-1)
    assert sound.tolist() == [False, True, False, False, True]
    x = torch.full((2, 130), poison)
    values, _, _, entropy_terms = scan_rows(x, width, nobody(x), TEMPERATURES)
    assert not (torch.isfinite(values).all(-1) & torch.isfinite(entropy_terms).all(-1)).any()


@SCANS
@pytest.mark.parametrize("height", [1e13, 3e38, -1e30, torch.finfo(torch.float32).min])
def test_who_is_left_out_weighs_nothing_however_large_the_logits_are(height: float, scan_rows: ScanRows) -> None:
    """So large that what is subtracted from one is lost; a teacher masks ids with the lowest float32."""
    outside = torch.tensor([130, 0, 129])
    sums = scan_rows(torch.full((3, 130), height), 9, outside, TEMPERATURES)[2].sum(-1)
    assert sums.tolist() == [[121.0] * 3, [121.0] * 3, [120.0] * 3]


@SCANS
@pytest.mark.parametrize("lowest", [-1e30, torch.finfo(torch.bfloat16).min, torch.finfo(torch.float32).min])
def test_ids_that_a_teacher_masks_weigh_nothing(lowest: float, scan_rows: ScanRows) -> None:
    """Whole blocks of them, which is how a vocabulary is padded, and a part of one."""
    x = rows("random", 1000)[:2]
    x[:, 600:] = lowest
    _, _, sums, entropy_terms = scan_rows(x, 4, nobody(x), TEMPERATURES)
    _, _, sums_without, entropy_terms_without = scan_rows(x[:, :600], 4, nobody(x[:, :600]), TEMPERATURES)
    torch.testing.assert_close(sums[..., :10], sums_without, rtol=1e-5, atol=0)
    torch.testing.assert_close(entropy_terms[:, :10], entropy_terms_without, rtol=1e-5, atol=0)
    assert not sums[..., 10:].any() and not entropy_terms[:, 10:].any()


@SCANS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_floating_dtype_is_taken_as_float32(dtype: torch.dtype, scan_rows: ScanRows) -> None:
    x = rows("random", 500)[:2].to(dtype)
    for a, b in zip(
        scan_rows(x.float(), 9, nobody(x), TEMPERATURES), scan_rows(x, 9, nobody(x), TEMPERATURES), strict=True
    ):
        assert torch.equal(a, b)


@SCANS
def test_rows_need_not_touch(scan_rows: ScanRows) -> None:
    x = rows("random", 500)[:3]
    expected = scan_rows(x, 9, nobody(x), TEMPERATURES)
    padded = torch.full((3, 777), torch.nan)
    padded[:, 200:700] = x
    turned = x.T.contiguous().T
    for same in (padded[:, 200:700], turned, x.repeat_interleave(2, 0)[::2]):
        for a, b in zip(expected, scan_rows(same, 9, nobody(x), TEMPERATURES), strict=True):
            assert torch.equal(a, b)
    one = x[:1].expand(3, -1)
    for a, b in zip(expected, scan_rows(one, 9, nobody(x), TEMPERATURES), strict=True):
        assert torch.equal(a[:1].expand_as(b), b)


@pytest.mark.parametrize("threads", [2, 3, 8, 9])
def test_threads_do_not_show(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows("random", 500)
    alone = scan_cpu.scan_rows(x, 9, nobody(x), TEMPERATURES)
    monkeypatch.setattr(scan_cpu, "_THREAD_ELEMENTS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for _ in range(20):
        for a, b in zip(alone, scan_cpu.scan_rows(x, 9, nobody(x), TEMPERATURES), strict=True):
            assert torch.equal(a, b)


def _ids(x: Tensor) -> list[int]:
    ids: list[int] = scan_cpu.scan_rows(x, 9, nobody(x), TEMPERATURES)[1].flatten().tolist()
    return ids


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_a_fork_has_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_cpu, "_THREAD_ELEMENTS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x = rows("random", 500)
    expected = _ids(x)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(_ids, (x,)).get(timeout=60) == expected


RULES = [
    Selection(k=9),
    Selection(kind="topp", k=9, top_p=0.8, force_label=True),
    Selection(kind="full"),
    Selection(kind="sample", draws=20, force_label=True, sample_temperature=2.0),
    Selection(kind="ipps", k=9, force_label=True),
    Selection(kind="ipps", k=9, tau=0.05),
]


@pytest.mark.parametrize("way", [way for way in WAYS if way != "loops"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_every_way_gives_the_targets_of_loops(rule: Selection, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU runs, run here."""
    logits = torch.cat([rows(kind, 1000)[: 1 if way == "kernels" else 8] for kind in KINDS])
    labels = torch.randint(1000, (len(logits),), generator=torch.Generator().manual_seed(0))
    ours = select(logits, rule, labels=labels, temperatures=(1.0, 2.0))
    monkeypatch.setattr(scan_cpu, "scan_rows", WAYS[way])
    theirs = select(logits, rule, labels=labels, temperatures=(1.0, 2.0))
    same = (ours.ids == theirs.ids).all(-1)
    assert (~same).sum() <= 1  # a point on the border of two ids may fall on either
    assert torch.equal(ours.count[same], theirs.count[same])
    for name in ("logprobs", "weights", "log_partition", "log_tail", "entropy", "label_logprob"):
        if getattr(ours, name) is None:  # sampled targets have no tail
            assert getattr(theirs, name) is None
            continue
        a, b = getattr(ours, name)[same], getattr(theirs, name)[same]
        torch.testing.assert_close(a, b, atol=1e-6, rtol=2e-6, equal_nan=True)
