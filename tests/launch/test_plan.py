# SPDX-License-Identifier: Apache-2.0
"""Plans: arithmetic by hand, refusals in time, and a whole step compiled for TPUs."""

import dataclasses
import json
import math
import pathlib
import re

import numpy as np
import pytest

from configs import paper
from launch import config_flags
from launch.plan import advice, chips, predict, run, search, stages, text
from launch.plan.hlo_cost import Costs
from opd_jax import parallel
from opd_jax.model import published
from opd_jax.model.qwen3 import Qwen3Config
from tests import advice as advice_in_bash

ROOT = pathlib.Path(__file__).parent.parent.parent
GOLDEN = ROOT / "tests/golden/plan_v5e_2x2.json"
GIB = chips.GIB


# --- chips and slices ---


def slice_of(kind: str, shape: tuple[int, ...], per_chip: int = 1) -> chips.Slice:
    name = f"{kind}:{'x'.join(map(str, shape))}"
    devices = tuple(range(math.prod(shape) * per_chip))
    return chips.Slice(name, chips.CHIPS[kind], shape, devices)


@pytest.mark.parametrize(
    "topology, names",
    [
        ("h100:8", "--topology=v5p:4x4x4"),
        ("v5e", "--topology=v5e:16x16"),
        ("v5p:4x4", "--topology=v5p:4x4x4"),
        ("v5e:0x4", "--topology=v5e:16x16"),
        ("v6e:4x4x4", "--topology=v6e:16x16"),
    ],
)
def test_a_slice_that_does_not_exist_is_refused_with_one_that_does(topology, names):
    with pytest.raises(ValueError, match=re.escape(names)) as error:
        chips.describe(topology)
    advice_in_bash.check(error.value)


def test_without_the_compiler_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=re.escape("opd_jax[tpu]")):
        chips.describe("v5e:2x2")


def test_a_shape_that_the_compiler_refuses_is_refused():
    pytest.importorskip("libtpu", reason="needs the extra `tpu`")
    with pytest.raises(ValueError, match=r"refused by the TPU compiler.*--topology=v5e:16x16"):
        chips.describe("v5e:3x3")


@pytest.mark.parametrize(
    "topology, devices", [("v5e:2x4", 8), ("v4:2x2x1", 4), ("tpu7x:2x2x1", 8), ("v6e:2x2", 4)]
)
def test_devices_of_a_slice(topology, devices):
    pytest.importorskip("libtpu", reason="needs the extra `tpu`")
    found = chips.describe(topology)
    assert len(found.devices) == devices
    assert found.devices_per_chip == (2 if topology.startswith("tpu7x") else 1)
    assert found.hbm_bytes * found.devices_per_chip == found.chip.hbm_bytes


def test_links_that_a_group_can_use():
    v5e, v5p = slice_of("v5e", (16, 16)), slice_of("v5p", (4, 4, 4))
    everywhere = np.array(list(np.ndindex(16, 16)))
    assert v5e.group_bandwidth(everywhere) == 4 * 50e9
    assert v5e.group_bandwidth(everywhere[:16]) == 2 * 50e9  # one ring
    assert v5e.group_bandwidth(everywhere[:8]) == 50e9  # half of it: a line
    assert v5p.group_bandwidth(np.array(list(np.ndindex(4, 4, 4)))) == 6 * 100e9
    assert v5p.group_bandwidth(np.array([[0, 0, 0], [0, 0, 1]])) == 100e9
    two_cores = slice_of("tpu7x", (4, 4, 4), per_chip=2)
    assert two_cores.group_bandwidth(np.zeros((2, 3), int)) == 6 * 100e9
    assert two_cores.group_bandwidth(np.array(list(np.ndindex(4, 4, 4)))) == 6 * 100e9 / 2


@dataclasses.dataclass
class Device:
    coords: tuple[int, ...]


def test_the_slowest_resource_is_the_prediction():
    slice_ = slice_of("v5e", (2, 2))
    devices = [Device((x, y, 0)) for x in range(2) for y in range(2)]
    costs = Costs(matmul_flops=197e12, hbm_bytes=2 * 800 * GIB)
    costs.collectives["all-gather", (0, 1)] = 25e9
    seconds = chips.roofline(costs, slice_, devices)
    assert (seconds.compute, seconds.hbm, seconds.interconnect) == (1.0, 2.0, 0.5)
    assert (seconds.total, seconds.bound) == (2.0, "hbm")


