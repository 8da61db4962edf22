# SPDX-License-Identifier: Apache-2.0
"""From a config to a job: everything a run needs is made here, once, and checked before step one.

The only module that reads the config: each key in one place, stages get plain arguments.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections as mlc
import optax
from absl import logging
from etils import epath

from opd_jax import job, parallel
from opd_jax.algorithm import selectors
from opd_jax.algorithm.objective import Objective, check_models, check_sizes
from opd_jax.model import hf, qwen3
from opd_jax.model.config import check_context
from opd_jax.problems import contract, verify
from opd_jax.problems.datasets import EMBEDDED, build_dataset
from opd_jax.problems.tokenizer import load_tokenizer
from opd_jax.stages import evaluate, packing, rollout, score, selection, update
from opd_jax.stages.prompts import PromptStream
from opd_jax.workdir import checkpoint, owner, preemption, writer

# What signals and their metrics show beside what selector and objective read.
WATCHED = frozenset({"teacher_logp_bt", "teacher_logp_btk", "teacher_entropy_bt"})


def build(config: mlc.ConfigDict, workdir: str) -> job.Job:
    """Everything of the run; raises ValueError, naming the flag, before anything is computed."""
    resolved = json.loads(json.dumps(config.to_dict()))  # as it will be read back: no tuples
    workdir = epath.Path(workdir)
    owner.check_same_run(resolved, workdir)
    mesh = parallel.build_mesh(config.mesh)
    feed = parallel.feed(mesh)
    seed, num_steps, log = config.seed, config.num_steps, config.log.to_dict()

    models = _models(config)
    student, teacher, reference = models.values()
    tokenizer = load_tokenizer(student.directory)
    sample, asked = config.rollout.to_dict(), config.data.to_dict()
    batch_size, prompt_len, thinking = (asked[k] for k in ("batch_size", "prompt_len", "thinking"))
    named = [model for model in models.values() if model.path]
    for line in _check_contract(named, tokenizer, thinking, sample, config.contract_allow):
        logging.warning("allowed by config.contract_allow: %s", line)

    parallel.check_rows(batch_size, "data.batch_size", mesh)
    prompts = _prompts(asked, tokenizer, seed, feed)
    loss, loss_knobs = objective(config.objective)
    chosen = selector(config.selector)
    select = selection.build(
        chosen,
        tokenizer.token_bytes,
        **_prefixed(config.margin, kind="margin_kind", temperature="margin_temperature"),
        **_prefixed(config.segment, kind="segment_kind"),
        **loss_knobs,
        want_spans=bool(log["signals_every_steps"]),
        seed=seed,
        num_steps=num_steps,
        gather=functools.partial(parallel.gather_rows, mesh),
        feed_index=feed.index,
    )
    watched = WATCHED if log["signals_every_steps"] else frozenset()
    device = on_device(
        config,
        mesh,
        {role: model.config for role, model in models.items()},
        eos_ids=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
        vocab_size=tokenizer.vocab_size,
        batch_size=batch_size,
        prompt_len=prompt_len,
        sample=sample,
        objective=loss,
        needs=loss.needs | select.needs | watched,
        num_steps=num_steps,
        param_dtype=student.param_dtype,
    )

    if device.sampled_by == "teacher":
        selectors.check_positional(chosen)
    verifier = verify.Verifier()
    eval_knobs = config.evaluate.to_dict()
    eval_sets = _problems(*(eval_knobs[k] for k in ("source", "num_problems", "num_ood_problems")))
    evaluator, teacher_evaluator = (
        evaluate.build(
            device.sampler.of(model.config),
            tokenizer,
            verifier,
            prompt_len=prompt_len,
            batch_size=eval_knobs["batch_size"],
            thinking=thinking,
        )
        for model in (student, teacher)
    )
    keep = config.checkpoint.to_dict()
    every = job.Every(
        evaluate=eval_knobs["every_steps"],
        checkpoint=keep.pop("every_steps"),
        signals=log["signals_every_steps"],
        rollouts=log["rollouts_every_steps"],
    )
    guard = preemption.Guard()
    guard.install()  # from here on the workdir is a run's: SIGTERM ends it in order
    owner.claim(workdir, resolved)
    checkpoints = checkpoint.Checkpoints(str(workdir / "checkpoints"), **keep)
    start = _start(checkpoints, device.update, prompts, student, resolved, mesh)
    owner.check_num_steps(num_steps, start.step, workdir)
    keep_through = start.step - (start.row is not None)
    teacher_params = teacher.load_frozen(mesh, device.score.backend)
    reads_states = "teacher_hidden_btd" in loss.needs
    return job.Job(
        workdir=workdir,
        config=resolved,
        mesh=mesh,
        key=jax.random.key(seed),
        num_steps=num_steps,
        every=every,
        start=start,
        prompts=prompts,
        sampler=device.sampler,
        sampled_by=device.sampled_by,
        selection=select,
        score=device.score,
        update=device.update,
        learning_rate=device.learning_rate,
        teacher_params=teacher_params,
        teacher_head_vd=qwen3.head_vd(teacher.config, teacher_params) if reads_states else None,
        reference_params=reference.load_frozen(mesh, device.score.backend),
        tokenizer=tokenizer,
        verifier=verifier,
        evaluator=evaluator,
        eval_sets=eval_sets,
        num_eval_samples=eval_knobs["num_samples"],
        teacher_evaluator=teacher_evaluator if eval_knobs["teacher"] else None,
        num_rollouts=log["num_rollouts"],
        checkpoints=checkpoints,
        writer=writer.Writer(
            str(workdir),
            keep_through=keep_through,
            num_steps=num_steps,
            every_steps=log["every_steps"],
            tensorboard=log["tensorboard"],
            enabled=jax.process_index() == 0,
        ),
        guard=guard,
        student_config=student.config,
        student_directory=student.directory,
        max_skipped=device.max_skipped,
        rows=[row for row in writer.read_rows(str(workdir)) if row["step"] <= keep_through],
    )


@dataclasses.dataclass(frozen=True)
class OnDevice:
    """What a step runs on the mesh."""

    sampler: rollout.Sampler
    sampled_by: str  # "student" or "teacher"
    score: score.Score
    update: update.Update
    learning_rate: Callable[[int], Any]  # updates applied -> rate of the next one
    max_skipped: int  # bad updates in a row that stop the run


def on_device(
    config: mlc.ConfigDict,
    mesh: jax.sharding.Mesh,
    models: dict[str, qwen3.Qwen3Config | None],
    *,
    eos_ids: tuple[int, ...],
    pad_id: int,
    vocab_size: int,
    batch_size: int,
    prompt_len: int,
    sample: dict,
    objective: Objective,
    needs: frozenset[str],
    num_steps: int,
    param_dtype: jnp.dtype,
) -> OnDevice:
    """The stages that run on the mesh. Nothing is allocated: a plan calls this for a mesh on paper.

    Args:
      config: read here: model, pack and optim.
      models: "student", "teacher", "reference" -> shape; None = no such model.
      vocab_size: real tokens; the models' heads may have more rows.
      sample: config.rollout.
      needs: fields of the teacher's scores that somebody reads.
      param_dtype: of the student.
    """
    backend = _backend(config.model, mesh)
    inference = dataclasses.replace(backend, remat="none")
    student = models["student"]
    for role, model in models.items():
        if model is not None:
            check_context(model, prompt_len, sample["response_len"], role)
    check_sizes(objective, sample["num_candidates"], vocab_size)
    sample = dict(sample)
    sampled_by = sample.pop("by")
    check_models(objective, sampled_by, has_reference=models["reference"] is not None)
    sampler = rollout.build(
        models[sampled_by],
        eos_ids=eos_ids,
        pad_id=pad_id,
        vocab_size=vocab_size,
        mesh=mesh,
        backend=inference,
        **sample,
    )
    shape = _micro_batch(config.pack, prompt_len, sample["response_len"], batch_size, mesh)
    scorer = score.build(
        model_config=models["teacher"],
        reference_config=models["reference"],
        backend=inference,
        mesh=mesh,
        needs=needs,
        num_top=objective.top_k,
        vocab_size=vocab_size,
        **shape,
    )
    optimizer, learning_rate, max_skipped = _optimizer(config.optim, num_steps)
    updater = update.build(
        model_config=student,
        objective=objective,
        optimizer=optimizer,
        backend=backend,
        mesh=mesh,
        vocab_size=vocab_size,
        param_dtype=param_dtype,
        **shape,
    )
    return OnDevice(sampler, sampled_by, scorer, updater, learning_rate, max_skipped)


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that the config names: its directory and shape now, its weights when asked for."""

    role: str  # "student", "teacher", "reference": for messages
    path: str  # "" = this run has no such model
    dtype: str

    @functools.cached_property
    def directory(self):
        try:
            return hf.resolve(self.path)
        except FileNotFoundError as error:
            flag = f"--config.{self.role}.path"
            raise ValueError(
                f"{flag}={self.path}: {error} For example {flag}=embedded:{self.role}"
            ) from error

    @functools.cached_property
    def config(self) -> qwen3.Qwen3Config | None:
        return qwen3.Qwen3Config.from_hf(self.directory) if self.path else None

    @property
    def param_dtype(self):
        return jnp.dtype(self.dtype)

    def load(self, mesh):
        """Parameters, each device's own part."""
        places = parallel.shardings(qwen3.param_axes(self.config), mesh)
        return hf.load(self.directory, dtype=self.param_dtype, shardings=places)[1]

    def load_frozen(self, mesh, backend):
        """The same of a model that is only read; None where there is no model."""
        if self.config is None:
            return None
        return qwen3.unstack_layers(self.config, self.load(mesh), backend)


