# SPDX-License-Identifier: Apache-2.0
"""What a run holds while it trains, and what it does besides its stages: look, write and save."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from opd_jax import metrics, parallel
from opd_jax.algorithm import profiles, segments
from opd_jax.model import hf
from opd_jax.problems import task, verify
from opd_jax.problems.tokenizer import Tokenizer
from opd_jax.stages import evaluate, rollout, score, selection, update
from opd_jax.stages.prompts import PromptStream
from opd_jax.workdir import checkpoint, preemption, records, summary, watch, writer


@dataclasses.dataclass(frozen=True)
class Every:
    """How often things happen, in updates; 0 = only where the field says so."""

    evaluate: int  # 0: before the first and after the last update
    checkpoint: int  # 0: after the last
    signals: int  # 0: never
    rollouts: int  # 0: never


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins or goes on."""

    state: update.TrainState
    step: int  # updates done
    row: dict | None  # metrics of that update that are not yet written; None = all are
    skipped: tuple[str, ...] = ()  # newer checkpoints that could not be used, and why


@dataclasses.dataclass
class Job:
    """A run's parts, made by `build.build`; only the last two fields change."""

    workdir: epath.Path
    config: dict  # resolved
    mesh: jax.sharding.Mesh
    key: jax.Array  # of the run; a step's keys are folded from it
    num_steps: int
    every: Every
    start: Start

    prompts: PromptStream
    sampler: rollout.Sampler
    sampled_by: str  # "student", or "teacher" for supervised training on the teacher's samples
    selection: selection.Stage
    score: score.Score
    update: update.Update
    learning_rate: Callable[[int], float]  # updates applied -> rate of the next one
    teacher_params: Any
    teacher_head_vd: jax.Array | None  # for objectives that read the teacher's hidden states
    reference_params: Any

    tokenizer: Tokenizer
    verifier: verify.Verifier
    evaluator: evaluate.Evaluator
    teacher_evaluator: evaluate.Evaluator | None  # None = the teacher is not evaluated
    eval_sets: dict[str, list[task.Example]]  # metric prefix -> problems
    num_eval_samples: int
    num_rollouts: int  # trajectories kept each time
    checkpoints: checkpoint.Checkpoints
    writer: writer.Writer
    guard: preemption.Guard
    student_config: Any
    student_directory: Any  # where the tokenizer of the trained student comes from
    max_skipped: int
    rows: list[dict]  # metrics of this run so far
    skipped_in_a_row: int = 0
    warned: set[str] = dataclasses.field(default_factory=set)

    def __enter__(self) -> "Job":
        for line in self.start.skipped:
            self.writer.say(f"WARNING: checkpoint not usable, an earlier one is: {line}")
        return self

    def __exit__(self, *error) -> None:
        for part in (self.selection, self.verifier, self.writer, self.checkpoints):
            part.close()

    # --- randomness ---

    ROLLOUT, EVALUATION = 0, 1  # what a key is for

    def fold(self, step: int, use: int) -> jax.Array:
        """The key of one use in one step: the same on all hosts, and whenever it is asked for."""
        key = self.key
        for number in (step, use):  # put explicitly: hidden transfers are errors in the tests
            key = jax.random.fold_in(key, jax.device_put(np.uint32(number)))
        return key

    def sampling_params(self, state: update.TrainState) -> Any:
        """Parameters of the model that answers the training prompts."""
        return state.params if self.sampled_by == "student" else self.teacher_params

    # --- evaluation ---

    def due(self, step: int, every_steps: int) -> bool:
        """True before the first update, after the last, and every so many between."""
        return step in (0, self.num_steps) or bool(every_steps and step % every_steps == 0)

    def evaluate(self, params: Any, step: int) -> dict[str, float]:
        """Held-out metrics of the student; its samples go to WORKDIR/eval."""
        row, samples = self._evaluate(self.evaluator, params, step)
        if jax.process_index() == 0:
            records.write_samples(self.workdir, step, samples)
        return row

    def _evaluate(self, evaluator, params, step):
        row, samples, key = {}, [], self.fold(step, self.EVALUATION)
        for prefix, examples in self.eval_sets.items():
            found, sampled = evaluator(
                params, examples, self.num_eval_samples, key, prefix, between=self.guard.check
            )
            row |= found
            samples += sampled
        return row, samples

    # --- the row of a step ---

    def describe(self, step, prompts, rolled, stats, scores, chosen, sums, seconds) -> dict:
        """Metrics of update `step` + 1, and its signals and trajectories where due.

        Args:
          stats: rollout.Stats; chosen: structs.Supervision.
          sums: name -> (sum, count) of the update.
          seconds: of each stage.
        """
        table = metrics.row_table(
            rolled,
            scores,
            chosen.margin_bt,
            chosen.supervised_bt,
            chosen.release_b,
            chosen.gain_b,
            chosen.num_segments_b,
            chosen.rescale_b,
        )
        whole = parallel.gather_rows(self.mesh, np.stack(list(table.values()), axis=1))
        table = dict(zip(table, whole.T, strict=True))
        row = metrics.summary(table)
        own = np.array(list(chosen.stats.values()), np.float64)
        own = parallel.sum_over_feeds(self.mesh, own)
        sums = sums | dict(zip(chosen.stats, own, strict=True))
        row |= {name: metrics.divide(*pair) for name, pair in sums.items()}
        idle = sum(r.get("update/skipped", 0) + r.get("update/empty", 0) for r in self.rows)
        row["optimizer/learning_rate"] = float(self.learning_rate(step - int(idle)))
        row["rollout/occupancy"] = metrics.divide(stats.busy_steps, stats.slot_steps)
        nonfinite = np.array([stats.num_nonfinite], np.float64)
        row["rollout/num_nonfinite"] = float(parallel.sum_over_feeds(self.mesh, nonfinite)[0])
        row |= metrics.speeds(row, seconds)
        row["memory/peak_gib"] = metrics.peak_memory_gib()
        self._record(step + 1, prompts, rolled, scores, chosen, table)
        return row

    @staticmethod
    def token_signals(rolled, scores, chosen) -> dict:
        """What can be known of every token of a step; see profiles.per_token."""
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

    def _record(self, step, prompts, rolled, scores, chosen, table) -> None:
        """Writes WORKDIR/signals and WORKDIR/rollouts of update `step`, where due."""
        if self.every.signals and step % self.every.signals == 0:
            found = self.token_signals(rolled, scores, chosen)
            by_position = profiles.by_position(found, rolled.valid_bt)
            by_sentence = profiles.by_sentence(found, chosen.spans_b, rolled.valid_bt)
            correct_b = self.correct(prompts, rolled).astype(np.float64)
            if jax.process_count() > 1:
                total = functools.partial(parallel.sum_over_feeds, self.mesh)
                by_position = jax.tree.map(total, by_position)
                by_sentence = jax.tree.map(total, by_sentence)
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
        first = step == 1 and self.every.rollouts
        if jax.process_index() == 0 and (first or self._rollouts_due(step)):
            kept = range(min(self.num_rollouts, len(rolled.tokens_bt)))
            rows = [self._trajectory(step, b, prompts, rolled, scores, chosen) for b in kept]
            records.write_rollouts(self.workdir, step, rows)

    def _rollouts_due(self, step: int) -> bool:
        return bool(self.every.rollouts) and (
            step % self.every.rollouts == 0 or step == self.num_steps
        )

    def correct(self, prompts, rolled) -> np.ndarray:
        """bool[B], True = the response's answer is that of its problem."""
        texts = [
            self.tokenizer.decode(tokens_t[valid_t])
            for tokens_t, valid_t in zip(rolled.tokens_bt, rolled.valid_bt, strict=True)
        ]
        answers = (example.answer for example in prompts.examples)
        return np.array(self.verifier.are_correct(zip(texts, answers, strict=True)))

    def _trajectory(self, step, b, prompts, rolled, scores, chosen) -> dict:
        length = int(rolled.valid_bt[b].sum())
        example = prompts.examples[b]
        spans = chosen.spans_b[b] if chosen.spans_b else ()

        def own(values_bt):
            return None if values_bt is None else np.asarray(values_bt[b][:length])

        tokens_t = own(rolled.tokens_bt)
        release = int(chosen.release_b[b])
        starts = [start for start, _ in spans]
        return records.trajectory(
            step=step,
            row=int(prompts.row_b[b]),
            example_id=example.id,
            family=example.family,
            prompt=self.tokenizer.render(example.prompt),
            answer=example.answer,
            correct=self.verifier.is_correct(self.tokenizer.decode(tokens_t), example.answer),
            finished=bool(rolled.finished_b[b]),
            token_t=tokens_t,
            token_bytes_t=[self.tokenizer.token_bytes[i] for i in tokens_t],
            name=self._name,
            sampler_logp_t=own(rolled.sampler_logp_bt),
            candidates_tk=own(rolled.candidates_btk),
            candidate_logp_tk=own(rolled.candidate_logp_btk),
            teacher_logp_t=own(scores.teacher_logp_bt),
            teacher_logp_tk=own(scores.teacher_logp_btk),
            margin_t=own(chosen.margin_bt),
            supervised_t=own(chosen.supervised_bt),
            weight_t=own(chosen.weight_bt),
            spans=spans,
            score_s=self._scores(chosen, b, spans),
            change_point=starts.index(release) if release in starts else len(spans),
            release=release,
            gain=float(chosen.gain_b[b]),
        )

    def _name(self, token: int) -> str:
        """What to show for a token: its text, or the name of a special one."""
        special = self.tokenizer.hf.convert_ids_to_tokens(token)
        return self.tokenizer.decode([token]) or str(special)

    def _scores(self, chosen, b, spans):
        if chosen.margin_bt is None or not spans:
            return ()
        return segments.segment_scores(chosen.margin_bt[b], spans, chosen.usable_bt[b])

    # --- saving ---

    def write(self, step: int, row: dict) -> None:
        """Appends the row of `step`, and says once what looks wrong."""
        row = {"step": step, **row}
        self.writer.write(row)
        self.rows.append(row)
        for name, advice in watch.warnings(self.rows).items():
            if name not in self.warned:
                self.writer.say(f"WARNING {name}: {advice}")
                self.warned.add(name)

    def save(self, step: int, state, cursor: dict, row: dict | None, metric: float | None) -> None:
        """Starts a checkpoint of `state` after `step` updates.

        Args:
          cursor: of the prompt stream, before the next batch is drawn.
          row: metrics of that update that are not yet written, or None.
          metric: what the best checkpoints are chosen by; None = not evaluated here.
        """
        if step in self.checkpoints.steps():
            return  # the same bits: training is exact
        self.checkpoints.save(
            step,
            state,
            cursor=dict(prompts=cursor, row=row),
            config=self.config,
            metric=metric,
        )

    def check_skipped(self, row: dict) -> None:
        """Stops a run whose updates are not finite again and again."""
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if row["update/skipped"] else 0
        if self.skipped_in_a_row > self.max_skipped:
            self.checkpoints.wait()
            good = self.checkpoints.steps()
            raise FloatingPointError(
                f"{self.skipped_in_a_row} updates in a row were not finite, more than "
                f"config.optim.max_skipped={self.max_skipped}; the parameters are those of the "
                f"last finite one. Last checkpoint: {good[-1] if good else 'none'} under "
                f"{self.workdir}/checkpoints; the batches are under {self.workdir}/faults. "
                "Try a lower --config.optim.learning_rate or --config.model.compute_dtype=float32."
            )

    def finish(self, state) -> str:
        """Exports the student, evaluates the teacher, and says what came out. Returns the text."""
        self.checkpoints.wait()
        teacher = {}
        if self.teacher_evaluator is not None:
            evaluator = self.teacher_evaluator
            teacher, _ = self._evaluate(evaluator, self.teacher_params, self.num_steps)
        output = self.workdir / "student"
        hf.save(self.student_config, state.params, output, source=self.student_directory)
        if jax.process_index() == 0:
            rows = writer.read_rows(str(self.workdir))
            found = summary.of_run(rows, teacher)
            records.write_json(self.workdir, "done.json", found | {"step": self.num_steps})
            self.writer.say(summary.table(found, self.workdir))
