# SPDX-License-Identifier: Apache-2.0
"""Accuracy of a student: the training sampler and chat template, n samples per problem, verified.

The sampler is given many rows at once and keeps `batch_size` of them in flight, so one long
response does not hold the others back. A sample depends on the key, the problem's place and its
index alone: more samples, other batches or more hosts leave it as it is, and an evaluation that was
cut off can go on.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from opd_jax import parallel, structs
from opd_jax.problems import datasets, intervals, task, verify
from opd_jax.problems.tokenizer import Tokenizer
from opd_jax.settings import Section, number
from opd_jax.stages import rollout

CALL_BATCHES = 8  # a call of the sampler takes so many batches of rows: bounds the host's memory
MAX_PROBLEMS = 1 << 20  # row = index * MAX_PROBLEMS + problem names the sampling key
MAX_SAMPLES = 1 << 11  # int32


@dataclasses.dataclass(frozen=True)
class Settings(Section):
    section = "evaluate"

    every_steps: int = number(20, least=0)  # 0: only before the first and after the last update
    source: str = datasets.EMBEDDED  # as `data.source`; "" = no evaluation
    num_problems: int = number(250, least=0)  # held-out, in-domain, over all families
    num_ood_problems: int = number(50, least=0)  # of the embedded held-out family; 0 = none
    num_samples: int = number(1, least=1, most=MAX_SAMPLES)  # responses per problem
    batch_size: int = number(64, least=1)  # responses sampled at once, over all hosts
    teacher: bool = True  # evaluate the teacher once, at the end, for the final table


def held_out(settings: Settings) -> dict[str, list[task.Example]]:
    """Metric prefix -> the problems evaluated under it."""
    wanted = {}
    if settings.source and settings.num_problems:
        wanted[""] = ("heldout", settings.num_problems)
    if settings.source == datasets.EMBEDDED and settings.num_ood_problems:
        wanted["ood_"] = ("ood", settings.num_ood_problems)
    sets = {}
    for prefix, (split, most) in wanted.items():
        problems = datasets.build_dataset(settings.source, split, option="--config.evaluate.source")
        sets[prefix] = [problems[i] for i in range(min(most, len(problems)))]
    return sets


def build(
    sampler: rollout.Sampler,
    tokenizer: Tokenizer,
    verifier: verify.Verifier,
    *,
    prompt_len: int,
    batch_size: int,
    thinking: bool = False,
) -> "Evaluator":
    """An evaluator that samples as `sampler` does.

    Args:
      prompt_len: tokens, chat template included; longer prompts are refused.
      batch_size: responses in flight, over all hosts.
      thinking: the chat template's thinking mode.
    """
    parallel.check_rows(batch_size, "evaluate.batch_size", sampler.spec.mesh)
    sampler = dataclasses.replace(sampler, num_slots=batch_size)
    return Evaluator(sampler, tokenizer, verifier, prompt_len, batch_size, thinking)


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """See `build`."""

    sampler: rollout.Sampler
    tokenizer: Tokenizer
    verifier: verify.Verifier
    prompt_len: int
    batch_size: int
    thinking: bool

    def __call__(
        self,
        params: Any,
        examples: Sequence[task.Example],
        num_samples: int,
        key: jax.Array,
        prefix: str = "",
        between: Callable[[], None] = lambda: None,
    ) -> tuple[dict[str, float], list[dict]]:
        """Metrics under `eval/PREFIX...` and every sample (see `_sample`), equal on all hosts."""
        group = prefix.strip("_/")
        calls = self.calls(params, examples, num_samples, key, group=group, between=between)
        samples = [sample for call in calls for sample in call]
        return summary(samples, prefix), samples

    def calls(
        self,
        params: Any,
        examples: Sequence[task.Example],
        num_samples: int,
        key: jax.Array,
        *,
        group: str = "",
        done: Collection[tuple[str, int]] = (),
        between: Callable[[], None] = lambda: None,
    ) -> Iterator[list[dict]]:
        """Samples call by call, every problem's first sample before its second.

        `done` holds (example id, index) pairs to leave out: the others do not change. `between` is
        called after every chunk of decoding, equally often on all hosts; it may raise to give up.
        """
        check_sizes(len(examples), num_samples)
        datasets.check_ids(examples, group or "the evaluation set")
        ids = [self.tokenizer.encode_prompt(e.prompt, self.thinking) for e in examples]
        check_prompts(examples, ids, self.prompt_len)
        done = set(done)
        todo = [
            (problem, index)
            for index in range(num_samples)
            for problem, example in enumerate(examples)
            if (str(example.id), index) not in done
        ]
        size = CALL_BATCHES * self.batch_size
        for start in range(0, len(todo), size):
            chosen = todo[start : start + size]
            yield self._call(params, examples, ids, chosen, key, group, between)

    def _call(self, params, examples, ids, chosen, key, group, between) -> list[dict]:
        """Samples of `chosen` (problem, index) pairs, in their order."""
        mesh = self.sampler.spec.mesh
        host_group = parallel.host_group(mesh)
        per_group = -(-len(chosen) // host_group.count)
        # Feeds take equally many rows: the last pair is repeated, with one token to sample.
        padded = [*chosen, *[chosen[-1]] * (per_group * host_group.count - len(chosen))]
        own = slice(host_group.index * per_group, (host_group.index + 1) * per_group)
        real_b = np.arange(len(padded))[own] < len(chosen)
        prompts = self._prompts(ids, padded[own])
        limit_b = np.where(real_b, self.sampler.response_len, 1)
        sampled, _ = self.sampler.run(params, prompts, key, limit_b=limit_b, between=between)
        responses = self._responses(sampled.tokens_bt, sampled.valid_bt)
        pairs = [
            (response if real else "", examples[problem].answer)
            for response, real, (problem, _) in zip(responses, real_b, padded[own], strict=True)
        ]
        correct_b = np.array(self.verifier.are_correct(pairs))
        rows = (sampled.tokens_bt, sampled.valid_bt, sampled.finished_b, correct_b)
        tokens_bt, valid_bt, finished_b, correct_b = (parallel.gather_rows(mesh, x) for x in rows)
        return [
            self._sample(examples[problem], index, group, response, correct, num, finished)
            for (problem, index), response, correct, num, finished in zip(
                chosen,
                self._responses(tokens_bt, valid_bt),
                correct_b,
                valid_bt.sum(axis=1),
                finished_b,
                strict=False,  # the repeated pairs at the end are dropped
            )
        ]

    def _prompts(self, ids: Sequence[Sequence[int]], chosen: list) -> structs.Prompts:
        shape = (len(chosen), self.prompt_len)
        tokens_bp, valid_bp = np.full(shape, self.tokenizer.pad_id, np.int32), np.zeros(shape, bool)
        for b, (problem, _) in enumerate(chosen):
            first = self.prompt_len - len(ids[problem])
            tokens_bp[b, first:], valid_bp[b, first:] = ids[problem], True
        row_b = np.array([index * MAX_PROBLEMS + problem for problem, index in chosen], np.int32)
        return structs.Prompts(tokens_bp, valid_bp, row_b)

    def _responses(self, tokens_bt: np.ndarray, valid_bt: np.ndarray) -> list[str]:
        rows = zip(tokens_bt, valid_bt, strict=True)
        return [self.tokenizer.decode(tokens_t[valid_t].tolist()) for tokens_t, valid_t in rows]

    def _sample(self, example, index, group, response, correct, num_tokens, finished) -> dict:
        """Attempt `index` at a problem; `given` is the answer it gave, None when it gave none.

        `correct` is None where the problem has no answer to verify it by.
        """
        boxed = verify.last_boxed(response)
        return dict(
            group=group,
            family=example.family,
            example_id=str(example.id),
            index=int(index),
            prompt=self.tokenizer.render(example.prompt, self.thinking),
            response=response,
            given=None if boxed is None else verify.normalise(boxed),
            answer=example.answer,
            correct=bool(correct) if example.answer else None,
            num_tokens=int(num_tokens),
            finished=bool(finished),
        )


@dataclasses.dataclass(frozen=True)
class Suite:
    """What a run evaluates a model on."""

    evaluator: Evaluator
    sets: dict[str, list[task.Example]]  # metric prefix -> problems
    num_samples: int

    def __call__(
        self, params: Any, key: jax.Array, between: Callable[[], None]
    ) -> tuple[dict[str, float], list[dict]]:
        """Metrics and samples over all sets; arguments as `Evaluator`'s."""
        row, samples = {}, []
        for prefix, examples in self.sets.items():
            found, sampled = self.evaluator(
                params, examples, self.num_samples, key, prefix, between=between
            )
            row |= found
            samples += sampled
        return row, samples