# --- parts of the config ---


def _models(config) -> dict[str, Source]:
    sections = dict(student=config.student, teacher=config.teacher, reference=config.reference)
    return {role: Source(role, s.path, s.param_dtype) for role, s in sections.items()}


def _prompts(asked: dict, tokenizer, seed: int, feed: parallel.Feed) -> PromptStream:
    """This host's rows of every batch; `asked` is config.data."""
    asked = dict(asked)
    source = build_dataset(asked.pop("source"), "train", on_error=asked.pop("on_error"))
    return PromptStream(
        source, tokenizer, **asked, seed=seed, host_index=feed.index, host_count=feed.count
    )


def _backend(section, mesh) -> qwen3.Backend:
    return qwen3.Backend(
        unroll=qwen3.choose_unroll(section.unroll, parallel.platform(mesh)),
        attention=section.attention,
        remat=section.remat,
        compute_dtype=jnp.dtype(section.compute_dtype),
        shard=parallel.shard_activations(mesh),
    )


def selector(section) -> selectors.Selector:
    knobs = section.to_dict()
    kind = knobs.pop("kind")
    known = selectors.knobs(kind)  # the others belong to other kinds
    return selectors.build(kind, **{name: knobs[name] for name in known})


def objective(section) -> tuple[Objective, dict]:
    """The objective, and the knobs of the loss's weights."""
    knobs = section.to_dict()
    loss = {name: knobs.pop(name) for name in ("aggregate", "rescale", "max_rescale")}
    return Objective(**knobs), loss


