# SPDX-License-Identifier: Apache-2.0
"""AdamW with a clipped global norm and a schedule: the config's section `optim`."""

import dataclasses

import optax

from opd_jax.settings import Section, choice, number


@dataclasses.dataclass(frozen=True)
class Settings(Section):
    section = "optim"

    learning_rate: float = number(1e-5, least=0)
    warmup_steps: int = number(0, least=0)
    decay: str = choice("constant", ("constant", "cosine"))  # cosine: to 0 at num_steps
    b1: float = number(0.9, least=0, below=1)
    b2: float = number(0.999, least=0, below=1)
    eps: float = number(1e-8, above=0)
    weight_decay: float = number(0.01, least=0)
    clip_norm: float = number(1.0, least=0)  # of the global gradient; 0 = off
    max_skipped: int = number(3, least=0)  # more non-finite updates in a row stop the run

    def schedule(self, num_steps: int) -> optax.Schedule:
        """Updates applied -> learning rate of the next one."""
        if self.decay == "cosine":
            after = optax.cosine_decay_schedule(
                self.learning_rate, max(1, num_steps - self.warmup_steps)
            )
        else:
            after = optax.constant_schedule(self.learning_rate)
        if not self.warmup_steps:
            return after
        first = self.learning_rate / (self.warmup_steps + 1)
        rising = optax.linear_schedule(first, self.learning_rate, self.warmup_steps)
        return optax.join_schedules([rising, after], [self.warmup_steps])

    def build(self, num_steps: int) -> optax.GradientTransformation:
        """The optimiser of a run of `num_steps` updates."""
        clip = [optax.clip_by_global_norm(self.clip_norm)] if self.clip_norm else []
        adamw = optax.adamw(
            self.schedule(num_steps),
            b1=self.b1,
            b2=self.b2,
            eps=self.eps,
            weight_decay=self.weight_decay,
        )
        return optax.chain(*clip, adamw)
