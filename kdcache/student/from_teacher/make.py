"""A student cut out of its teacher, in a folder of its own: a plain Hugging Face model with the teacher's tokenizer.

Guarantee: the folder appears whole or not at all, and only after the model in it was loaded again as `train-student`
loads it. Choosing the best of L layers can be killed at any moment; the same command goes on with what is not measured
yet. Layers that are kept are the teacher's bit for bit, in the dtype of its checkpoint.
Cost: the teacher and the student in float32. The best N of L layers take about L log2(L - N) passes over some rows,
each of them half of a pass in the mean, as it begins at the layer that is left out; width takes one.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdcache.advice import of_made_student
from kdcache.cache import Cache, open_cache
from kdcache.cache_writer import tokenizer_files
from kdcache.errors import ConfigError, ModelError, one_line
from kdcache.isolation import probe
from kdcache.pretrained import (
    context_length,
    find_device,
    fingerprint,
    has_tokenizer,
    load_model,
    load_tokenizer,
    model_folder,
    read_config,
)
from kdcache.pretrained.blocks import find_blocks
from kdcache.pretrained.config import load_config
from kdcache.pretrained.files import is_gguf
from kdcache.pretrained.quantised import quantisation
from kdcache.store.atomic_files import NewFolder, storage_errors, sweep
from kdcache.student.data import Rows, split_heldout
from kdcache.student.evaluation import measure
from kdcache.student.from_teacher import calibration
from kdcache.student.from_teacher.config import CutOptions, MakeStudentOptions
from kdcache.student.from_teacher.cut import narrowed, require_narrowable, with_fewer_layers
from kdcache.student.from_teacher.importance import Activity, Round, least_needed
from kdcache.student.from_teacher.kept_states import KeptStates
from kdcache.student.from_teacher.kl_record import KlRecord
from kdcache.student.from_teacher.layers import LayerRule
from kdcache.student.from_teacher.sizes import Sizes
from kdcache.student.model import load_student
from kdcache.student.own_tokenizer import FILES, read_own_tokenizer

RECORD = "make-student.json"
"""What a student was cut from and how, in its folder."""
_FREE_TO_CHANGE = ("out", "device", "batch_rows")
"""Options of which a student does not depend."""

Progress = Callable[[int, int, str], None]
"""Called with what is done, what is to do, and what that is."""


def make_student(options: MakeStudentOptions, on_progress: Progress | None = None) -> dict[str, Any]:
    """Cut a student out of a teacher, and measure it.

    Args:
        options: what is kept, and where the student goes.
        on_progress: see `Progress`.

    Returns:
        What `kdcache make-student --json` prints; docs/commands/make-student.md names its parts.

    Raises:
        KdcacheError: see the exception tree. Nothing is then written.
    """
    out, device = Path(options.out), find_device(options.device)
    asked = {name: value for name, value in dataclasses.asdict(options).items() if name not in _FREE_TO_CHANGE}
    before = _made_before(out, asked)
    if before is not None:
        return {"out": str(out), **before}
    require_free(out)
    cache = None if options.cache is None else open_cache(options.cache)
    sides: tuple[Rows, Rows] = ((), ()) if cache is None else split_heldout(len(cache), options.heldout)
    text = None if options.text is None else Path(options.text).expanduser()
    source = Source(options.teacher, cache, sides[0], options.importance_rows, text)
    summary = cut_into(out, source, options, device, options.batch_rows, on_progress, sides[1], asked)
    return {"out": str(out), **summary}


def _made_before(out: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """What was said of a student that was made by the same options of the same teacher, if it stands in a folder."""
    try:
        record: dict[str, Any] = json.loads((out / RECORD).read_text(encoding="utf-8"))
        same = record.pop("options") == json.loads(json.dumps(asked))
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    if not same or record.get("teacher_sha256") != fingerprint(model_folder(asked["teacher"], "teacher")):
        return None
    return record


def require_free(out: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        ConfigError: it does.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out {out} exists already; choose another folder")


@dataclass(frozen=True)
class Source:
    """A teacher, and what it is measured on.

    Attributes:
        teacher: its name.
        cache: a cache of it, if there is one.
        rows: of the cache, that importance may be measured on.
        most: how many of them are taken; None for what is usual.
        text: a text instead.
    """

    teacher: str
    cache: Cache | None
    rows: Rows
    most: int | None
    text: Path | None = None


def start_from(
    teacher: str, options: CutOptions, cache: Cache, rows: Rows, out: Path, device: torch.device, batch_rows: int
) -> dict[str, Any]:
    """Cut a student out of a teacher for a training that begins with it; see `make_student`.

    Args:
        teacher: its name.
        options: what is kept.
        cache: what the student will learn from.
        rows: of it, that may be read.
        out: the folder of the student.
        device: where it is measured.
        batch_rows: rows a forward pass.
    """
    source = Source(teacher, cache, rows, options.importance_rows)
    return cut_into(out, source, options, device, batch_rows, None, ())


def cut_into(
    out: Path,
    source: Source,
    options: CutOptions,
    device: torch.device,
    batch_rows: int,
    on_progress: Progress | None,
    heldout: Rows,
    asked: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Cut a student out of a teacher into a folder; without held-out rows it is loaded, but not measured.

    Where options were asked for, what is returned is kept in the folder, with them.
    """
    show = on_progress or (lambda *_: None)
    folder = model_folder(source.teacher, "teacher")
    config = load_config(folder)
    old = Sizes.of(config, (getattr(config, "architectures", None) or [type(config).__name__])[0])
    rule = LayerRule.parse(options.layers)
    kept, new = rule.kept(old.layers), old.cut(options)
    if source.cache is not None:
        _require_fit(folder, config, source)
    show(0, 1, "teacher")
    teacher = load_model(folder, "teacher", "float32", device).eval()
    _require_numbers(teacher, folder)
    vocab, parameters, name = config.get_text_config().vocab_size, _count(teacher), type(teacher).__name__
    rounds: list[Round] = []
    record = None
    if rule.best is not None and source.cache is not None:
        rows = calibration.rows_for_layers(source.cache, source.rows, source.most)
        about = {"teacher": fingerprint(folder), "cache": source.cache.manifest.sha256, "rows": rows}
        record = KlRecord(out.with_name(f".{out.name}.layers.jsonl"), about)
        gone, rounds = _choose(teacher, source.cache, rows, rule.best, record, device, batch_rows, show)
        kept = tuple(number for number in kept if number not in gone)
    made, generation = with_fewer_layers(teacher, kept, vocab), getattr(teacher, "generation_config", None)
    del teacher
    if options.narrows:
        require_narrowable(made)
        made = _narrow(made, dataclasses.replace(new, layers=len(kept)), source, folder, batch_rows, show)
    made.generation_config = generation
    facts = {
        "teacher": source.teacher,
        "teacher_sha256": fingerprint(folder),
        "class": name,
        "layers": list(kept),
        "sizes": {"teacher": _shown(old), "student": _shown(Sizes.of(made.config, name))},
        "parameters": {"teacher": parameters, "student": _count(made), "ratio": parameters / _count(made)},
        "layer_kl": [_shown_round(found) for found in rounds],
    }
    sweep(out.parent)
    with NewFolder(out) as new_folder:
        _write(made, new_folder.place, folder)
        del made
        figures = _measured(new_folder.place, source.cache, heldout, device, batch_rows, show)
        advice = of_made_student(facts, None if source.cache is None else source.cache.manifest.teacher_sha256)
        told = {**facts, "heldout": figures, "advice": advice}
        record_of = facts if asked is None else {**told, "options": asked}
        (new_folder.place / RECORD).write_text(json.dumps(record_of, indent=2) + "\n", encoding="utf-8")
        if not new_folder.publish():
            require_free(out)
    if record is not None:
        record.delete()
    return told