def _prefixed(section, **renamed) -> dict:
    """A section's keys, some of them under another name."""
    return {renamed.get(name, name): value for name, value in section.to_dict().items()}


def _micro_batch(section, prompt_len, response_len, batch_size, mesh) -> dict:
    rows, tokens, chunk = (
        section[k] for k in ("micro_batch_rows", "micro_batch_tokens", "head_chunk")
    )
    chosen_rows, chosen_tokens = packing.default_shape(
        prompt_len=prompt_len,
        response_len=response_len,
        batch_size=batch_size,
        num_shards=parallel.num_batch_shards(mesh),
    )
    packing.check_shape(prompt_len, response_len, rows or chosen_rows, tokens or chosen_tokens)
    return dict(
        micro_batch_rows=rows or chosen_rows,
        micro_batch_tokens=tokens or chosen_tokens,
        chunk=chunk,
    )


def _optimizer(section, num_steps):
    """The optimiser, its rate by updates applied, and how many bad updates stop the run."""
    peak, warmup, decay = (section[k] for k in ("learning_rate", "warmup_steps", "decay"))
    if decay == "constant":
        after = optax.constant_schedule(peak)
    elif decay == "cosine":
        after = optax.cosine_decay_schedule(peak, max(1, num_steps - warmup))
    else:
        raise ValueError(
            f"config.optim.decay={decay!r} is unknown; set --config.optim.decay=constant or cosine"
        )
    rising = optax.linear_schedule(peak / (warmup + 1), peak, max(1, warmup))
    rate = optax.join_schedules([rising, after], [warmup]) if warmup else after
    clip = section.clip_norm
    steps = [optax.clip_by_global_norm(clip)] if clip else []
    adam = {name: section[name] for name in ("b1", "b2", "eps", "weight_decay")}
    return optax.chain(*steps, optax.adamw(rate, **adam)), rate, section.max_skipped


