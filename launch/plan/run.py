# SPDX-License-Identifier: Apache-2.0
"""From a config and the name of a slice to a plan."""

import os

# Before jax is imported: nothing runs, so no accelerator is taken.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax.numpy as jnp
import ml_collections as mlc

from launch.plan import chips, predict, stages
from launch.plan.text import Plan
from opd_jax import build, parallel
from opd_jax.config import read
from opd_jax.model import hf, published, qwen3
from opd_jax.structs import Vocabulary

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
    """Compiles every stage of `config` for a slice, unless arithmetic shows that one cannot fit.

    Raises ValueError before it compiles.
    """
    mesh = parallel.build_mesh(config.mesh, list(slice_.devices))
    step = pieces(config, mesh, assume)
    found = predict.by_arithmetic(step.least(), slice_)
    found = found or predict.predict(step, slice_, list(mesh.devices.flat), report)
    tokens = config.data.batch_size * assume.response_mean
    return Plan(slice_, dict(mesh.shape), found, tokens, describe(assume))


def pieces(config: mlc.ConfigDict, mesh, assume: stages.Assumptions) -> stages.Pieces:
    """What a step of `config` compiles on `mesh`, read from the config as a run reads it."""
    given = read(config)
    parallel.check_rows(given.data.batch_size, "data.batch_size", mesh)
    named = build.models(given)
    models = {role: model_config(source.path, role) for role, source in named.items()}
    vocabulary = Vocabulary(models["student"].vocab_size, EOS_IDS, pad_id=EOS_IDS[-1])
    params = {
        role: model and sharded_params(model, named[role].param_dtype, mesh)
        for role, model in models.items()
    }
    parts = build.stages(given, mesh, models, vocabulary)
    return stages.Pieces(parts, given, assume, **params)


def model_config(name: str, role: str) -> qwen3.Qwen3Config | None:
    """Shape of a model: built in for published hub ids, read from a directory otherwise."""
    if not name:
        return None
    try:
        return published.CONFIGS.get(name) or qwen3.Qwen3Config.from_hf(hf.resolve(name))
    except (ValueError, OSError) as error:
        raise ValueError(f"--config.{role}.path={name} cannot be read: {error}") from error


def num_experts(config: mlc.ConfigDict) -> int:
    """The most that a model of the config has; 0 = all are dense."""
    roles = ("student", "teacher", "reference")
    models = (model_config(config[role].path, role) for role in roles)
    return max(model.num_experts for model in models if model)


def sharded_params(config: qwen3.Qwen3Config, dtype: str, mesh) -> dict:
    """Parameters as ShapeDtypeStructs in training sharding."""
    shapes = qwen3.param_shapes(config, jnp.dtype(dtype))
    return stages.with_shardings(shapes, parallel.shardings(qwen3.param_axes(config), mesh))


def describe(assume: stages.Assumptions) -> str:
    steps = assume.decode_steps or "as many as the longest response needs"
    return (
        f"prompts of {assume.prompt_mean:g} and responses of {assume.response_mean:g} tokens on "
        f"average, decode steps: {steps}, {assume.supervised:.0%} of response tokens supervised, "
        f"micro-batches {assume.packing:.0%} full"
    )
