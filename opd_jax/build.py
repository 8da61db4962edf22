# SPDX-License-Identifier: Apache-2.0
"""From a config to a run: everything a run needs is made here, once, and checked before step one.

config.py reads the config; then, in this order:

settings    the config as dataclasses that check themselves; the only reader of the config
models      student, teacher and reference: shapes at once, weights later
stages      what runs on the mesh; nothing is allocated, so a plan asks for it too
evaluation  held-out problems, for the student and for the teacher
resume      where the run begins or goes on
"""

import dataclasses
import functools
import json

import jax
import ml_collections as mlc
from absl import logging
from etils import epath

from opd_jax import parallel, recorder, step
from opd_jax.algorithm import selectors
from opd_jax.algorithm.objective import check_models, check_sizes
from opd_jax.config import Settings, defaults, read
from opd_jax.model import qwen3, source
from opd_jax.model.config import check_context
from opd_jax.problems import contract, datasets, task, verify
from opd_jax.problems.tokenizer import Tokenizer, load_tokenizer, probes
from opd_jax.run import Run, Start
from opd_jax.stages import evaluate, prompts, rollout, score, selection, update
from opd_jax.structs import Vocabulary
from opd_jax.workdir import checkpoint, digest, owner, preemption, records, writer


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What the models look like."""

    student: qwen3.Qwen3Config
    teacher: qwen3.Qwen3Config
    reference: qwen3.Qwen3Config | None = None  # None = the run has none

    def of(self, sampled_by: str) -> qwen3.Qwen3Config:
        return self.student if sampled_by == "student" else self.teacher


def build(config: mlc.ConfigDict, place: str) -> Run:
    """Everything of the run; raises ValueError, naming the flag, before anything is computed.

    `place` is the workdir, local or gs://.
    """
    resolved = json.loads(json.dumps(config.to_dict()))  # as it will be read back: no tuples
    workdir = epath.Path(place)
    owner.check_same_run(resolved, workdir, defaults())
    given = read(config)
    mesh = parallel.build_mesh(given.mesh)
    parallel.check_rows(given.data.batch_size, "data.batch_size", mesh)
    tokenizer = load_tokenizer(given.student.directory)
    problems = list(
        datasets.build_dataset(given.data.source, "train", on_error=given.data.on_error)
    )
    held_out = evaluate.held_out(given.evaluate)
    _check_contract(given, tokenizer, sum(held_out.values(), problems))
    stream = _prompts(given, problems, tokenizer, mesh)
    shapes = Shapes(**{role: model.config for role, model in models(given).items()})
    parts = stages(given, mesh, shapes, tokenizer.vocabulary)
    parts.select = _selection(given, tokenizer, mesh)
    verifier = verify.Verifier()
    suites = evaluation(given, held_out, parts.sampler, tokenizer, verifier)

    guard = preemption.Guard()
    guard.install()  # from here on the workdir is a run's: SIGTERM ends it in order
    owner.claim(workdir, resolved)
    content = _content(given, problems, held_out)
    checkpoints = checkpoint.Checkpoints(
        str(workdir / "checkpoints"), given.checkpoint, content=content
    )
    start = resume(given, checkpoints, parts.update, stream, resolved)
    owner.check_num_steps(given.num_steps, start.step, workdir)
    parts.frozen = _frozen(given, parts)
    return Run(
        workdir=workdir,
        config=resolved,
        key=jax.random.key(given.seed),
        num_steps=given.num_steps,
        evaluate_every_steps=given.evaluate.every_steps,
        checkpoint_every_steps=given.checkpoint.every_steps,
        max_skipped=given.optim.max_skipped,
        start=start,
        prompts=stream,
        stages=parts,
        suite=suites["student"],
        teacher_suite=suites["teacher"] if given.evaluate.teacher else None,
        recorder=_recorder(given, mesh, workdir, start, tokenizer, verifier),
        checkpoints=checkpoints,
        guard=guard,
        student=given.student,
    )


def models(given: Settings) -> dict[str, source.Source]:
    """Those that the config names, by role; there may be no reference."""
    named = dict(student=given.student, teacher=given.teacher, reference=given.reference)
    return {role: model for role, model in named.items() if model.path}


def stages(
    given: Settings, mesh: jax.sharding.Mesh, shapes: Shapes, vocabulary: Vocabulary
) -> step.Stages:
    """The stages that run on the mesh, without parameters and without the host's selection.

    `vocabulary` is that of the student's tokenizer.
    """
    for role, shape in vars(shapes).items():
        if shape is not None:
            check_context(shape, given.data.prompt_len, given.rollout.response_len, role)
    loss, sampled_by = given.objective, given.rollout.by
    check_sizes(loss, given.rollout.num_candidates, vocabulary.size)
    check_models(loss, sampled_by, has_reference=shapes.reference is not None)
    if sampled_by == "teacher":
        selectors.check_positional(given.selector)
    training = given.model.backend(parallel.platform(mesh), parallel.shard_activations(mesh))
    inference = dataclasses.replace(training, remat="none")
    shape = given.pack.micro_batch(
        given.data.prompt_len,
        given.rollout.response_len,
        given.data.batch_size,
        parallel.num_batch_shards(mesh),
    )
    return step.Stages(
        mesh=mesh,
        sampler=rollout.build(
            shapes.of(sampled_by), given.rollout, vocabulary, mesh=mesh, backend=inference
        ),
        sampled_by=sampled_by,
        score=score.build(
            shapes.teacher,
            given.needs,
            shape,
            backend=inference,
            mesh=mesh,
            num_top=loss.top_k,
            vocab_size=vocabulary.size,
            reference=shapes.reference,
        ),
        update=update.build(
            shapes.student,
            loss,
            given.optim.build(given.num_steps),
            shape,
            backend=training,
            mesh=mesh,
            vocab_size=vocabulary.size,
            param_dtype=given.student.dtype,
        ),
    )


def evaluation(
    given: Settings,
    sets: dict[str, list[task.Example]],
    sampler: rollout.Sampler,
    tokenizer: Tokenizer,
    verifier: verify.Verifier,
) -> dict[str, evaluate.Suite]:
    """The held-out problems, answered by "student" and by "teacher"."""
    suites = {}
    for role in ("student", "teacher"):
        evaluator = evaluate.build(
            sampler.of(models(given)[role].config),
            tokenizer,
            verifier,
            prompt_len=given.data.prompt_len,
            batch_size=given.evaluate.batch_size,
            thinking=given.data.thinking,
        )
        suites[role] = evaluate.Suite(evaluator, sets, given.evaluate.num_samples)
    return suites


def resume(
    given: Settings,
    checkpoints: checkpoint.Checkpoints,
    updater: update.Update,
    stream: prompts.PromptStream,
    resolved: dict,
) -> Start:
    """Where the run goes on, or begins. Puts the prompt stream at its cursor."""
    restored = checkpoints.restore(state_shapes(updater, given.student))
    if restored is None:
        shardings = parallel.shardings(qwen3.param_axes(given.student.config), updater.mesh)
        return Start(updater.init(given.student.load(shardings)), step=0, row={})
    owner.compare(resolved, restored.config, checkpoints.directory.parent, defaults())
    stream.restore(restored.cursor["prompts"])
    return Start(restored.state, restored.step, restored.cursor["row"], restored.skipped)


def state_shapes(updater: update.Update, student: source.Student) -> update.TrainState:
    """The training state as shapes with their shardings, for restoring."""
    params = qwen3.param_shapes(student.config, student.dtype)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(updater.init, params),
        updater.shardings,
    )


# --- parts ---


def _content(given: Settings, problems: list, sets: dict[str, list]) -> dict[str, str]:
    """Digests of all that the run reads, by the name that a message gives it."""
    found = {"training problems": digest.of_problems(problems)}
    for prefix, held_out in sets.items():
        found[f"held-out problems {prefix}".rstrip("_ ")] = digest.of_problems(held_out)
    for role, model in models(given).items():
        parts = digest.of_model(model.directory)
        found |= {f"{role} {part}": value for part, value in parts.items()}
    return found


def _prompts(given: Settings, problems: list, tokenizer: Tokenizer, mesh) -> prompts.PromptStream:
    """This host's rows of every batch."""
    host_group = parallel.host_group(mesh)
    return prompts.PromptStream(
        problems,
        tokenizer,
        given.data,
        seed=given.seed,
        host_index=host_group.index,
        host_count=host_group.count,
    )


