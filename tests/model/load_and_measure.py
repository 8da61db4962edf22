# SPDX-License-Identifier: Apache-2.0
"""Loads a model directory and says how far anonymous memory grew.

Run by test_true_size.py in a process of its own, so that nothing else moves the figure:

python -m tests.model.load_and_measure DIRECTORY
"""

import json
import pathlib
import re
import sys
import threading

import jax

from opd_jax.model import hf


def anonymous_bytes() -> int:
    """Of this process; memory-mapped files do not count, copies of them do."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", status)[1])


def main():
    jax.block_until_ready(jax.numpy.zeros(1))  # the runtime's own memory comes before
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    _, params = hf.load(sys.argv[1])
    jax.block_until_ready(params)
    after = anonymous_bytes()
    done.set()
    thread.join()
    sizes = [x.nbytes for x in jax.tree.leaves(params)]
    growth = dict(peak=max(peak, after) - before, after=after - before, params=sum(sizes))
    print(json.dumps(growth))


if __name__ == "__main__":
    main()
