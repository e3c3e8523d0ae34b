"""Selection on a device: its scans against float64, its targets beside those of a CPU."""

from __future__ import annotations

import warnings
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from kdcache import Selection, select
from kdcache.selection import scan_dispatch, scan_torch
from kdcache.selection.scan_dispatch import ScanRows
from tests.sampling import KINDS, logits_of
from tests.unit.test_scan import TEMPERATURES, nobody, require_scanned
from tests.unit.test_scan_dispatch import RULES as SMALL_RULES

VOCAB = 32_003
ROOM = 2.0
"""The exponential of a GPU is off by two units in the last place, where that of a CPU is off by one."""

SCANS: dict[str, ScanRows] = {"operations": scan_torch.scan_rows}
if find_spec("triton"):
    from kdcache.selection import scan_triton

    SCANS["kernels"] = scan_triton.scan_rows  # on a CPU in Triton's interpreter
RULES = [Selection(k=64, force_label=True), *SMALL_RULES]
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, of Triton's interpreter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", SCANS)
@pytest.mark.parametrize("vocab", [65, 4096, VOCAB, 128_256])
def test_a_scan_against_float64(vocab: int, way: str, dtype: torch.dtype, device: str) -> None:
    on_cpu = device == "cpu"
    if on_cpu and way == "kernels" and vocab > 4096:
        pytest.skip("an interpreter of kernels takes minutes")
    kinds = ("random", "tied") if on_cpu else KINDS
    for kind in kinds:
        given = logits_of(kind, vocab, 2 if on_cpu else 64).clamp(-6e4, 6e4).to(device, dtype)  # float16 ends there
        outside = nobody(given)
        outside[1:] = torch.arange(len(given) - 1, device=device) * 131 % vocab
        for width in (1, 64) if on_cpu else (1, 12, 64, 512):
            if width < vocab:
                found = SCANS[way](given, width, outside, TEMPERATURES)
                x = given.float()
                # Ties go to the smaller id, and the lowest zero is like the highest.
                assert torch.equal(found[1], x.sort(dim=-1, descending=True, stable=True).indices[:, : width + 1])
                require_scanned(x, width, outside, found, 1.0 if on_cpu else ROOM)


def given_logits(rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Logits of every character, and labels, some of them unknown."""
    x = torch.cat([logits_of(kind, vocab, rows).float() for kind in KINDS])
    labels = torch.randint(vocab, (len(x),), generator=torch.Generator().manual_seed(0))
    labels[::7] = -100
    return x, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_targets_are_those_of_a_cpu(rule: Selection, dtype: torch.dtype, device: str) -> None:
    """Draws come from the same numbers, so ids are the same but where a point lies on the border of two ids."""
    x, labels = given_logits(8, 1000 if device == "cpu" else VOCAB)
    x = x.to(dtype)
    ours = select(x, rule, labels=labels, temperatures=(1.0, 2.0))
    with warnings.catch_warnings(action="error"):  # one says that kernels are not trusted
        theirs = select(x.to(device), rule, labels=labels.to(device), temperatures=(1.0, 2.0))
    assert theirs.ids.device.type == device
    theirs = theirs.to("cpu")
    same = (ours.ids == theirs.ids).all(-1) & (ours.count == theirs.count)
    assert (~same).sum() <= 2
    for name in ("logprobs", "weights", "log_partition", "log_tail", "entropy", "label_logprob"):
        if getattr(ours, name) is None:  # sampled targets have no tail
            assert getattr(theirs, name) is None
            continue
        a, b = getattr(ours, name)[same], getattr(theirs, name)[same]
        torch.testing.assert_close(b, a, atol=4e-6, rtol=8e-6, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_takes_kernels(dtype: torch.dtype) -> None:
    """They are trusted on this card, and give the same bits each time."""
    assert find_spec("triton"), "Triton is not installed"
    x = logits_of("random", VOCAB, 256).to("cuda", dtype)
    scan_dispatch._trusted.clear()
    with warnings.catch_warnings(action="error"):
        first = scan_dispatch.scan_rows(x, 64, nobody(x), TEMPERATURES)
    assert list(scan_dispatch._trusted.values()) == [True]
    for _ in range(5):
        for a, b in zip(first, scan_dispatch.scan_rows(x, 64, nobody(x), TEMPERATURES), strict=True):
            assert torch.equal(a, b)


def test_bad_logits_are_named(device: str) -> None:
    from kdcache.errors import LogitsError

    x, labels = given_logits(2, 1000)
    x[7, 500] = torch.nan
    with pytest.raises(LogitsError, match="position 7 are not finite"):
        select(x.to(device), Selection(k=4), labels=labels.to(device))


def test_pinned_targets_arrive_as_they_were(device: str) -> None:
    """As batches travel to a GPU and back: pinned, and without waiting."""
    x, labels = given_logits(4, 1000)
    targets = select(x, Selection(kind="ipps", k=12), labels=labels)
    sent = targets if device == "cpu" else targets.pin_memory().to(device, non_blocking=True)
    back = sent.to("cpu", non_blocking=True)
    if device == "cuda":
        torch.cuda.synchronize()
    for name, value in vars(targets).items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(getattr(back, name), value, rtol=0, atol=0, equal_nan=True)
