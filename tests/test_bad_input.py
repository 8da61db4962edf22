# SPDX-License-Identifier: Apache-2.0
"""Every message about bad input, one row each: what was given, and the flag that puts it right.

A row is refused before the first step, with a message that holds what was given and the flag or
variable to set, to which value. Where a message is checked together with what comes after it (the
mesh that it proposes is built, the bad line is skipped), the test is in ELSEWHERE.
"""

import ast
import dataclasses
import functools
import math
import pathlib
import types
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import parallel, recorder
from opd_jax.algorithm import change_point, margin, segments, selectors
from opd_jax.algorithm.objective import Objective, check_models, check_sizes
from opd_jax.config import Settings
from opd_jax.model import backend, hf, qwen3
from opd_jax.model.source import Teacher
from opd_jax.problems import benchmarks, intervals, task
from opd_jax.problems.datasets import build_dataset
from opd_jax.stages import evaluate, optimizer, packing, rollout, sampling
from opd_jax.stages.prompts import PromptStream
from opd_jax.stages.prompts import Settings as Data
from opd_jax.structs import Vocabulary
from opd_jax.workdir import checkpoint, owner
from tests import advice

ROOT = pathlib.Path(__file__).parent.parent

# Subject -> test that checks the message and more. tests/test_fuzz.py adds mutated files.
ELSEWHERE = {
    "a mesh that does not fit the devices": "test_parallel.py::"
    "test_a_mesh_that_does_not_fit_is_refused_with_one_that_does",
    "a mesh that does not divide the model": "test_parallel.py::"
    "test_a_mesh_that_does_not_divide_the_model_is_refused_with_one_that_does",
    "a model directory": "model/test_hf.py::test_bad_directories_are_refused_with_the_reason",
    "a hub id without network": "model/test_hf.py::test_a_hub_id_without_network_says_what_to_do",
    "a failed save": "model/test_hf.py::test_a_failed_save_leaves_what_was_there",
    "student and teacher that differ": "problems/test_contract.py::"
    "test_each_mismatch_is_shown_and_can_be_allowed_by_name",
    "a line of JSONL": "problems/test_datasets.py::test_a_bad_line_is_named_or_skipped_by_flag",
    "a prompt that is too long": "problems/test_datasets.py::"
    "test_a_prompt_that_is_too_long_is_refused_or_dropped_by_flag",
    "a tokenizer": "problems/test_tokenizer.py::test_a_tokenizer_that_is_not_byte_level_is_refused",
    "a key or value of the config": "launch/test_config_flags.py::"
    "test_a_wrong_key_or_value_names_one_that_works",
    "a config file": "launch/test_config_flags.py::"
    "test_a_wrong_file_or_variant_names_one_that_works",
    "a sweep": "launch/test_sweep.py::"
    "test_what_cannot_be_a_sweep_is_refused_before_anything_starts",
    "the place of a process": "launch/test_launcher.py::"
    "test_an_incomplete_description_of_a_process_names_what_is_missing",
    "a pod": "launch/test_pod.py::test_what_cannot_be_started_names_a_flag_that_works",
    "a topology": "launch/test_plan.py::"
    "test_a_slice_that_does_not_exist_is_refused_with_one_that_does",
    "a plan without its compiler": "launch/test_plan.py::"
    "test_without_the_compiler_the_extra_is_named",
    "a workdir of another run, now": "workdir/test_owner.py::"
    "test_a_second_run_is_refused_before_it_starts_and_a_killed_one_is_not_in_the_way",
    "a workdir of another config": "test_train.py::"
    "test_another_config_in_the_workdir_is_refused_by_key",
    "unusable checkpoints": "workdir/test_checkpoint.py::"
    "test_when_all_are_damaged_it_stops_and_names_each",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """`call()` must be refused with a message that holds `given` and `flag`."""

    given: str
    flag: str
    call: Callable

    @property
    def name(self) -> str:
        return f"{self.given} {self.flag}"


def knobs(function: Callable, section: str, *rows: tuple[dict, str]) -> list[Row]:
    """A row per (arguments, "KEY=VALUE"): the message shows the last argument's value and names
    --config.SECTION.KEY=VALUE.
    """
    shown = [list(given.values())[-1] for given, _ in rows]
    return [
        Row(
            repr(value) if isinstance(value, str) else f"={value}",
            f"--config.{section}.{works}",
            _call(function, given),
        )
        for value, (given, works) in zip(shown, rows, strict=True)
    ]


def _call(function, given):
    return lambda: function(**given)


def mesh_of(**sizes: int) -> types.SimpleNamespace:
    shape = dict(data=1, fsdp=1, tensor=1, expert=1) | sizes
    return types.SimpleNamespace(shape=shape, axis_names=tuple(shape))


def sampler(**given):
    model = qwen3.Qwen3Config(64, 32, 48, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8)
    settings = rollout.Settings(**dict(response_len=8) | given)
    return rollout.build(model, settings, Vocabulary(64, (1,), 0), mesh=mesh_of(data=4))


def draw(**given):
    bits_b2 = jnp.zeros((1, 2), jnp.uint32)
    return sampling.sample(jnp.zeros((1, 3)), bits_b2, sampling.Knobs(), **given)


def prompts(source=("a",), **given):
    settings = Data(batch_size=given.pop("batch_size", 4), prompt_len=8)
    return PromptStream(source, None, settings, seed=0, **given)


find_drop = functools.partial(change_point.find_drop, [2.0, 1.0])
problem = task.Example("long-1", "f", "one", "one")

ROWS = [
    # Sampling.
    *knobs(
        sampling.Knobs,
        "rollout",
        (dict(temperature=-1.0), "temperature=1.0"),
        (dict(top_p=0.0), "top_p=1.0"),
        (dict(top_k=-3), "top_k=0"),
        (dict(min_p=1.0), "min_p=0.0"),
    ),
    *knobs(draw, "rollout", (dict(num_candidates=4), "num_candidates=3")),
    *knobs(
        sampler,
        "rollout",
        (dict(decode_chunk=0), "decode_chunk=32"),
        (dict(response_len=0), "response_len=192"),
        (dict(num_slots=9), "num_slots=8"),
    ),
    # What is supervised.
    *knobs(
        find_drop,
        "selector",
        (dict(eps=0.0), "eps=1e-12"),
        (dict(min_side=0), "min_side=1"),
        (dict(min_gain=math.nan), "min_gain=0.0"),
        (dict(min_drop=-1.0), "min_drop=0.0"),
        (dict(min_segments=-1), "min_segments=2"),
        (dict(penalty_change=math.nan), "penalty_change=3.0"),
        (dict(penalty_none=math.inf), "penalty_none=1.0"),
    ),
    *knobs(
        segments.Settings,
        "segment",
        (dict(kind="spacy"), "kind=nltk"),
        (dict(punkt="english"), "punkt=embedded"),
        (dict(kind="fixed_tokens", fixed_tokens=0), "fixed_tokens=32"),
        (dict(kind="nltk", fixed_tokens=64), "fixed_tokens=32"),
        (dict(kind="token", punkt="punkt_tab"), "punkt=embedded"),
        (dict(max_tokens=-1), "max_tokens=0"),
        (dict(num_workers=-1), "num_workers=1"),
        (dict(max_tokens=1.5), "max_tokens=0"),
    ),
    *knobs(
        margin.Settings,
        "margin",
        (dict(kind="top2"), "kind=top1_top2"),
        (dict(kind="top1_top2", temperature=0.0), "temperature=1.0"),
        (dict(temperature=math.nan), "temperature=1.0"),
    ),
    Row(
        "'advantage_variance'",
        "--config.margin.kind=top1_top2",
        lambda: margin.margin(margin.Settings("advantage_variance"), np.zeros((2, 3))),
    ),
    *(
        Row(f"K={num}", "--config.rollout.num_candidates=4", _call(margin.teacher_margin, given))
        for num, shape in ((1, (3, 1)), (0, (0,)), (0, ()))
        for given in [dict(teacher_logp_btk=np.zeros(shape))]
    ),
    *knobs(
        selectors.build,
        "selector",
        (dict(kind="release"), "kind=bic"),
        (dict(kind="fixed_prefix", length=-1), "length=1024"),
        (dict(kind="fixed_prefix", length=0), "length=1024"),
        (dict(kind="fixed_fraction", fraction=1.5), "fraction=0.3"),
        (dict(kind="suffix_only", fraction=-0.5), "fraction=0.3"),
        (dict(kind="entropy", fraction=2), "fraction=0.2"),
        (dict(kind="growing_prefix", start_length=0), "start_length=256"),
        (dict(kind="growing_prefix", start_length=9, end_length=8), "end_length=9"),
        (dict(kind="growing_prefix", grow_steps=-1), "grow_steps=0"),
        (dict(kind="iw_opd", gamma=-1.0), "gamma=0.5"),
        (dict(kind="iw_opd", gamma=math.inf), "gamma=0.5"),
        (dict(kind="bic", aggregate="max"), "aggregate=mean"),
        (dict(kind="bic", transform="log"), "transform=log1p"),
        (dict(kind="bic", trim=0.5), "trim=0.1"),
        (dict(kind="bic", min_side=0), "min_side=1"),
        (dict(kind="bic", tail_weight=2.0), "tail_weight=0.0"),
        (dict(kind="bic", on_no_change="none"), "on_no_change=full"),
        (dict(kind="bic", no_change_length=0), "no_change_length=4096"),
        (dict(kind="bic", min_supervised_tokens=-2), "min_supervised_tokens=0"),
    ),
    Row(
        "'bic' has no setting 'length'",
        "Leave --config.selector.length out",
        lambda: selectors.build("bic", length=3),
    ),
    Row(
        "it has: none",
        "Leave --config.selector.fraction out",
        lambda: selectors.build("full", fraction=0.5),
    ),
    *knobs(
        lambda **given: selectors.of(selectors.DEFAULTS | given),
        "selector",
        (dict(kind="full", min_side=3), "min_side=1"),
        (dict(kind="bic", length=64), "length=1024"),
        (dict(kind="fixed_prefix", fraction=0.5), "fraction=0.0"),
    ),
    # The loss.
    *knobs(
        Objective,
        "objective",
        (dict(kind="kl"), "kind=sampled_pg"),
        (dict(kind="jsd", beta=1.5), "beta=0.5"),
        (dict(kind="jsd", beta=-0.1), "beta=0.5"),
        (dict(kind="jsd", support="top"), "support=full"),
        (dict(kind="jsd", support="union", tail="none"), "tail=bin"),
        (dict(kind="jsd", support="teacher_k", top_k=1), "top_k=16"),
        (dict(kind="sampled_pg", support="union"), "support=full"),
        (dict(kind="jsd", tail="truncate"), "tail=bin"),
        (dict(kind="jsd", support="student_k", top_k=8), "top_k=16"),
        (dict(kind="reverse_kl", beta=0.1), "beta=0.5"),
        (dict(kind="jsd", extrapolation=1.25), "extrapolation=1.0"),
        (dict(kind="sampled_pg", advantage_floor=1.0), "advantage_floor=0.0"),
        (dict(kind="sampled_pg", is_threshold=-1.0), "is_threshold=0.0"),
        (dict(kind="sampled_pg", extrapolation=math.nan), "extrapolation=1.0"),
        (dict(kind="sampled_pg", advantage_clip=-1.0), "advantage_clip=0.0"),
        (dict(kind="jsd", advantage_clip=1.0), "advantage_clip=0.0"),
        (dict(kind="forward_kl", stop_gradient=True), "stop_gradient=False"),
        (dict(aggregate="mean"), "aggregate=row_mean"),
        (dict(rescale="row"), "rescale=sequence"),
        (dict(max_rescale=0.5), "max_rescale=0.0"),
        (dict(max_rescale=-2.0), "max_rescale=0.0"),
    ),
    *knobs(
        functools.partial(check_sizes, Objective(), vocab_size=10),
        "rollout",
        (dict(num_candidates=1), "num_candidates=4"),
        (dict(num_candidates=11), "num_candidates=4"),
    ),
    *knobs(
        optimizer.Settings,
        "optim",
        (dict(decay="linear"), "decay=constant"),
        (dict(learning_rate=math.nan), "learning_rate=1e-05"),
        (dict(b1=1.5), "b1=0.9"),
        (dict(b2=-1.0), "b2=0.999"),
        (dict(eps=-1.0), "eps=1e-08"),
        (dict(clip_norm=math.nan), "clip_norm=1.0"),
        (dict(weight_decay=-1.0), "weight_decay=0.01"),
        (dict(warmup_steps=-3), "warmup_steps=0"),
        (dict(max_skipped=-1), "max_skipped=3"),
    ),
    *knobs(
        rollout.Settings,
        "rollout",
        (dict(first_cache=-5), "first_cache=0"),
        (dict(head_dtype="fp8"), "head_dtype=''"),
        (dict(temperature=1e-40), "temperature=1.0"),
        (dict(by="nobody"), "by=student"),
    ),
    *knobs(packing.Settings, "pack", (dict(head_chunk=0), "head_chunk=128")),
    *knobs(backend.Settings, "model", (dict(compute_dtype="bf16"), "compute_dtype=float32")),
    *knobs(recorder.Settings, "log", (dict(every_steps=0), "every_steps=1")),
    Row("config.seed=-1", "--config.seed=0", lambda: Settings(seed=-1)),
    Row(f"config.seed={10**20}", "--config.seed=0", lambda: Settings(seed=10**20)),
    Row("config.mesh=(('fsdp',),)", "--config.mesh=", lambda: Settings(mesh=(("fsdp",),))),
    Row("config.mesh='fsdp:2'", "--config.mesh=", lambda: Settings(mesh="fsdp:2")),
    # Sizes, batches and the mesh.
    *knobs(
        packing.check_shape,
        "pack",
        (dict(prompt_len=64, response_len=192, rows=8, tokens=255), "micro_batch_tokens=256."),
        (dict(prompt_len=64, response_len=192, tokens=256, rows=0), "micro_batch_rows=1"),
    ),
    Row(
        "config.data.batch_size=10 does not split over the 4 shards",
        "--config.data.batch_size=8 or 12,",
        lambda: parallel.check_rows(10, "data.batch_size", mesh_of(data=2, fsdp=2, tensor=2)),
    ),
    Row(
        "config.pack.micro_batch_rows=2",
        "--config.pack.micro_batch_rows=4,",
        lambda: parallel.check_rows(2, "pack.micro_batch_rows", mesh_of(data=2, fsdp=2)),
    ),
    Row("unroll=-2", "--config.model.unroll=-1.", lambda: qwen3.choose_unroll(-2, "cpu")),
    *knobs(prompts, "data", (dict(host_count=3, batch_size=4), "batch_size=3")),
    # Data, evaluation, models and checkpoints.
    Row("the data set is empty", "--config.data.source", lambda: prompts(source=())),
    Row(
        "--config.data.source=nowhere.jsonl is no file",
        "set it to a JSONL file",
        lambda: build_dataset("nowhere.jsonl"),
    ),
    Row(
        "'ignore'",
        "--config.data.on_error=raise or skip",
        lambda: build_dataset(__file__ + "l", on_error="ignore"),
    ),
    Row("split 'test'", "train, heldout, ood", lambda: build_dataset("embedded", "test")),
    Row(
        "the prompt of 'long-1' has 9 tokens, more than prompt_len=8",
        "--config.data.prompt_len=9",
        lambda: evaluate.check_prompts([problem], [[0] * 9], 8),
    ),
    Row(
        "5 problems with 0 samples each",
        "--config.evaluate.num_samples=1",
        lambda: evaluate.check_sizes(5, 0),
    ),
    Row("k=8 with 4 samples", "--num_samples=8", lambda: intervals.pass_at_k(np.ones((3, 4)), 8)),
    Row("livecodebench", "launch.export", lambda: benchmarks.load("livecodebench")),
    Row("HumanEval+", "launch.export", lambda: benchmarks.load("HumanEval+")),
    Row("aime26", "embedded_ood, aime25", lambda: benchmarks.load("aime26")),
    Row("'embedded:nobody'", "'embedded:student'", lambda: hf.resolve("embedded:nobody")),
    Row("'nowhere'", "Give 'embedded:student', 'embedd", lambda: hf.resolve("nowhere")),
    Row(
        "--config.teacher.path=nowhere",
        "--config.teacher.path=embedded:teacher",
        lambda: Teacher("nowhere").directory,
    ),
    *knobs(
        checkpoint.Settings,
        "checkpoint",
        (dict(keep_last=0), "keep_last=2"),
        (dict(every_steps=-1), "every_steps=20"),
        (dict(keep_every_steps=-4), "keep_every_steps=0"),
        (dict(keep_best=-1), "keep_best=1"),
        (dict(keep_best=1.5), "keep_best=1"),
    ),
    Row(
        "rate: 0.1 there, 0.5 now; seed: 0 there, 7 now",
        "Set --workdir to a new directory",
        lambda: owner.compare(dict(seed=7, rate=0.5), dict(seed=0, rate=0.1), "runs/a"),
    ),
    Row(
        "num_steps: 10 there, 20 now",  # a rate that has followed a cosine of ten
        "give these keys the values that are there",
        lambda: owner.compare(
            {"num_steps": 20, "optim": {"decay": "cosine"}},
            {"num_steps": 10, "optim": {"decay": "cosine"}},
            "runs/a",
        ),
    ),
    Row(
        "config.num_steps=4,",
        "--config.num_steps=6",
        lambda: owner.check_num_steps(4, 6, "runs/a"),
    ),
    *knobs(
        lambda kind, by: check_models(Objective(kind), by, True),
        "rollout",
        (dict(kind="sampled_pg", by="teacher"), "by=student"),
        (dict(kind="cross_entropy", by="student"), "by=teacher"),
        (dict(kind="forward_kl", by="nobody"), "by=student"),
    ),
    Row(
        "config.selector.kind='tip'",
        "--config.selector.kind=full",
        lambda: selectors.check_positional(selectors.build("tip")),
    ),
    Row(
        "config.objective.extrapolation=1.25",
        "--config.reference.path=embedded:student",
        lambda: check_models(Objective(extrapolation=1.25), "student", False),
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_bad_input_is_refused_with_what_was_given_and_what_to_set(row):
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        row.call()
    message = str(refused.value)
    assert row.given in message.replace(row.flag, ""), message  # not just in the advice
    assert row.flag in message, message
    assert len(message) > 60, "says neither what is needed nor why"
    advice.check(message)


@pytest.mark.parametrize("subject", ELSEWHERE)
def test_what_is_checked_elsewhere_is(subject):
    file, name = ELSEWHERE[subject].split("::")
    functions = ast.walk(ast.parse((ROOT / "tests" / file).read_text()))
    assert name in {node.name for node in functions if isinstance(node, ast.FunctionDef)}
