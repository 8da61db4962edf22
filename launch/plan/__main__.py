# SPDX-License-Identifier: Apache-2.0
"""Will a run fit a TPU slice, and how long will a step take? No TPU is needed.

  python -m launch.plan --config=configs/paper.py:1.7b --topology=v5p:4x4x4
  python -m launch.plan --config=configs/paper.py:v5e-8 --topology=v5e:2x4 --search
  python -m launch.plan --config=configs/paper.py:8b --topology=v5p:4x4x8 --json

Compiles every stage of a step for the slice and takes memory from the compiler. Times are
predictions: FLOPs, HBM bytes and interconnect bytes of the compiled programs over the chip's peaks,
whichever takes longest per stage; a real step is slower. Needs the extra `tpu` (libtpu).
"""

import json
import sys

from absl import flags

from launch import config_flags

CONFIG = config_flags.define()
TOPOLOGY = flags.DEFINE_string("topology", None, "slice, as v5e:16x16 or v5p:4x4x4", required=True)
JSON = flags.DEFINE_bool("json", False, "print one JSON object")
SEARCH = flags.DEFINE_bool(
    "search",
    False,
    "try meshes and micro-batches, rank those that fit; figures are printed as they come",
)
PROMPT = flags.DEFINE_float("prompt_mean", 256, "assumed tokens of a prompt", 1)
RESPONSE = flags.DEFINE_float("response_mean", 0, "assumed tokens of a response; 0 = half the most")
STEPS = flags.DEFINE_integer(
    "decode_steps", 0, "assumed decode steps of a rollout; 0 = until the longest response", 0
)
RELEASED = flags.DEFINE_float(
    "released", 0.79, "assumed share of released rows (the paper's)", 0, 1
)
POSITION = flags.DEFINE_float(
    "release_position",
    0.13,
    "assumed mean release point (the paper's median), share of a row",
    0,
    1,
)
PACKING = flags.DEFINE_float("packing", 0.9, "assumed share of a micro-batch that is real", 0.01, 1)


def main(_) -> None:
    from launch.plan import advice, chips, run, search, text

    config = CONFIG.value

    def report(line):
        print(line, file=sys.stderr, flush=True)

    try:
        assume = run.assumptions(
            config,
            prompt_mean=PROMPT.value,
            response_mean=RESPONSE.value,
            decode_steps=STEPS.value,
            supervised=1 - RELEASED.value * (1 - POSITION.value),
            packing=PACKING.value,
        )
        slice_ = chips.describe(TOPOLOGY.value)
        if SEARCH.value:
            found = search.search(
                config,
                lambda config: run.plan(config, slice_, assume, report),
                len(slice_.devices),
                run.num_experts(config),
                report,
            )
            print(json.dumps(search.as_json(found)) if JSON.value else search.as_table(found))
            return
        plan = run.plan(config, slice_, assume, report)
    except ValueError as error:
        sys.exit(f"ERROR: {error}")
    if JSON.value:
        print(json.dumps(text.as_json(plan)))
    else:
        print(text.as_table(plan, advice.advise(plan, config)))


if __name__ == "__main__":
    config_flags.run(main)
