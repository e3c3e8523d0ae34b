"""torchrun that ends with the exit code of the rank that ended first: `python -m kdcache_cli.torchrun OPTIONS`.

torchrun itself ends with 1 whatever its ranks say, so a batch script cannot tell a run that was stopped (75) from one
that failed. It also dies of SIGUSR1 and leaves its ranks behind; here they are the ones that the signal stops, with as
much time as they need. SIGTERM it passes on, and kills ranks that are still there after 30 seconds.
"""

from __future__ import annotations

import signal
import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from kdcache import stopping


def run() -> None:
    """Run torchrun with the options of the command line."""
    for number in stopping.SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    try:
        main()
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        sys.exit(first.exitcode if first.exitcode > 0 else 128 - first.exitcode)
    except SignalException as told:
        sys.exit(stopping.EXIT_CODE if told.sigval == signal.SIGTERM else 128 + told.sigval)


if __name__ == "__main__":
    run()
