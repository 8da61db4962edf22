# SPDX-License-Identifier: Apache-2.0
"""Rows that are longer than a model's context are refused, with flags and settings that work."""

import dataclasses
import json
import re

import pytest
import tiny_models

from configs import paper, quickstart
from configs.base import get_config
from opd_jax import build, parallel
from opd_jax.config import Settings
from opd_jax.model import hf
from opd_jax.model.config import Qwen3Config, check_context, from_dict
from opd_jax.model.published import CONFIGS
from opd_jax.stages import rollout
from opd_jax.structs import Vocabulary

SHORT = from_dict(tiny_models.BASE, "config.json")  # 256 positions
YARN = from_dict(tiny_models.CONFIGS["yarn"], "config.json")  # 4 times 64
LONG_YARN = from_dict(
    tiny_models.BASE | dict(rope_scaling=tiny_models.YARN | dict(factor=16.0)), "config.json"
)
# An export that raised max_position_embeddings itself.
RAISED = from_dict(tiny_models.CONFIGS["yarn"] | dict(max_position_embeddings=4096), "config.json")


@pytest.mark.parametrize(
    ("config", "prompt_len", "response_len"),
    [
        (SHORT, 64, 192),
        (SHORT, 1, 255),
        (YARN, 64, 192),
        (LONG_YARN, 64, 960),
        (RAISED, 96, 4000),
        (CONFIGS["Qwen/Qwen3-1.7B"], 2048, 16384),
        (CONFIGS["Qwen/Qwen3-1.7B"], 2048, 40960 - 2048),
        (CONFIGS["Qwen/Qwen3-30B-A3B-Instruct-2507"], 2048, 260096),
    ],
)
def test_a_row_within_the_context_passes(config, prompt_len, response_len):
    check_context(config, prompt_len, response_len, "student")


@pytest.mark.parametrize(
    ("config", "prompt_len", "response_len", "flags", "factor"),
    [
        (SHORT, 64, 193, "--config.rollout.response_len=192", 2.0),
        (SHORT, 255, 2, "--config.rollout.response_len=1", 2.0),
        (SHORT, 256, 1, "--config.data.prompt_len=128 --config.rollout.response_len=128", 2.0),
        (SHORT, 4000, 96, "--config.data.prompt_len=128 --config.rollout.response_len=128", 16.0),
        (YARN, 64, 193, "--config.rollout.response_len=192", 5.0),
        (LONG_YARN, 64, 961, "--config.rollout.response_len=960", 17.0),
        (RAISED, 96, 4001, "--config.rollout.response_len=4000", 65.0),
        (
            CONFIGS["Qwen/Qwen3-8B"],
            2048,
            65536,
            "--config.rollout.response_len=38912",
            2.0,
        ),
    ],
)
def test_a_longer_row_is_refused_and_both_ways_out_work(
    config, prompt_len, response_len, flags, factor
):
    with pytest.raises(ValueError, match="the teacher is made for") as caught:
        check_context(config, prompt_len, response_len, "teacher")
    message = str(caught.value)
    assert f"Set {flags}, or" in message
    assert f"--config.rollout.response_len={response_len} make rows of" in message

    said = dict(re.findall(r"(\w+_len)=(\d+)", flags))
    check_context(
        config, int(said.get("prompt_len", prompt_len)), int(said["response_len"]), "teacher"
    )
    scaling = json.loads(re.search(r'"rope_scaling": (\{.*?\})', message)[1])
    assert scaling["factor"] == factor
    stretched = from_dict(config.to_hf() | dict(rope_scaling=scaling), "config.json")
    check_context(stretched, prompt_len, response_len, "teacher")
    assert stretched.rope_scaling.factor == factor


def test_flags_of_other_commands_are_named_as_they_are():
    with pytest.raises(ValueError, match=r"^--prompt_len=64 and --response_len=500 make rows"):
        check_context(SHORT, 64, 500, "model", prefixes=("", ""))


@pytest.mark.parametrize("variant", paper.VARIANTS)
def test_the_papers_rows_fit_its_models(variant):
    config = paper.get_config(variant)
    for model in (config.student, config.teacher):
        shape = CONFIGS[model.path]
        check_context(shape, config.data.prompt_len, config.rollout.response_len, model.path)


@pytest.mark.parametrize("get", [get_config, quickstart.get_config], ids=["base", "quickstart"])
def test_the_embedded_models_fit_the_rows_of_their_configs(get):
    config = get()
    for name in ("embedded:student", "embedded:teacher"):
        shape = Qwen3Config.from_hf(hf.resolve(name))
        check_context(shape, config.data.prompt_len, config.rollout.response_len, name)


@pytest.mark.parametrize("role", ["student", "teacher", "reference"])
def test_a_run_looks_at_each_of_its_models(role):
    """Before anything is compiled: each role alone has the shorter context."""
    shapes = build.Shapes(
        **dict.fromkeys(("student", "teacher", "reference"), RAISED) | {role: SHORT}
    )
    given = dataclasses.replace(Settings(), rollout=rollout.Settings(response_len=500))
    mesh = parallel.build_mesh(given.mesh)
    with pytest.raises(ValueError, match=f"the {role} is made for 256"):
        build.stages(given, mesh, shapes, Vocabulary(SHORT.vocab_size, eos_ids=(0,), pad_id=0))