# ---------------------------------------------------------------- numbers from samples


def summary(samples: Sequence[dict], prefix: str = "") -> dict[str, float]:
    """Metrics of samples (see `Evaluator`), named `eval/PREFIX...`.

    accuracy is avg@n, the mean over problems of the share of correct samples, with a 95 % bootstrap
    interval over problems. With n > 1 also unbiased pass@k for k = 2, 4, 8 ... n, and majority@n.
    Problems that have fewer samples than the others (an evaluation under way) are left out. Those
    without an answer count for length, truncation and no_answer_rate only: where no problem has
    one, there is no accuracy.
    """
    if not samples:
        return {}
    name = f"eval/{prefix}"
    out = {
        f"{name}length_mean": float(np.mean([s["num_tokens"] for s in samples])),
        f"{name}truncation_rate": float(np.mean([not s["finished"] for s in samples])),
        f"{name}no_answer_rate": float(np.mean([s["given"] is None for s in samples])),
    }
    correct_pn, given_pn, families = table([s for s in samples if s["correct"] is not None])
    num_problems, num_samples = correct_pn.shape
    out[f"{name}num_problems"] = num_problems
    if not num_problems:
        return out
    accuracy = intervals.bootstrap(correct_pn.mean(axis=1))
    out[f"{name}accuracy"] = accuracy.mean
    out[f"{name}accuracy_low"] = accuracy.low
    out[f"{name}accuracy_high"] = accuracy.high
    for family in sorted(set(families)):
        rows = correct_pn[[f == family for f in families]]
        out[f"{name}{family}/accuracy"] = float(rows.mean())
    if num_samples > 1:
        for k in [
            *(2**i for i in range(1, num_samples.bit_length()) if 2**i < num_samples),
            num_samples,
        ]:
            out[f"{name}pass_at_{k}"] = float(intervals.pass_at_k(correct_pn, k).mean())
        majority_p = intervals.majority_at_k(given_pn, correct_pn, num_samples)
        out[f"{name}majority_at_{num_samples}"] = float(majority_p.mean())
    return out


