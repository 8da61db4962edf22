# SPDX-License-Identifier: Apache-2.0
"""The stream of prompts that training draws.

Grain shuffles every epoch by the seed. The cursor of a stream is the number of batches drawn, so
resuming is exact; row b of a global batch is the same problem for any number of hosts.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from absl import logging

from opd_jax import structs
from opd_jax.problems import task
from opd_jax.problems.datasets import EMBEDDED
from opd_jax.problems.tokenizer import Tokenizer
from opd_jax.settings import Section, choice, number


@dataclasses.dataclass(frozen=True)
class Settings(Section):
    section = "data"

    source: str = EMBEDDED  # or a JSONL file
    batch_size: int = number(32, least=1)  # prompts per step, over all hosts
    prompt_len: int = number(64, least=1)  # tokens, template included
    too_long: str = choice("raise", ("raise", "drop"))  # a prompt over prompt_len
    on_error: str = choice("raise", ("raise", "skip"))  # a bad line of the file
    thinking: bool = False  # the chat template's thinking mode


class PromptStream:
    """An endless iterator of `structs.Prompts`: this host's rows of each global batch.

    Every prompt is rendered and encoded once, when the stream is built; one that is too long is
    found before the first step, not at step 900. An epoch is a permutation that follows from the
    seed and the epoch's number; batches run on across epochs.

    Attributes:
      num_dropped: prompts left out because they are too long.
    """

    def __init__(
        self,
        source: Sequence[task.Example],
        tokenizer: Tokenizer,
        settings: Settings,
        *,
        seed: int,
        host_index: int = 0,
        host_count: int = 1,
    ):
        import grain

        batch_size, prompt_len = settings.batch_size, settings.prompt_len
        per_host = max(1, batch_size // host_count)
        if batch_size % host_count or not 0 <= host_index < host_count:
            raise ValueError(
                f"--config.data.batch_size={batch_size} does not split over {host_count} hosts "
                f"(this is host {host_index}): every host takes the same number of rows; set it to "
                f"a multiple, such as --config.data.batch_size={per_host * host_count}"
            )
        if len(source) == 0:
            raise ValueError(
                "the data set is empty: a run needs at least one prompt; set --config.data.source "
                'to "embedded" or to a JSONL file that holds some'
            )
        examples = [source[i] for i in range(len(source))]
        ids = tokenizer.encode_prompts([e.prompt for e in examples], settings.thinking)
        rows = list(zip(examples, ids, strict=True))
        kept = [row for row in rows if len(row[1]) <= prompt_len]
        self.num_dropped = len(rows) - len(kept)
        _check_lengths(rows, kept, settings)
        if self.num_dropped:
            logging.warning(
                "%d of %d prompts are too long and dropped", self.num_dropped, len(rows)
            )
        self._rows = grain.MapDataset.source(kept).shuffle(seed=seed).repeat()
        self._batch_size, self._prompt_len, self._pad = batch_size, prompt_len, tokenizer.pad_id
        self._row_b = np.arange(per_host, dtype=np.int32) + host_index * per_host
        self._num_batches = 0

    def __iter__(self) -> "PromptStream":
        return self

    def __next__(self) -> structs.Prompts:
        B, P = len(self._row_b), self._prompt_len
        first = self._num_batches * self._batch_size
        rows = [self._rows[first + int(b)] for b in self._row_b]
        self._num_batches += 1
        tokens_bp, valid_bp = np.full((B, P), self._pad, np.int32), np.zeros((B, P), bool)
        for b, (_, ids) in enumerate(rows):
            tokens_bp[b, P - len(ids) :] = ids
            valid_bp[b, P - len(ids) :] = True
        return structs.Prompts(
            tokens_bp=tokens_bp,
            valid_bp=valid_bp,
            row_b=self._row_b.copy(),
            examples=tuple(example for example, _ in rows),
        )

    def state(self) -> dict[str, int]:
        """The cursor: what `restore` needs to go on from here. The same on all hosts."""
        return {"num_batches": self._num_batches}

    def restore(self, state: dict[str, int]) -> None:
        """Continues where the stream that gave `state` stood."""
        self._num_batches = int(state["num_batches"])


def _check_lengths(rows: list, kept: list, settings: Settings) -> None:
    """Raises when prompts are too long and may not be dropped, or when none is left."""
    if len(kept) == len(rows) or (kept and settings.too_long == "drop"):
        return
    example, ids = max(rows, key=lambda row: len(row[1]))
    raise ValueError(
        f"{len(rows) - len(kept)} of {len(rows)} prompts are longer than --config.data.prompt_len="
        f"{settings.prompt_len} tokens; the longest, {example.id!r}, has {len(ids)} with its "
        f"template, and prompts are never cut: set --config.data.prompt_len={len(ids)}"
        + ("" if not kept else ", or --config.data.too_long=drop to leave such prompts out")
    )