# --- the work of a step ---


def decode_steps(sizes, num_slots, batch_size=8, prompt_len=100, response_len=900, **assume):
    defaults = dict(prompt_mean=50, response_mean=450, decode_steps=0, supervised=0.3, packing=1.0)
    pieces = object.__new__(stages.Pieces)
    pieces.assume = stages.Assumptions(**(defaults | assume))
    pieces.batch_size, pieces.prompt_len = batch_size, prompt_len
    sampler = type("Sampler", (), {"response_len": response_len})
    pieces.device = type("OnDevice", (), {"sampler": sampler})
    return list(pieces._decode_steps(sizes, num_slots))


def test_every_row_in_a_slot_decodes_until_the_longest_ends():
    assert decode_steps([1000], num_slots=8) == [(1000, 900)]


def test_a_growing_cache_divides_the_steps_over_its_sizes():
    assert decode_steps([200, 400, 1000], num_slots=8) == [(200, 100), (400, 200), (1000, 600)]


def test_fewer_slots_take_several_turns():
    assert decode_steps([1000], num_slots=2) == [(1000, 4 * 450)]


def test_assumed_decode_steps_rule():
    assert decode_steps([200, 1000], num_slots=8, decode_steps=150) == [(200, 100), (1000, 50)]


def test_a_response_longer_than_the_longest_cannot_be_assumed():
    config = config_flags.load(str(ROOT / "configs/paper.py"))
    given = dict(prompt_mean=1, decode_steps=0, supervised=1, packing=1)
    assert run.assumptions(config, response_mean=0, **given).response_mean == 8192
    with pytest.raises(ValueError, match=re.escape("--response_mean=8192")):
        run.assumptions(config, response_mean=20000, **given)


def test_a_model_that_is_not_there_names_the_flag():
    with pytest.raises(ValueError, match="^--config.teacher.path=nowhere cannot be read: .*Give"):
        run.model_config("nowhere", "teacher")


def test_what_cannot_fit_is_said_by_arithmetic_and_not_compiled():
    pytest.importorskip("libtpu", reason="needs the extra `tpu`")
    config = config_flags.load(str(ROOT / "configs/paper.py:1.7b"))
    compiled = []
    plan = run.plan(config, chips.describe("v5e:2x4"), assume(config), compiled.append)
    assert not plan.fits and plan.step_seconds is None and not compiled
    cache = 2 * 28 * 1024 * 8 * (2048 + 16384) * 128 * 2 / 8  # keys and values, rows over 8 chips
    weights = 1.72e9 * 2
    assert plan.stages["decode"].memory["arguments"] == pytest.approx(cache + weights, rel=0.01)
    lines = advice.advise(plan, config)
    assert lines[0].startswith("decode is short of") and "--topology=v5e:4x4" in lines[0]
    assert not any("head_chunk" in line for line in lines)  # no temporary was counted
    assert predict.by_arithmetic({"decode": {"arguments": 8 * GIB}}, plan.chips) == {}


@pytest.mark.parametrize(
    "message, gib",
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
         "temporaries (256.00G) exceeds available HBM (15.75G).", 256),
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
         "hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.", 20.5),
    ],
)  # fmt: skip
def test_how_much_a_program_needed_is_read_from_the_compilers_refusal(message, gib):
    assert predict._needed(message) == gib * GIB


# --- what is printed ---


def plan_of(**gib) -> text.Plan:
    """A v5e:2x2 plan whose stages need so many GiB."""
    found = {}
    for name, size in gib.items():
        stage = predict.Stage(name, runs=2, flops=197e12, seconds=2.0, bound="hbm")
        stage.memory = {"resident": 1.0 * GIB, "temporaries": (size - 1.0) * GIB}
        found[name] = stage
    mesh = dict(data=1, fsdp=4, tensor=1, expert=1)
    return text.Plan(slice_of("v5e", (2, 2)), mesh, found, 8000.0, "nothing")


def test_the_json_object():
    out = json.loads(json.dumps(text.as_json(plan_of(score=5, update=10))))
    assert out["fits"] is True
    assert out["step_seconds"] == 4.0
    assert set(out["stages"]) == {"score", "update"}
    stage = out["stages"]["update"]
    assert stage["hbm_bytes"] == 10 * GIB and stage["hbm_limit_bytes"] == 15.75 * GIB
    assert (stage["flops"], stage["seconds"]) == (197e12, 2.0)
    assert out["utilisation"] == 0.5
    assert out["tokens_per_second_per_chip"] == 500
    assert out["chip_hours_per_100_steps"] == 100 * 4 * 4 / 3600


