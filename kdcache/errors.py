"""The exceptions of kdcache, in one tree.

    KdcacheError                 the root: one sentence for a person, exit code 2 on the command line
    ├── ConfigError              an option, or a combination of options, that cannot be honoured
    ├── CorpusError              documents that cannot be read, tokenised or found
    ├── ModelError               a teacher or student folder that cannot serve
    │   ├── IsolationError       a model that lets one packed piece see its neighbour
    │   ├── LogitsError          NaN or infinite logits out of the teacher
    │   └── EngineError          an engine that gives something other than was asked
    ├── TargetError              a sparse target asked for something that it does not hold
    ├── LaunchError              workers that die again and again
    ├── StageError               a stage of a recipe whose command failed
    └── CacheError               a cache that is missing or cannot be written
        ├── CacheMismatchError   the folder holds a cache of another configuration
        ├── IncompleteCacheError shards that are planned but not committed
        └── CorruptCacheError    bytes that are not what their record promises

An error names the file or option, the value it got, the limit, and what to do next.
Anything that is not a KdcacheError is a defect of kdcache and keeps its traceback.
"""


class KdcacheError(Exception):
    """Root of the tree. Its text is one sentence meant for a person."""


class ConfigError(KdcacheError):
    """An option, or a combination of options, that cannot be honoured."""


class CorpusError(KdcacheError):
    """Documents that cannot be read, tokenised or found."""


class ModelError(KdcacheError):
    """A teacher or student that cannot serve."""


class IsolationError(ModelError):
    """A model that lets one packed piece see its neighbour."""


class LogitsError(ModelError):
    """NaN or infinite logits.

    `position` is the index, along the first axis of the logits given to `select`, of the first
    offender; the dump loop turns it into a document and an offset.
    """

    def __init__(self, message: str, position: int) -> None:
        super().__init__(message)
        self.position = position


class EngineError(ModelError):
    """An engine that gives something other than was asked."""


class TargetError(KdcacheError):
    """A sparse target asked for something that it does not hold."""


class LaunchError(KdcacheError):
    """Workers that die again and again."""


class StageError(KdcacheError):
    """A stage of a recipe whose command failed.

    `code` is the exit code of the command, `output` what it wrote to stderr where that was not a terminal.
    """

    def __init__(self, message: str, code: int = 1, output: str = "") -> None:
        super().__init__(message)
        self.code, self.output = code, output


class CacheError(KdcacheError):
    """A cache that is missing or cannot be written."""


class CacheMismatchError(CacheError):
    """The folder holds a cache of another configuration."""


class IncompleteCacheError(CacheError):
    """Shards that are planned but not committed."""


class CorruptCacheError(CacheError):
    """Bytes that are not what their record promises."""


def one_line(error: BaseException) -> str:
    """The first line of what a library said, and the next when the first only announces it; for a sentence of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def rebuilt(name: str, message: str) -> KdcacheError:
    """An error that another process told of, by the name of its class and its sentence.

    It is of that class where this is one of ours and needs no more than a sentence, else of a class above it.
    """
    kind = globals().get(name, KdcacheError)
    if kind is LogitsError:
        return ModelError(message)
    return kind(message) if isinstance(kind, type) and issubclass(kind, KdcacheError) else KdcacheError(message)
