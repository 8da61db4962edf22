# SPDX-License-Identifier: Apache-2.0
"""Rotary settings of config.json: read as transformers reads them, or refused by name."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from opd_jax.model import config, layers

YARN = tiny_models.YARN  # factor 4 over 64 positions, no rope_theta of its own
PLAIN = dict(rope_type="default", rope_theta=1e6)
THETA = dict(rope_theta=5e3)


def without(*names: str) -> dict:
    return {key: value for key, value in tiny_models.BASE.items() if key not in names}


PUBLISHED = without("rope_scaling")  # rope_theta=1e6 at the top level
NEW = without("rope_scaling", "rope_theta")

# Whatever these say, transformers and we must say the same of frequencies and scale.
READ = {
    "published": PUBLISHED,
    "published, scaling null": PUBLISHED | dict(rope_scaling=None),
    "published, scaling empty": PUBLISHED | dict(rope_scaling={}, rope_parameters=PLAIN | THETA),
    "new": NEW | dict(rope_parameters=PLAIN),
    "new, type missing": NEW | dict(rope_parameters=dict(rope_theta=1e4)),
    "yarn in rope_scaling": PUBLISHED | dict(rope_scaling=YARN),
    "yarn in rope_parameters": NEW | dict(rope_parameters=YARN | dict(rope_theta=1e6)),
    "yarn in rope_parameters, base outside": PUBLISHED | dict(rope_parameters=YARN),
    # An export of ours, changed as Qwen3's documentation says.
    "yarn beside default": PUBLISHED | dict(rope_scaling=YARN, rope_parameters=PLAIN),
    "default beside yarn": PUBLISHED | dict(rope_scaling=PLAIN, rope_parameters=YARN | THETA),
    "two yarns": PUBLISHED | dict(rope_scaling=YARN, rope_parameters=YARN | dict(factor=2.0)),
    "base of the other place": PUBLISHED | dict(rope_scaling=YARN, rope_parameters=PLAIN | THETA),
    "base in both": PUBLISHED | dict(rope_parameters=PLAIN | THETA),
    "base in scaling": PUBLISHED | dict(rope_scaling=YARN | THETA),
    "type": PUBLISHED | dict(rope_scaling=dict(type="yarn", factor=4.0)),
    "type and rope_type": PUBLISHED | dict(rope_scaling=YARN | dict(type="default")),
    "type and rope_type, turned": PUBLISHED
    | dict(rope_scaling=YARN | dict(type="yarn", rope_type="default")),
    "no original": PUBLISHED | dict(rope_scaling=dict(rope_type="yarn", factor=4.0)),
    "original outside": PUBLISHED
    | dict(rope_scaling=dict(rope_type="yarn", factor=2), original_max_position_embeddings=128),
    "original in both": PUBLISHED | dict(rope_scaling=YARN, original_max_position_embeddings=64),
    "no length at all": without("rope_scaling", "max_position_embeddings")
    | dict(rope_scaling=dict(rope_type="yarn", factor=4.0)),
    "factor null": PUBLISHED
    | dict(rope_scaling=YARN | dict(factor=None, original_max_position_embeddings=32)),
    "factor 1": PUBLISHED | dict(rope_scaling=YARN | dict(factor=1.0)),
    "factor below 1": PUBLISHED | dict(rope_scaling=YARN | dict(factor=0.5)),
    "attention_factor": PUBLISHED | dict(rope_scaling=YARN | dict(attention_factor=1.5)),
    "attention_factor null": PUBLISHED | dict(rope_scaling=YARN | dict(attention_factor=None)),
    "attention_factor and mscale": PUBLISHED
    | dict(rope_scaling=YARN | dict(attention_factor=1.5, mscale=2.0, mscale_all_dim=0.5)),
    "betas": PUBLISHED | dict(rope_scaling=YARN | dict(beta_fast=16, beta_slow=2)),
    "betas null": PUBLISHED | dict(rope_scaling=YARN | dict(beta_fast=None, beta_slow=None)),
    "mscale alone": PUBLISHED | dict(rope_scaling=YARN | dict(mscale=2.0)),
    "mscale twice": PUBLISHED | dict(rope_scaling=YARN | dict(mscale=2.0, mscale_all_dim=0.5)),
    "mscale, factor 1": PUBLISHED
    | dict(rope_scaling=YARN | dict(factor=1.0, mscale=2.0, mscale_all_dim=0.5)),
    "not truncated": PUBLISHED | dict(rope_scaling=YARN | dict(truncate=False)),
    "truncate null": PUBLISHED | dict(rope_scaling=YARN | dict(truncate=None)),
    "keys of yarn under default": PUBLISHED | dict(rope_scaling=YARN | dict(rope_type="default")),
    "partial factor 1": PUBLISHED | dict(rope_scaling=YARN, partial_rotary_factor=1.0),
}
REFUSED = {
    "linear": (PUBLISHED | dict(rope_scaling=dict(type="linear", factor=2.0)), '"linear"'),
    "dynamic": (PUBLISHED | dict(rope_scaling=dict(rope_type="dynamic", factor=2.0)), '"dynamic"'),
    "llama3": (PUBLISHED | dict(rope_scaling=dict(rope_type="llama3", factor=2.0)), '"llama3"'),
    "longrope": (NEW | dict(rope_parameters=PLAIN | dict(rope_type="longrope")), '"longrope"'),
    "linear in the place that counts": (
        PUBLISHED | dict(rope_scaling=dict(type="linear", factor=2.0), rope_parameters=PLAIN),
        '"linear"',
    ),
    "null type": (PUBLISHED | dict(rope_scaling=YARN | dict(rope_type=None)), "rope_type is null"),
    "no base": (NEW, "rope_theta is missing"),
    # transformers takes 10,000 here, without a word.
    "base lost": (NEW | dict(rope_scaling=YARN, rope_parameters=PLAIN), "rope_theta is missing"),
    # transformers prints one and computes with the other.
    "two originals": (
        PUBLISHED | dict(rope_scaling=YARN, original_max_position_embeddings=240),
        "is 240 at the top level and 64 in",
    ),
    "no factor": (PUBLISHED | dict(rope_scaling=dict(rope_type="yarn")), "without a factor"),
    "partial, inside": (
        PUBLISHED | dict(rope_scaling=YARN | dict(partial_rotary_factor=0.5)),
        "partial_rotary_factor",
    ),
    "partial, outside": (PUBLISHED | dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    "by layer type": (
        PUBLISHED | dict(rope_parameters=dict(full_attention=PLAIN, sliding_attention=PLAIN)),
        "full_attention",
    ),
}


@pytest.mark.parity
@pytest.mark.parametrize("name", READ)
def test_frequencies_and_scale_are_those_of_transformers(name):
    """Also where two places of the file disagree: the one that transformers takes counts."""
    pytest.importorskip("torch")
    from transformers.models.qwen3 import configuration_qwen3, modeling_qwen3

    theirs = modeling_qwen3.Qwen3RotaryEmbedding(
        configuration_qwen3.Qwen3Config.from_dict(json_copy(READ[name]))
    )
    ours = config.from_dict(json_copy(READ[name]), "config.json")
    np.testing.assert_allclose(layers.rope_frequencies(ours), theirs.inv_freq.numpy(), rtol=2e-6)
    scale = ours.rope_scaling.scale if ours.rope_scaling else 1.0
    np.testing.assert_allclose(scale, theirs.attention_scaling, rtol=1e-6)


def test_the_variants_differ():
    """Else two settings that are mixed up would agree by chance."""

    def table(name):
        ours = config.from_dict(READ[name], "config.json")
        cos, _ = layers.rope_table(ours, jnp.arange(8, dtype=jnp.int32)[None])
        return np.asarray(cos)

    plain, yarn = table("published"), table("yarn in rope_scaling")
    for name in ("yarn beside default", "type", "two yarns", "yarn in rope_parameters"):
        assert np.abs(table(name) - plain).max() > 1e-3, name
    for name in ("base in scaling", "original outside", "factor null", "mscale twice", "betas"):
        assert np.abs(table(name) - yarn).max() > 1e-3, name


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_is_refused_by_name(name):
    raw, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        config.from_dict(raw, "config.json")


def json_copy(raw: dict) -> dict:
    """A copy of its own: transformers writes into the dicts that it is given."""
    return json.loads(json.dumps(raw))
