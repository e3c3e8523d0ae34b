"""Which code scans logits, and when kernels are not trusted; that nothing waits for a device."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kdcache import Selection, select
from kdcache.selection import inverse_cdf, scan_dispatch, select_ahead
from tests.sampling import KINDS, logits_of

TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
NUMPY = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of Triton's interpreter
RULES = [
    Selection(k=9),
    Selection(k=9, force_label=True),
    Selection(kind="topp", k=9, top_p=0.8, force_label=True),
    Selection(kind="full"),
    Selection(kind="sample", draws=20, force_label=True, sample_temperature=2.0),
    Selection(kind="sample", draws=20, proposal_power=0.8),
    Selection(kind="ipps", k=9, force_label=True),
    Selection(kind="ipps", k=9, tau=0.05),
]
EVERY_RULE = pytest.mark.parametrize("rule", RULES, ids=str)


def given(vocab: int = 1000) -> tuple[Tensor, Tensor]:
    """Logits of every character, and labels, some of them unknown."""
    x = torch.cat([logits_of(kind, vocab, 8).float() for kind in KINDS])
    labels = torch.randint(vocab, (len(x),), generator=torch.Generator().manual_seed(0))
    labels[::7] = -100
    return x, labels


def about(x: Tensor) -> tuple[Tensor, int, Tensor, list[float]]:
    return x, 9, torch.full((len(x),), x.shape[-1]), [2.0, 1.0]


@TRITON
@NUMPY
def test_kernels_are_trusted() -> None:
    x = given()[0][::6]
    x[3, 5] = torch.nan
    assert scan_dispatch.trusted(*about(x)) and scan_dispatch.trusted(*about(x.bfloat16()))


@TRITON
@NUMPY
def test_kernels_are_trusted_where_nothing_weighs_enough_to_compare() -> None:
    """Where a label is the centre, and all others lie so far below that their exponentials are not normal numbers."""
    x = logits_of("random", 1000, 2).clamp(max=8.0) / 10 - 9.5
    x[:, 300], x[:, 301] = 1.0, 2.0
    assert scan_dispatch.trusted(x, 1, torch.full((2,), 300), [0.1, 1.0])


@TRITON
@NUMPY
@pytest.mark.parametrize("part", range(4))
def test_kernels_that_say_something_else_are_not_trusted(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from kdcache.selection import scan_triton

    real = scan_triton.scan_rows

    def wrong(x: Tensor, *rest: object) -> tuple[Tensor, ...]:
        found = real(x, *rest)  # type: ignore[arg-type]
        found[part][-1, ..., -2] = found[part][-1, ..., -2] * 2 + 1
        return found

    monkeypatch.setattr(scan_triton, "scan_rows", wrong)
    name = ("values", "ids", "sums", "entropy_terms")[part]
    with pytest.warns(UserWarning, match=f"instead of kernels, which is slower: their {name} differ"):
        assert not scan_dispatch.trusted(*about(given()[0][::8]))


@TRITON
def test_kernels_that_do_not_run_are_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    from kdcache.selection import scan_triton

    def broken(*_: object) -> None:
        raise RuntimeError("no compiler\nand much more")

    monkeypatch.setattr(scan_triton, "scan_rows", broken)
    with pytest.warns(UserWarning, match="slower: RuntimeError: no compiler$"):
        assert not scan_dispatch.trusted(*about(given()[0]))


def test_kernels_are_compared_once_for_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []

    def listen(x: Tensor, *_: object) -> bool:
        asked.append(tuple(x.shape))
        return True

    monkeypatch.setattr(scan_dispatch, "trusted", listen)
    monkeypatch.setattr(scan_dispatch, "_trusted", {})
    monkeypatch.setattr(scan_dispatch, "find_spec", lambda name: name == "triton")
    x, _ = given()
    assert not scan_dispatch._kernels_agree(*about(x[:0]))  # nothing to compare
    assert all(scan_dispatch._kernels_agree(*about(part)) for part in (x, x[:5], x.bfloat16(), x))
    assert asked == [(16, 1000), (16, 1000)]
    monkeypatch.setattr(scan_dispatch, "find_spec", lambda name: None)
    with warnings.catch_warnings(action="error"):
        assert not scan_dispatch._kernels_agree(*about(x[:, :999]))  # no Triton, and nothing to say about it


@EVERY_RULE
def test_nothing_waits_for_the_device(rule: Selection) -> None:
    """A device without memory, where to ask for a number is an error: what runs here queues on a GPU."""
    x, labels = given()
    here, _ = select_ahead(x, rule, labels, (1.0, 2.0), None if rule.kind in ("topk", "topp", "full") else draw(rule))
    there, finite = select_ahead(
        x.to("meta"), rule, labels.to("meta"), (1.0, 2.0),
        None if rule.kind in ("topk", "topp", "full") else draw(rule).to("meta"),
    )  # fmt: skip
    assert finite.device.type == "meta" and finite.shape == (len(x),)
    for name, value in vars(here).items():
        if isinstance(value, Tensor):
            other = getattr(there, name)
            assert (other.shape, other.dtype, other.device.type) == (value.shape, value.dtype, "meta"), name


def draw(rule: Selection) -> Tensor:
    shape = (48,) if rule.kind == "ipps" else (48, 20)
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@EVERY_RULE
@pytest.mark.parametrize("vocab", [1000, 1024])
def test_points_that_are_not_in_use_do_not_show(rule: Selection, vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU looks all of them up."""
    x, labels = given(vocab)
    x[40:, 3:] = -1e4  # a support of 3
    ours = select(x, rule, labels=labels, temperatures=(1.0, 2.0))
    monkeypatch.setattr(inverse_cdf, "_looked_at", lambda used: torch.arange(used.numel()))
    theirs = select(x, rule, labels=labels, temperatures=(1.0, 2.0))
    for name, value in vars(ours).items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(value, getattr(theirs, name), rtol=0, atol=0, equal_nan=True)


@EVERY_RULE
@pytest.mark.parametrize("everything", [False, True])
def test_bad_logits_harm_nobody_else(rule: Selection, everything: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are found out later, when others of their tile have been drawn."""
    if everything:
        monkeypatch.setattr(inverse_cdf, "_looked_at", lambda used: torch.arange(used.numel()))
    x, labels = given()
    numbers = None if rule.kind in ("topk", "topp", "full") else draw(rule)
    sound, finite = select_ahead(x, rule, labels, (1.0, 2.0), numbers)
    assert finite.all()
    for row, bad in enumerate((torch.nan, -torch.nan, torch.inf, -torch.inf)):
        x[row, 500] = bad
        x[10 + row] = bad
    x[20, 960:] = 50.0  # where points fall, in a block that the vocabulary does not fill
    x[20, 999] = -torch.nan
    found, finite = select_ahead(x, rule, labels, (1.0, 2.0), numbers)
    assert (~finite).nonzero()[:, 0].tolist() == [0, 1, 2, 3, 10, 11, 12, 13, 20]
    assert (found.ids < 1000).all()
    for name, value in vars(sound).items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(value[finite], getattr(found, name)[finite], rtol=0, atol=0, equal_nan=True)


@TRITON
@pytest.mark.slow
def test_kernels_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    """An A100 and an H100: the machine code is made, though nothing here can run it."""
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_kernels.py")), "80", "90"],
        env=settings | {"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"{name}:{gpu}" for gpu in (80, 90) for name in ("look", "choose", "rank", "finish")]