def _require_fit(folder: Path, config: Any, source: Source) -> None:
    """Refuse a cache whose ids mean nothing, or something else, to the teacher, before anything is measured on it."""
    cache, size = source.cache, config.get_text_config().vocab_size
    assert cache is not None
    if size < cache.manifest.vocab_size:
        raise ModelError(
            f"the teacher {source.teacher} has a vocabulary of {size}, which does not cover the cache's "
            f"{cache.manifest.vocab_size} ids"
        )
    read_own_tokenizer(folder, cache, "teacher")


def _require_numbers(teacher: Any, folder: Path) -> None:
    if not all(parameter.is_floating_point() for parameter in teacher.parameters()):
        raise ModelError(
            f"the teacher {folder} is quantised ({quantisation(folder)}), and packed weights cannot be cut; give the "
            "checkpoint that it was made from"
        )


def _count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())  # a tied one counts once


def _shown(sizes: Sizes) -> dict[str, int | None]:
    names = ("layers", "hidden", "heads", "key_value_heads", "head_dim", "intermediate", "experts")
    return {name: getattr(sizes, name) for name in names}


def _shown_round(found: Round) -> dict[str, float | None]:
    return {str(layer): kl if math.isfinite(kl) else None for layer, kl in found.items()}


def _choose(
    teacher: Any,
    cache: Cache,
    rows: Rows,
    keep: int,
    record: KlRecord,
    device: torch.device,
    batch_rows: int,
    show: Progress,
) -> tuple[frozenset[int], list[Round]]:
    """The layers that the teacher can best do without, by the KL on rows of a cache."""
    blocks, spec = find_blocks(teacher), cache.manifest.row_spec
    probe(teacher, spec.vocab_size, spec.seq_len, device, isolate=spec.isolate, packed=spec.packed)

    states = KeptStates(blocks, frozenset())

    def kl(gone: frozenset[int], layer: int) -> float:
        nonlocal states
        if states.gone != gone or not states.batches:
            states = KeptStates(blocks, gone)
            with states.kept():
                measure(teacher, cache, rows, device, batch_rows)
        with states.without(layer):
            found = measure(teacher, cache, rows, device, batch_rows)["kl"]
        if found is None:
            raise ConfigError(f"the cache {cache.storage} has no KL at T = 1, so no layer can be called best on it")
        return float(found) if math.isfinite(found) else math.inf

    return least_needed(
        len(blocks.layers),
        keep,
        lambda gone, layer: record.kl(gone | {layer}, lambda: kl(gone, layer)),
        lambda done, total: show(done, total, "layers"),
    )


