"""What a ready-made process has imported when it begins (tests/processes.py).

Importing this runs nothing of kdcache's and starts no thread, but for one of pyarrow's allocator, which minds forks.
"""

from __future__ import annotations

import os

from kdcache_cli.frame import _settle

os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # the streams of these processes are files
_settle()

import datasets  # noqa: F401, E402
import kdcache_cli.main  # noqa: E402
import kdcache_cli.tables  # noqa: F401, E402
import matplotlib.backends.backend_agg  # noqa: E402
import matplotlib.figure  # noqa: F401, E402
import pydantic.main  # noqa: F401, E402
import s3fs  # noqa: F401, E402
import torch._dynamo  # noqa: E402
import torch.distributed.tensor  # noqa: F401, E402
import transformers.models.llama.modeling_llama  # noqa: F401, E402
from numba.core.registry import cpu_target  # noqa: E402

import kdcache.convert  # noqa: E402
import kdcache.report.evaluate  # noqa: E402
import kdcache.report.inspect  # noqa: E402
import kdcache.student.readers  # noqa: E402
import kdcache.student.train  # noqa: E402
import kdcache.teacher.dump  # noqa: E402
import kdcache.verify  # noqa: E402
from tests.processes import READY  # noqa: E402

cpu_target.typing_context.refresh()  # what numba imports for its first call
cpu_target.target_context.refresh()

kdcache.student.readers.START = READY  # their readers are ready-made as well
