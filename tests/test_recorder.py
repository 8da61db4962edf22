# SPDX-License-Identifier: Apache-2.0
"""What is stored of a step says what the model saw."""

import jax
import numpy as np
import pytest

from opd_jax import build
from opd_jax.workdir import records
from tests import fakes

pytestmark = pytest.mark.usefixtures("on_one_device", "quick_compile")


@pytest.mark.parametrize("thinking", [False, True])
def test_a_stored_trajectory_shows_the_prompt_that_the_model_saw(pair, tmp_path, thinking):
    """The edit this catches: a prompt rendered in the other of the template's two modes."""
    config = fakes.small_config(
        pair, **{"data.thinking": thinking, "rollout.response_len": 4, "evaluate.source": ""}
    )
    with build.build(config, str(tmp_path)) as run:
        params, batch = run.start.state.params, next(run.prompts)
        taken = run.stages.observe(params, batch, jax.random.key(0), 0)
        run.recorder.row(0, taken)
        tokenizer = run.recorder.tokenizer
    stored = list(records.read_rollouts(tmp_path))
    assert len(stored) == len(batch.examples)
    for row, tokens_p, valid_p in zip(stored, batch.tokens_bp, batch.valid_bp, strict=True):
        assert row["prompt"].endswith("</think>\n\n") == (not thinking)
        np.testing.assert_array_equal(tokenizer.encode(row["prompt"]), tokens_p[valid_p])