def test_what_does_not_fit_is_named_with_flags_that_help():
    config = config_flags.load(str(ROOT / "configs/paper.py:1.7b"))
    plan = plan_of(decode=31, update=16)
    assert not plan.fits
    lines = advice.advise(plan, config)
    assert "decode is short of 15.25 GiB" in lines[0]
    assert "--config.rollout.num_slots=500 or" in lines[0]  # 1024 x 14.75 / 30, by four
    assert "update is short of 0.25 GiB" in lines[1]
    assert "--config.pack.head_chunk=" in lines[1] and "('tensor',2)" in lines[1]
    assert "--topology=v5e:2x4" in lines[1]
    for line in lines:
        advice_in_bash.check(line)
    table = text.as_table(plan, lines)
    assert "fits       no" in table and lines[0] in table


def test_a_stage_that_does_not_compile_has_no_time():
    plan = plan_of(update=20)
    plan.stages["update"].flops = plan.stages["update"].seconds = None
    assert plan.step_seconds is None and not plan.fits
    assert text.as_json(plan)["stages"]["update"]["seconds"] is None
    assert "does not fit" in text.as_table(plan, [])


def test_only_models_with_experts_are_searched_for_meshes_that_divide_them():
    experts = [dict(mesh)["expert"] for mesh in search.meshes(8, 0)]
    assert experts == [1, 1, 1, 1] and len([*search.meshes(8, 128)]) == 6
    dense, mixture = (
        config_flags.load(str(ROOT / f"configs/paper.py:{v}")) for v in ("v5e-8", "8b")
    )
    assert (run.num_experts(dense), run.num_experts(mixture)) == (0, 128)


def test_search_ranks_what_fits_by_time_and_goes_on_from_the_best_mesh():
    config = config_flags.load(str(ROOT / "configs/paper.py:1.7b"))
    tried = []

    def plan(config):
        tensor = dict(config.mesh)["tensor"]
        tried.append((tensor, config.pack.micro_batch_rows))
        if tensor > 2:
            raise ValueError("heads: do not divide")
        found = plan_of(update={1: 99, 2: 10}[tensor])
        found.mesh_shape["tensor"] = tensor
        found.stages["update"].seconds = 2.0 - config.pack.micro_batch_rows / 16
        return found

    said = []
    found = search.search(config, plan, 4, 128, said.append)
    assert tried == [(1, 0), (1, 0), (2, 0), (4, 0), (2, 4), (2, 8)]
    element, best = found[0]
    assert best.fits and element["pack.micro_batch_rows"] == 8
    assert not found[-1][1].fits
    table = search.as_table(found)
    assert table.splitlines()[1].startswith("--config.mesh='((")
    for line in (*said, *table.splitlines()):
        advice_in_bash.check(line)
    # What each came to is said as it comes, so that a search that is killed leaves it.
    assert said[0].startswith("candidate 1 of 6: --config.mesh='((")
    assert said[1] == "  fits no, largest GiB 99.00, of GiB 15.75, s per step 2"
    assert said[7] == "  not possible: heads"
    assert len(said) == 2 * len(tried)


# --- the paper's configs ---


@pytest.mark.parametrize("variant", paper.VARIANTS)
def test_paper_configs_name_published_models_and_rows_that_the_kernels_take(variant):
    config = config_flags.load(f"{ROOT / 'configs/paper.py'}:{variant}")
    assert config.student.path in published.CONFIGS
    assert config.teacher.path in published.CONFIGS
    assert (config.data.prompt_len + config.rollout.response_len) % 128 == 0
    if variant in paper.STUDENTS:
        assert config.data.batch_size == 1024 and config.rollout.response_len == 16384
        assert config.num_steps == 100 and config.rollout.num_candidates == 4


# --- compiled for TPUs that are not there ---


def write_models(directory: pathlib.Path) -> dict[str, str]:
    """config.json of a student and of a mixture-of-experts teacher, small but with real tiles."""
    student = Qwen3Config(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=128,
        tie_embeddings=True,
    )
    teacher = dataclasses.replace(
        student,
        hidden_size=512,
        tie_embeddings=False,
        num_experts=8,
        num_experts_per_token=2,
        moe_intermediate_size=256,
        norm_topk_prob=True,
    )
    for role, config in (("student", student), ("teacher", teacher)):
        (directory / role).mkdir()
        (directory / role / "config.json").write_text(json.dumps(config.to_hf()))
    return {f"{role}.path": str(directory / role) for role in ("student", "teacher")}