def _narrow(model: Any, sizes: Sizes, source: Source, folder: Path, batch_rows: int, show: Progress) -> Any:
    """The model with the parts that matter on the rows of the cache, or on the text."""
    activity, done = Activity(model), 0
    if source.cache is not None:
        rows = calibration.rows_for_width(source.rows, source.most)
        total, found = len(rows), calibration.of_cache(source.cache, rows, batch_rows)
    else:
        assert source.text is not None
        longest = context_length(model.config.to_dict())
        total, found = 0, calibration.of_text(source.text, folder, source.most, batch_rows, longest)
    for batch in found:
        activity.add(batch)
        done += len(batch["input_ids"])
        show(done, max(done, total), "rows")
    return narrowed(model, sizes, activity.kept(sizes))


def _write(model: Any, out: Path, teacher: Path) -> None:
    """A model in the dtype of its teacher's checkpoint, with the teacher's tokenizer."""
    stored = None if is_gguf(teacher) or quantisation(teacher) else read_config(teacher).get("dtype")
    dtype = getattr(torch, str(stored).removeprefix("torch."), torch.float32)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with storage_errors(out):
        try:
            model.to(dtype).save_pretrained(out)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise ModelError(f"{type(model).__name__} cannot be saved: {one_line(error)}") from error
        if is_gguf(teacher):
            files = tokenizer_files(load_tokenizer(teacher))
        elif has_tokenizer(teacher):
            files = {name: (teacher / name).read_bytes() for name in FILES if (teacher / name).is_file()}
        else:
            files = {}
        for name, content in files.items():
            (out / name).write_bytes(content)


def _measured(
    out: Path, cache: Cache | None, rows: Rows, device: torch.device, batch_rows: int, show: Progress
) -> dict[str, Any] | None:
    """Load what was written, as a training does, and measure it on held-out rows."""
    if cache is None:
        load_model(out, "student", "float32")
        return None
    student = load_student(str(out), cache, device, seed=0)
    if not len(rows):
        return None
    return measure(student, cache, rows, device, batch_rows, lambda done, total: show(done, total, "held-out rows"))