def table(samples: Sequence[dict]) -> tuple[np.ndarray, list[list], list[str]]:
    """correct bool[P, n], the given answers and the family of every fully sampled problem."""
    by_problem = defaultdict(dict)
    for sample in samples:
        by_problem[sample["example_id"]][sample["index"]] = sample
    most = max((len(p) for p in by_problem.values()), default=0)
    complete = [[p[i] for i in sorted(p)] for p in by_problem.values() if len(p) == most]
    correct_pn = np.array([[s["correct"] for s in p] for p in complete], bool)
    given_pn = [[s["given"] for s in p] for p in complete]
    return correct_pn.reshape(len(complete), most), given_pn, [p[0]["family"] for p in complete]


# ---------------------------------------------------------------- checks


def check_sizes(num_problems: int, num_samples: int) -> None:
    if not (0 < num_problems <= MAX_PROBLEMS and 0 < num_samples <= MAX_SAMPLES):
        raise ValueError(
            f"{num_problems} problems with {num_samples} samples each: an evaluation takes 1 to "
            f"{MAX_PROBLEMS} problems and 1 to {MAX_SAMPLES} samples, because a row's number names "
            "its sampling key. Set --config.evaluate.num_samples=1"
        )


def check_prompts(examples, ids: Sequence[Sequence[int]], prompt_len: int) -> None:
    longest = max(range(len(ids)), key=lambda i: len(ids[i]))
    if len(ids[longest]) > prompt_len:
        raise ValueError(
            f"the prompt of {examples[longest].id!r} has {len(ids[longest])} tokens, more than "
            f"prompt_len={prompt_len}: evaluation never cuts a problem. "
            f"Set --config.data.prompt_len={len(ids[longest])}"
        )
