# SPDX-License-Identifier: Apache-2.0
"""Three steps of a config and what compiling them took: `python -m launch.bench.first_steps FILE`.

Case compile runs it in a new process, where nothing is compiled yet.
"""

import collections
import json
import sys
import tempfile

import jax

from launch import config_flags
from launch.bench import measure
from opd_jax import build, train

EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace_seconds",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower_seconds",
    "/jax/core/compile/backend_compile_duration": "xla_seconds",
}


def main(path: str) -> None:
    seconds: dict[str, float] = collections.defaultdict(float)
    count = collections.Counter()

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event in EVENTS:
            seconds[EVENTS[event]] += duration_secs
            count[EVENTS[event]] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    config = config_flags.load(path)
    with tempfile.TemporaryDirectory() as workdir, build.build(config, workdir) as run:
        seconds.clear()  # what building took: initial weights, loading
        state, walls, first, compilations = run.start.state, [], {}, []
        for step in range(3):
            before, clock = count["xla_seconds"], measure.Clock()
            state, _ = train._step(run, state, step)
            walls.append(clock.seconds())
            compilations.append(count["xla_seconds"] - before)
            first = first or dict(seconds)
    result = dict(
        compile_seconds=sum(first.values()),
        **first,
        first_step_seconds=walls[0],
        third_step_seconds=walls[2],
        compilations=compilations[0],
        later_compilations=sum(compilations[1:]),
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