def _problems(source: str, num: int, num_ood: int) -> dict[str, list]:
    """Held-out problems by metric prefix."""
    wanted = {"": ("heldout", num)} if source and num else {}
    if source == EMBEDDED and num_ood:
        wanted["ood_"] = ("ood", num_ood)
    sets = {}
    for prefix, (split, most) in wanted.items():
        problems = build_dataset(source, split)
        sets[prefix] = [problems[i] for i in range(min(most, len(problems)))]
    return sets


PROBES = ("What is 2 + 3?", [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}])


def _check_contract(models, tokenizer, thinking, sample, allow) -> list[str]:
    """Raises unless the models speak of the same tokens; what was allowed, a line each."""
    sides = []
    for model in models:
        own = tokenizer if model.role == "student" else load_tokenizer(model.directory)
        sides.append(
            contract.Side(
                name=model.role,
                token_ids=own.hf.get_vocab(),
                vocab_size=own.vocab_size,
                head_rows=model.config.vocab_size,
                eos_ids=own.eos_ids,
                rendered=[own.render(probe, thinking) for probe in PROBES],
                thinking=thinking,
            )
        )
    drawn = contract.Sampling(*(sample[k] for k in ("temperature", "top_k", "top_p", "min_p")))
    # Evaluation uses the training sampler and template as they are: nothing of it can differ.
    return contract.check_contract(sides[0], sides[1:], drawn, None, allow)


# --- where a run goes on ---


def state_shapes(updater, model_config, param_dtype):
    """The training state as shapes with their places on the mesh, for restoring."""
    params = qwen3.param_shapes(model_config, jnp.dtype(param_dtype))
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        jax.eval_shape(updater.init, params),
        updater.shardings,
    )


def _start(checkpoints, updater, prompts, student, resolved, mesh) -> job.Start:
    """Where the run goes on, or begins. Puts the prompt stream at its cursor."""
    restored = checkpoints.restore(state_shapes(updater, student.config, student.param_dtype))
    if restored is None:
        return job.Start(updater.init(student.load(mesh)), step=0, row={})
    owner.compare(resolved, restored.config, checkpoints.directory.parent)
    prompts.restore(restored.cursor["prompts"])
    return job.Start(restored.state, restored.step, restored.cursor["row"], restored.skipped)
