"""Stands in for the process in vLLM's environment: speaks frames as that does, and fails in the way that is named."""

from __future__ import annotations

import os
import signal
import sys
import time

import numpy as np

from kdcache.teacher.engines.frames import pack_frame, read_frame

DESCRIBED = {"vllm": "0.32.0", "dtype": "float32", "chunk_tokens": 64}


def main(mode: str) -> None:
    sys.stderr.write("loading the model\nboom: the GPU is on fire\n")
    sys.stderr.flush()
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while (frame := read_frame(source.read)) is not None:
        message, arrays = frame
        opened = {"described": DESCRIBED, "hidden_size": 4}
        answers = {
            "refuse": ({"refused": "vLLM 0.32.0 has no class for it"}, {}),
            "fail": ({"failed": "RuntimeError: out of paper"}, {}),
        }
        if mode == "exit":
            sys.exit(3)
        if mode == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if mode == "silent":
            time.sleep(600)
        if mode == "noise":
            sink.write(b"INFO 11-30 loading weights, please wait a while")
        elif mode == "huge":
            sink.write(b"\xff" * 64)
        elif mode == "early":
            sink.write(pack_frame({}, {})[:-3])
            sys.exit(0)
        elif message["do"] == "open" and mode not in answers:
            sink.write(pack_frame(opened, {}))
        elif mode in answers:
            sink.write(pack_frame(*answers[mode]))
        else:
            count = len(arrays["slots"])
            shape = (count - 1 if mode == "fewer" else count, 32 * 3 + 1 + 2 + 2 + 1 + 1 + 1)
            rows = np.full(shape, -1, np.float64 if mode == "double" else np.float32)
            rows[:, :32], rows[:, 64:96], rows[:, 96] = np.arange(32), 0.01, 32  # ids, weights, count
            rows[:, 101], rows[:, 103] = 1, mode != "infinite"  # entropy, finite
            sink.write(pack_frame({}, {} if mode == "nothing" else {"targets": rows}))
        sink.flush()


if __name__ == "__main__":
    main(sys.argv[1])
