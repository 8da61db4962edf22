# SPDX-License-Identifier: Apache-2.0
"""The config's section `model`: how student, teacher and reference are computed."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from opd_jax.model import attention, layers, qwen3
from opd_jax.settings import Section, choice, number

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Settings(Section):
    section = "model"

    compute_dtype: str = choice("float32", DTYPES)  # norms, softmax, log-probs are always float32
    attention: str = choice("xla", attention.KERNELS)  # decoding is always plain
    remat: str = choice("none", layers.REMAT)  # what the backward pass recomputes
    unroll: int = number(-1, least=-1)  # layers at most that are not scanned; -1: by the platform

    def backend(self, platform: str, shard: Any) -> layers.Backend:
        """For training; inference needs no `remat`.

        Args:
          platform: of the mesh's devices, "cpu", "gpu" or "tpu".
          shard: `parallel.shard_activations` of the mesh.
        """
        return layers.Backend(
            unroll=qwen3.choose_unroll(self.unroll, platform),
            attention=self.attention,
            remat=self.remat,
            compute_dtype=jnp.dtype(self.compute_dtype),
            shard=shard,
        )
