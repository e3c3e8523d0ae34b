"""How every teacher is opened: the dump, its pilot, `verify --teacher` and `evaluate --teacher` call this."""

from __future__ import annotations

from kdcache.errors import ModelError
from kdcache.position_filter import PositionFilter
from kdcache.rows import RowSpec
from kdcache.store.manifest import Manifest
from kdcache.teacher.engines.base import TargetRequest, TeacherSpec, find_engine, require_answerable, require_extras
from kdcache.teacher.opened_teacher import OpenedTeacher


def open_teacher(
    spec: TeacherSpec,
    rows: RowSpec,
    request: TargetRequest | None = None,
    position_filter: PositionFilter | None = None,
) -> OpenedTeacher:
    """Load a teacher with its engine, and let the engine prove what it promises.

    Args:
        spec: which teacher, and how it is run.
        rows: the shape of the rows that it will be given.
        request: what will be asked of it, to be refused here if the engine cannot answer it; None for its logits.
        position_filter: which labelled slots will carry a target.

    Raises:
        ConfigError: no such engine, or a request that it cannot answer.
        ModelError: the teacher cannot be run by it.
    """
    engine = find_engine(spec.engine)
    if request is not None:
        require_answerable(engine, request, position_filter)
    folder = engine.teacher_files(spec).folder
    if request is not None:
        require_extras(engine, folder, request.extras)
    opened = engine(spec, folder, rows)
    try:
        if request is not None:
            require_answerable(opened, request, position_filter)  # an open engine may know less than its class
            opened.prepare(request)
        return OpenedTeacher(opened, rows, spec.batch_rows)
    except BaseException:
        opened.close()
        raise


def open_teacher_of(spec: TeacherSpec, manifest: Manifest, cache: object) -> OpenedTeacher:
    """The same for the teacher that made a cache, and no other.

    Args:
        spec: which teacher, and how it is run.
        manifest: of the cache.
        cache: its name, for messages.

    Raises:
        ModelError: it is another model, or cannot be run.
        ConfigError: no such engine.
    """
    if find_engine(spec.engine).teacher_files(spec).sha256() != manifest.teacher_sha256:
        raise ModelError(
            f"the teacher {spec.model} is not the one that made {cache}: its weights or configuration differ"
        )
    return open_teacher(spec, manifest.teacher_row_spec)