def _selection(given: Settings, tokenizer: Tokenizer, mesh) -> selection.Stage:
    gather = functools.partial(parallel.gather_rows, mesh)
    host_group = parallel.host_group(mesh).index
    return selection.build(
        given.selector,
        tokenizer.token_bytes,
        given.margin,
        given.segment,
        given.objective,
        want_spans=bool(given.log.signals_every_steps),
        run=selection.Run(given.seed, given.num_steps, gather, host_group),
    )


def _frozen(given: Settings, parts: step.Stages) -> step.Frozen:
    """The weights of teacher and reference, as inference reads them fastest."""

    def load(model: source.Source) -> qwen3.Params:
        params = model.load(parallel.shardings(qwen3.param_axes(model.config), parts.mesh))
        return qwen3.unstack_layers(model.config, params, parts.score.backend)

    teacher, head_vd = load(given.teacher), None
    if "teacher_hidden_btd" in given.objective.needs:
        head_vd = qwen3.head_vd(given.teacher.config, teacher)
    return step.Frozen(teacher, head_vd, load(given.reference) if given.reference.path else None)


def _recorder(given, mesh, workdir, start, tokenizer, verifier) -> recorder.Recorder:
    keep_through = start.step - (start.row is not None)
    rows = [row for row in records.read_metrics(workdir) if row["step"] <= keep_through]
    return recorder.Recorder(
        workdir=workdir,
        settings=given.log,
        mesh=mesh,
        num_steps=given.num_steps,
        tokenizer=tokenizer,
        thinking=given.data.thinking,
        verifier=verifier,
        schedule=given.optim.schedule(given.num_steps),
        writer=writer.Writer(
            str(workdir),
            keep_through=keep_through,
            num_steps=given.num_steps,
            every_steps=given.log.every_steps,
            tensorboard=given.log.tensorboard,
            enabled=jax.process_index() == 0,
        ),
        rows=rows,
    )


def _check_contract(given: Settings, tokenizer: Tokenizer, problems: list) -> None:
    """Raises unless the models speak of the same tokens; says what was allowed by name."""
    thinking, sides = given.data.thinking, []
    prompts = [example.prompt for example in problems]
    for role, model in models(given).items():
        own = tokenizer if role == "student" else load_tokenizer(model.directory)
        own.check_template(prompts, thinking)
        sides.append(
            contract.Side(
                name=role,
                token_ids=own.hf.get_vocab(),
                vocab_size=own.vocab_size,
                head_rows=model.config.vocab_size,
                eos_ids=own.eos_ids,
                rendered=[own.render(probe, thinking) for probe in probes(prompts)],
            )
        )
    # Evaluation uses the training sampler and template as they are: nothing of it can differ.
    student, *others = sides
    for line in contract.check_contract(student, others, given.rollout.knobs, given.contract_allow):
        logging.warning(line)
