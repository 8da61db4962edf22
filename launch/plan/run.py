# SPDX-License-Identifier: Apache-2.0
"""From a config and the name of a slice to a plan."""

import os

os.environ.setdefault(
    "JAX_PLATFORMS", "cpu"
)  # before jax: nothing runs, so no accelerator is taken


import jax.numpy as jnp
import ml_collections as mlc

from launch.plan import chips, predict, stages
from launch.plan.text import Plan
from opd_jax import build, parallel
from opd_jax.algorithm import selectors
from opd_jax.algorithm.objective import Objective
from opd_jax.model import hf, published, qwen3

EOS_IDS = (151645, 151643)  # Qwen3's; only how many there are is compiled


def assumptions(config: mlc.ConfigDict, **given) -> stages.Assumptions:
    """Checked; a response mean of 0 is half of the longest response."""
    most = config.rollout.response_len
    given["response_mean"] = given["response_mean"] or most / 2
    if not 1 <= given["response_mean"] <= most:
        raise ValueError(
            f"--response_mean={given['response_mean']:g} must lie between 1 and the longest, "
            f"config.rollout.response_len={most}. Set --response_mean={most // 2}."
        )
    return stages.Assumptions(**given)


def plan(config: mlc.ConfigDict, slice_: chips.Slice, assume: stages.Assumptions, report) -> Plan:
    """Compiles every stage of `config` for a slice. Raises ValueError before it compiles."""
    mesh = parallel.build_mesh(config.mesh, list(slice_.devices))
    found = predict.predict(pieces(config, mesh, assume), slice_, list(mesh.devices.flat), report)
    tokens = config.data.batch_size * assume.response_mean
    return Plan(slice_, dict(mesh.shape), found, tokens, describe(assume))


def pieces(config: mlc.ConfigDict, mesh, assume: stages.Assumptions) -> stages.Pieces:
    """What a step of `config` compiles on `mesh`, read from the config as a run reads it."""
    parallel.check_rows(config.data.batch_size, "data.batch_size", mesh)
    sections = {role: config[role] for role in ("student", "teacher", "reference")}
    models = {role: model_config(section.path) for role, section in sections.items()}
    objective = Objective.of(config.objective.to_dict())
    reads = selectors.of(config.selector.to_dict()).needs | {"teacher_logp_bt"} | build.WATCHED
    device = build.on_device(
        config,
        mesh,
        models,
        eos_ids=EOS_IDS,
        pad_id=EOS_IDS[-1],
        vocab_size=models["student"].vocab_size,
        batch_size=config.data.batch_size,
        prompt_len=config.data.prompt_len,
        sample=config.rollout.to_dict(),
        objective=objective,
        needs=(objective.needs | reads) - {"spans"},
        num_steps=config.num_steps,
        param_dtype=jnp.dtype(config.student.param_dtype),
    )
    params = {
        role: model and place(model, sections[role].param_dtype, mesh)
        for role, model in models.items()
    }
    return stages.Pieces(
        device,
        **params,
        batch_size=config.data.batch_size,
        prompt_len=config.data.prompt_len,
        head_chunk=config.pack.head_chunk,
        assume=assume,
    )


def model_config(name: str) -> qwen3.Qwen3Config | None:
    """Shape of a model: known by heart for published hub ids, read from a directory otherwise."""
    if not name:
        return None
    return published.CONFIGS.get(name) or qwen3.Qwen3Config.from_hf(hf.resolve(name))


def num_experts(config: mlc.ConfigDict) -> int:
    """The most that a model of the config has; 0 = all are dense."""
    models = (model_config(config[role].path) for role in ("student", "teacher", "reference"))
    return max(model.num_experts for model in models if model)


def place(config: qwen3.Qwen3Config, dtype: str, mesh) -> dict:
    """Parameters in training sharding, without data."""
    shapes = qwen3.param_shapes(config, jnp.dtype(dtype))
    return stages.with_shardings(shapes, parallel.shardings(qwen3.param_axes(config), mesh))


def describe(assume: stages.Assumptions) -> str:
    steps = assume.decode_steps or "as many as the longest response needs"
    return (
        f"prompts of {assume.prompt_mean:g} and responses of {assume.response_mean:g} tokens on "
        f"average, decode steps: {steps}, {assume.supervised:.0%} of response tokens supervised, "
        f"micro-batches {assume.packing:.0%} full"
    )
