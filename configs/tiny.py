# SPDX-License-Identifier: Apache-2.0
"""The recipe of the embedded pairs: supervised training on solutions of the embedded task.

python -m launch.pretrain --config=configs/tiny.py:teacher --out=runs/teacher
python -m launch.pretrain --config=configs/tiny.py:student --out=runs/student
python -m launch.pretrain --config=configs/tiny.py:collapse_student --out=runs/collapse_student

The teacher learns from reference solutions. The students are smaller, stop earlier and learn from
solutions that slip (opd_jax.problems.task.Style): the one of the quickstart gets 12 % of its
results wrong and goes on as if nothing had happened; `collapse_student` falls into aimless talk
after its first slip. So the collapse of the second pair is built in, by this recipe, and not found.

Measured with seed 0, held-out problems at temperature 1, 60 per family, each on one busy CPU core:

                  minutes  in-domain | total  largest  count  calendar  heading | smallest (ood)
teacher              26.4        .98 |   .95     1.00    .98       .98     1.00 |           1.00
student              11.1        .46 |   .35      .63    .45       .42      .45 |            .60
collapse_student      8.4        .12 |   .07      .23    .12       .05      .13 |            .22
"""

import ml_collections as mlc

SLIP = {"teacher": 0.0, "student": 0.12, "collapse_student": 0.2}


def get_config(variant: str = "teacher") -> mlc.ConfigDict:
    if variant not in SLIP:
        raise ValueError(f"config variant {variant!r} is unknown; use one of {', '.join(SLIP)}")
    c = mlc.ConfigDict()
    c.seed = 0  # of the weights and the problems
    c.num_steps = 1000  # updates
    c.batch_rows = 16  # packed rows per update
    c.row_tokens = 288  # tokens of a row; problems are never split
    c.warmup_steps = 40
    c.decay_share = 0.5  # of the steps, at the end: learning rates fall linearly to 0
    c.muon_lr = 0.02  # matrices of the layers
    c.adam_lr = 3e-3  # embeddings and norms
    c.num_eval = 60  # held-out problems per family, for the final figure
    c.log_every_steps = 20
    c.eval_every_steps = 200  # a short evaluation on the way, a sixth as many problems
    c.slip = SLIP[variant]  # chance that a sentence gets its result wrong
    c.rough = 6 * (variant == "collapse_student")  # sentences of talk after a slip, at least
    c.model = dict(
        hidden_size=128,
        intermediate_size=320,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        rope_theta=10_000.0,
    )
    if variant != "teacher":
        c.num_steps = 700
        c.model.update(
            hidden_size=96, intermediate_size=256, num_layers=2, num_heads=3, num_kv_heads=1
        )
    return c
