# SPDX-License-Identifier: Apache-2.0
"""A step -> its row of metrics, its teachability signals, its stored trajectories."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from opd_jax import metrics, parallel
from opd_jax.algorithm import profiles, segments
from opd_jax.problems import verify
from opd_jax.problems.tokenizer import Tokenizer
from opd_jax.settings import Section, number
from opd_jax.step import Step
from opd_jax.structs import Prompts, Rollout
from opd_jax.workdir import records, watch, writer

# What signals and their metrics show beside what selector and objective read.
WATCHED = frozenset({"teacher_logp_bt", "teacher_logp_btk", "teacher_entropy_bt"})


@dataclasses.dataclass(frozen=True)
class Settings(Section):
    section = "log"

    every_steps: int = number(1, least=1)  # terminal lines, where there is no progress bar
    signals_every_steps: int = number(1, least=0)  # to WORKDIR/signals; 0 = off
    rollouts_every_steps: int = number(20, least=0)  # trajectories to WORKDIR/rollouts; 0 = off
    num_rollouts: int = number(8, least=0)  # trajectories written each time
    tensorboard: bool = True  # event files under WORKDIR/tensorboard

    @property
    def needs(self) -> frozenset[str]:
        """Fields of structs.Scores that are only looked at."""
        return WATCHED if self.signals_every_steps else frozenset()


@dataclasses.dataclass
class Recorder:
    """What of a run is written down while it trains."""

    workdir: epath.Path
    settings: Settings
    mesh: jax.sharding.Mesh
    num_steps: int
    tokenizer: Tokenizer
    thinking: bool  # the chat template's thinking mode, in which the prompts were rendered
    verifier: verify.Verifier
    schedule: Callable[[int], Any]  # updates applied -> learning rate of the next one
    writer: writer.Writer
    rows: list[dict]  # metrics of this run so far
    warned: set[str] = dataclasses.field(default_factory=set)

    def close(self) -> None:
        self.verifier.close()
        self.writer.close()

    def say(self, text: str) -> None:
        self.writer.say(text)

    def write(self, step: int, row: dict) -> None:
        """Appends the row of `step`, and says once what looks wrong."""
        row = {"step": step, **row}
        self.writer.write(row)
        self.rows.append(row)
        for name, advice in watch.warnings(self.rows).items():
            if name not in self.warned:
                self.say(f"WARNING {name}: {advice}")
                self.warned.add(name)

    def row(self, step: int, taken: Step) -> dict:
        """Metrics of update `step` + 1; its signals and trajectories are written where due."""
        table = metrics.row_table(taken.rollout, taken.scores, taken.supervision)
        values = parallel.gather_rows(self.mesh, np.stack(list(table.values()), axis=1))
        table = dict(zip(table, values.T, strict=True))
        row = metrics.summary(table)
        counted = taken.supervision.stats
        sums = self._sum(np.array(list(counted.values()), np.float64))
        sums = taken.sums | dict(zip(counted, sums, strict=True))
        row |= {name: metrics.divide(*pair) for name, pair in sums.items()}
        idle = sum(r.get("update/skipped", 0) + r.get("update/empty", 0) for r in self.rows)
        row["optimizer/learning_rate"] = float(self.schedule(step - int(idle)))
        stats = taken.stats
        row["rollout/occupancy"] = metrics.divide(stats.busy_steps, stats.slot_steps)
        row["rollout/num_nonfinite"] = float(self._sum(np.array([stats.num_nonfinite], float))[0])
        row |= metrics.speeds(row, taken.seconds)
        row["memory/peak_gib"] = metrics.peak_memory_gib()
        if self.settings.signals_every_steps and not (step + 1) % self.settings.signals_every_steps:
            self._write_signals(step + 1, taken, table)
        if jax.process_index() == 0 and self._rollouts_due(step + 1):
            kept = range(min(self.settings.num_rollouts, len(taken.rollout.tokens_bt)))
            rows = [self._trajectory(step + 1, b, taken) for b in kept]
            records.write_rollouts(self.workdir, step + 1, rows)
        return row

    def correct(self, prompts: Prompts, rollout: Rollout) -> np.ndarray:
        """bool[B], True = the response's answer is that of its problem."""
        texts = [
            self.tokenizer.decode(tokens_t[valid_t])
            for tokens_t, valid_t in zip(rollout.tokens_bt, rollout.valid_bt, strict=True)
        ]
        answers = (example.answer for example in prompts.examples)
        return np.array(self.verifier.are_correct(zip(texts, answers, strict=True)))

    def _sum(self, values: Any) -> Any:
        """Sums over the groups of hosts that hold different rows."""
        return parallel.sum_over_host_groups(self.mesh, values)

    def _write_signals(self, step: int, taken: Step, table: dict[str, np.ndarray]) -> None:
        found = token_signals(taken)
        valid_bt = taken.rollout.valid_bt
        by_position = profiles.by_position(found, valid_bt)
        by_sentence = profiles.by_sentence(found, taken.supervision.spans_b or [], valid_bt)
        correct_b = self.correct(taken.prompts, taken.rollout).astype(np.float64)
        if jax.process_count() > 1:
            by_position = jax.tree.map(self._sum, by_position)
            by_sentence = jax.tree.map(self._sum, by_sentence)
        arrays = records.signals_arrays(
            by_position=by_position,
            by_sentence=by_sentence,
            length_b=table["length"],
            release_b=table["release"],
            gain_b=table["gain"],
            rescale_b=table["rescale"],
            num_segments_b=table["num_segments"],
            correct_b=parallel.gather_rows(self.mesh, correct_b),
        )
        if jax.process_index() == 0:
            records.write_signals(self.workdir, step, arrays)

    def _rollouts_due(self, step: int) -> bool:
        """True for the first update, the last, and every so many between; never if switched off."""
        every = self.settings.rollouts_every_steps
        return bool(every) and (step in (1, self.num_steps) or step % every == 0)

    def _trajectory(self, step: int, b: int, taken: Step) -> dict:
        rolled, scores, chosen = taken.rollout, taken.scores, taken.supervision
        length = int(rolled.valid_bt[b].sum())
        example = taken.prompts.examples[b]
        spans = chosen.spans_b[b] if chosen.spans_b else ()

        def real(values_bt: Any) -> Any:
            return None if values_bt is None else np.asarray(values_bt[b][:length])

        tokens_t = real(rolled.tokens_bt)
        release = int(chosen.release_b[b])
        starts = [start for start, _ in spans]
        return records.Trajectory(
            step=step,
            row=int(taken.prompts.row_b[b]),
            example_id=example.id,
            family=example.family,
            prompt=self.tokenizer.render(example.prompt, self.thinking),
            answer=example.answer,
            correct=self.verifier.is_correct(self.tokenizer.decode(tokens_t), example.answer),
            finished=bool(rolled.finished_b[b]),
            token_t=tokens_t,
            token_bytes_t=[self.tokenizer.token_bytes[i] for i in tokens_t],
            name=functools.partial(_name, self.tokenizer),
            sampler_logp_t=real(rolled.sampler_logp_bt),
            candidates_tk=real(rolled.candidates_btk),
            candidate_logp_tk=real(rolled.candidate_logp_btk),
            teacher_logp_t=real(scores.teacher_logp_bt),
            teacher_logp_tk=real(scores.teacher_logp_btk),
            margin_t=real(chosen.margin_bt),
            supervised_t=real(chosen.supervised_bt),
            weight_t=real(chosen.weight_bt),
            spans=spans,
            score_s=_scores(chosen, b, spans),
            change_point=starts.index(release) if release in starts else len(spans),
            release=release,
            gain=float(chosen.gain_b[b]),
        ).as_json()


def token_signals(taken: Step) -> dict:
    """What can be known of every token of a step; see profiles.per_token."""
    rolled, scores, chosen = taken.rollout, taken.scores, taken.supervision
    return profiles.per_token(
        usable_bt=chosen.usable_bt,
        supervised_bt=chosen.supervised_bt,
        measured=dict(
            margin=chosen.margin_bt,
            student_entropy=rolled.entropy_bt,
            teacher_entropy=scores.teacher_entropy_bt,
        ),
        teacher_logp_bt=scores.teacher_logp_bt,
        sampler_logp_bt=rolled.sampler_logp_bt,
        teacher_logp_btk=scores.teacher_logp_btk,
        candidate_logp_btk=rolled.candidate_logp_btk,
    )


def _name(tokenizer: Tokenizer, token: int) -> str:
    """What to show for a token: its text, or the name of a special one."""
    return tokenizer.decode([token]) or str(tokenizer.hf.convert_ids_to_tokens(token))


def _scores(chosen, b: int, spans) -> Any:
    if chosen.margin_bt is None or not spans:
        return ()
    return segments.segment_scores(chosen.margin_bt[b], spans, chosen.usable_bt[b])