def small_step(directory: pathlib.Path, **overrides):
    """The paper's step, everything but its sizes."""
    config = config_flags.load(str(ROOT / "configs/paper.py:1.7b"))
    sizes = {
        "data.batch_size": 16,
        "data.prompt_len": 256,
        "rollout.response_len": 1792,
        "rollout.decode_chunk": 16,
        "pack.head_chunk": 256,
    }
    return config_flags.apply_overrides(config, write_models(directory) | sizes | overrides)


def assume(config):
    return run.assumptions(
        config, prompt_mean=128, response_mean=0, decode_steps=0, supervised=0.3, packing=0.9
    )


@pytest.mark.slow
def test_a_whole_step_compiles_for_v5e_and_its_memory_does_not_grow(tmp_path, monkeypatch):
    """Must-show 3. After a change that is worth its memory, write the printed figures to GOLDEN."""
    pytest.importorskip("libtpu", reason="needs the extra `tpu`")
    length, square = 2048, []

    def parse(hlo_text, parse=predict.hlo.parse):
        module = parse(hlo_text)
        square.extend(a for a, _ in module.arrays() if a.dims.count(length) >= 2)
        return module

    monkeypatch.setattr(predict.hlo, "parse", parse)
    config = small_step(tmp_path)
    plan = run.plan(config, chips.describe("v5e:2x2"), assume(config), print)
    measured = {name: stage.hbm_bytes for name, stage in plan.stages.items()}
    print(json.dumps(measured, indent=2))
    assert plan.fits
    pieces = run.pieces(
        config, parallel.build_mesh(config.mesh, list(plan.chips.devices)), assume(config)
    )
    for name, kinds in pieces.least().items():
        assert 0.3 * measured[name] < sum(kinds.values()) <= measured[name], name
    assert all(stage.flops > 0 and stage.seconds > 0 for stage in plan.stages.values())
    assert not square, "splash attention holds no [L, L] scores"
    recorded = json.loads(GOLDEN.read_text())
    assert measured.keys() == recorded.keys()
    grown = {n: (b, recorded[n]) for n, b in measured.items() if b > 1.05 * recorded[n]}
    assert not grown


@pytest.mark.parametrize(
    "op_name, number",
    [
        ("jit(accumulate)/while", 3.0),
        ("jit(accumulate)/jvp()/while/body/closed_call/shard_map/cond/branch_0_fun/while", 1.0),
        ("jit(accumulate)/jvp()/closed_call/shard_map/cond/branch_0_fun/while", 1.0),
    ],
    ids=["head", "scanned mixture", "unrolled mixture"],
)
def test_only_the_heads_loop_makes_the_heads_iterations(op_name, number):
    """As JAX names them; a mixture's pieces are counted once, being inside a layer."""
    assert (
        stages.Piece("update", 1, lambda: None, 0.0, head_iterations=3.0).iterations(op_name)
        == number
    )


@pytest.mark.slow
def test_arguments_take_as_much_on_eight_cpu_devices_as_the_plan_says(tmp_path):
    """Must-show 4. Comparable: what a stage is given and keeps, which shapes and shardings decide.

    Not comparable: temporaries (other fusions, layouts and kernels) and code. TPU tiles pad small
    arrays, hence the 2 %.
    """
    pytest.importorskip("libtpu", reason="needs the extra `tpu`")
    import jax

    config = small_step(tmp_path, **{"model.attention": "xla", "data.batch_size": 16})
    kinds = {}
    for name, devices in (
        ("cpu", jax.devices()[:8]),
        ("tpu", list(chips.describe("v5e:2x4").devices)),
    ):
        pieces = run.pieces(config, parallel.build_mesh(config.mesh, devices), assume(config))
        for piece in pieces:
            if piece.stage in ("gather", "decode", "update", "optimizer"):
                memory = predict.memory(piece.lower().compile())
                kinds[name, piece.stage] = memory["arguments"], piece.resident
    for stage in ("gather", "decode", "update", "optimizer"):
        (arguments, resident), (expected, planned) = kinds["cpu", stage], kinds["tpu", stage]
        assert resident == planned
        assert abs(arguments - expected) < 0.02 * expected, stage
