# SPDX-License-Identifier: Apache-2.0
"""Published sizes with random weights: written by torch, loaded, run and compared on CPU."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from opd_jax.model import hf, qwen3
from opd_jax.model.published import CONFIGS

pytestmark = [pytest.mark.slow, pytest.mark.parity]


def write_by_torch(config, directory, dtype):
    """A model of this config with torch's own random weights; returns it in float32."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    raw = config.to_hf()
    made = transformers.AutoConfig.for_model(**raw)
    model = transformers.AutoModelForCausalLM.from_config(
        made, dtype=getattr(torch, dtype), attn_implementation="eager"
    )
    model.save_pretrained(directory)
    return model.float().eval()


def compare(config, params, model):
    import torch

    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 24)).astype(np.int32)
    with torch.no_grad():
        theirs = torch.log_softmax(model(torch.tensor(tokens, dtype=torch.long)).logits, -1).numpy()
    ours = np.asarray(jax.nn.log_softmax(qwen3.logits(config, params, tokens)))
    print(f"largest difference of log-probs: {np.abs(ours - theirs).max():.1e}")
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_smallest_published_model(tmp_path, capsys):
    config = CONFIGS["Qwen/Qwen3-0.6B"]
    model = write_by_torch(config, tmp_path, "bfloat16")
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.load_and_measure", tmp_path],
        env=os.environ | dict(JAX_PLATFORMS="cpu"),
        capture_output=True,
        text=True,
        check=True,
    )
    growth = json.loads(done.stdout.splitlines()[-1])
    checkpoint = sum(p.stat().st_size for p in tmp_path.glob("*.safetensors"))
    largest = 2 * config.vocab_size * config.hidden_size
    loaded, params = hf.load(tmp_path, dtype=np.float32)
    assert loaded == config
    with capsys.disabled():
        print(
            f"\nQwen3-0.6B in bfloat16: checkpoint {checkpoint / 1e6:.0f} MB, largest tensor "
            f"{largest / 1e6:.0f} MB, anonymous memory grew by at most {growth['peak'] / 1e6:.0f} "
            "MB"
        )
        compare(config, params, model)
    assert growth["params"] == 2 * qwen3.num_params(config)  # at equal dtype
    assert growth["peak"] <= 1.3 * checkpoint + largest


@pytest.mark.parametrize("name", ["Qwen/Qwen3-30B-A3B-Instruct-2507", "Qwen/Qwen3-235B-A22B"])
def test_large_mixtures_at_reduced_depth(name, tmp_path, capsys):
    """True widths, one layer, a quarter of the experts and a small vocabulary: what memory
    allows."""
    config = dataclasses.replace(CONFIGS[name], num_layers=1, num_experts=32, vocab_size=2048)
    model = write_by_torch(config, tmp_path, "float32")
    loaded, params = hf.load(tmp_path)
    assert loaded == config
    with capsys.disabled():
        print(f"\n{name}, one layer:", end=" ")
        compare(config, params, model)
