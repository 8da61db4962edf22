# SPDX-License-Identifier: Apache-2.0
import pathlib
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from opd_jax import parallel
from opd_jax.model import qwen3


def mesh_of(data=1, fsdp=1, tensor=1, expert=1):
    sizes = dict(data=data, fsdp=fsdp, tensor=tensor, expert=expert)
    num = data * fsdp * tensor * expert
    return parallel.build_mesh(sizes.items(), devices=jax.devices()[:num])


def tiny(**changes):
    sizes = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
    )
    return qwen3.Qwen3Config(**(sizes | changes))


# ---- mesh ----


def test_minus_one_takes_the_devices_that_are_left():
    mesh = parallel.build_mesh((("data", 1), ("fsdp", -1), ("tensor", 2), ("expert", 1)))
    assert dict(mesh.shape) == dict(data=1, fsdp=4, tensor=2, expert=1)
    assert parallel.num_batch_shards(mesh) == 4


ALL = "(('data',1),('fsdp',-1),('tensor',1),('expert',1))"


@pytest.mark.parametrize(
    "sizes, says, works",
    [
        (dict(fsdp=3), "multiplies to 3", "(('data',1),('fsdp',-1),('tensor',1),('expert',1))"),
        (dict(tensor=2, fsdp=3), "6", "(('data',1),('fsdp',-1),('tensor',2),('expert',1))"),
        (dict(tensor=3, fsdp=-1), "3 times the rest", ALL),
        (dict(data=-1, fsdp=-1), "'data' and 'fsdp'", "(('data',-1),('fsdp',1)"),
        (dict(fsdp=0), "size 0", "(('data',1),('fsdp',1)"),
        (dict(model=2), "'model'", ALL),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_one_that_does(sizes, says, works):
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        parallel.build_mesh(sizes.items())
    assert f'--config.mesh="{works}' in str(error.value)
    if works.endswith("))"):
        parallel.build_mesh(eval(works))  # what the message proposes is accepted


# ---- rules ----


def test_rules_divide_every_matrix_of_a_dense_and_of_a_sparse_model():
    mesh = mesh_of(fsdp=2, tensor=2, expert=2)
    for name, names, expected in [
        ("embedding", ("vocab", "embed"), P("tensor", ("fsdp", "expert"))),
        ("q_proj", ("layers", "embed", "heads", None), P(None, ("fsdp", "expert"), "tensor")),
        ("o_proj", ("layers", "heads", None, "embed"), P(None, "tensor", None, ("fsdp", "expert"))),
        ("experts", ("layers", "experts", "embed", "mlp"), P(None, "expert", "fsdp", "tensor")),
        ("head norm", ("layers", "head_dim"), P()),
    ]:
        assert parallel.spec(names, mesh, parallel.TRAIN_RULES) == expected, name
    decode = parallel.spec(("layers", "embed", "mlp"), mesh, parallel.DECODE_RULES)
    assert decode == P(None, None, "tensor")  # nothing to gather per token
    hidden = parallel.spec(("batch", "length", "mlp"), mesh, parallel.ACTIVATION_RULES)
    assert hidden == P(("data", "fsdp", "expert")[1:], None, "tensor")


def test_axes_of_one_device_leave_no_trace():
    mesh = mesh_of(tensor=2)
    assert parallel.spec(("vocab", "embed"), mesh, parallel.TRAIN_RULES) == P("tensor")
    assert parallel.batch_sharding(mesh).spec == P()


def test_model_parameters_are_covered_and_land_where_the_rules_say():
    config = tiny()
    mesh = mesh_of(fsdp=2, tensor=2, expert=2)
    shardings = parallel.shardings(qwen3.param_axes(config), mesh)
    shapes = qwen3.param_shapes(config)
    parallel.check_coverage(shapes, shardings, mesh)
    gate = shardings["layers"]["mlp"]["gate_proj"].shard_shape((2, 32, 48))
    assert gate == (2, 8, 24)  # [layers, D, F] over (fsdp, expert) and tensor


def test_a_replicated_matrix_fails_coverage_and_small_vectors_do_not():
    mesh = mesh_of(fsdp=2, tensor=2)
    shapes = dict(w=jax.ShapeDtypeStruct((64, 64), jnp.float32), norm=jnp.ones(64))
    whole, fsdp, both = P(), P("fsdp"), P("fsdp", "tensor")

    def check(w):
        specs = dict(norm=NamedSharding(mesh, whole), w=NamedSharding(mesh, w))
        parallel.check_coverage(shapes, specs, mesh)

    check(both)  # norm is 64 of 4,160: 1.5 %
    with pytest.raises(ValueError, match=r"100.0% .* axis 'fsdp' .* \['w'\]"):
        check(whole)
    with pytest.raises(ValueError, match="axis 'tensor'"):
        check(fsdp)


# ---- checks ----


@pytest.mark.parametrize(
    "config, mesh, says, works",
    [
        (tiny(), dict(tensor=4), "num_kv_heads=2", "('fsdp',2),('tensor',2)"),
        (tiny(vocab_size=63), dict(tensor=2), "vocab_size=63", "('fsdp',2),('tensor',1)"),
        (tiny(hidden_size=36), dict(fsdp=8), "hidden_size=36", "('data',2),('fsdp',4)"),
        (
            tiny(num_experts=3, moe_intermediate_size=8, num_experts_per_token=1),
            dict(expert=2),
            "num_experts=3",
            "('fsdp',2),('tensor',1),('expert',1)",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_is_refused_with_one_that_does(
    config, mesh, says, works
):
    with pytest.raises(ValueError, match=f"the student's.*{says}") as error:
        parallel.check_model(config, mesh_of(**mesh), "student")
    assert works in str(error.value)
    proposed = dict(re.findall(r"\('(\w+)',(\d+)\)", str(error.value)))
    parallel.check_model(config, mesh_of(**{k: int(v) for k, v in proposed.items()}), "student")


def test_even_rows_are_accepted():
    parallel.check_rows(8, "data.batch_size", mesh_of(data=2, fsdp=2, tensor=2))


# ---- rows ----


@pytest.mark.parametrize(
    "mesh", [dict(), dict(fsdp=8), dict(tensor=8), dict(data=2, fsdp=2, tensor=2), dict(expert=4)]
)
def test_rows_come_back_as_they_were_sent(mesh):
    mesh = mesh_of(**mesh)
    rows = dict(a=np.arange(48.0).reshape(8, 6), b=np.arange(8, dtype=np.int32))
    sent = parallel.to_global(mesh, rows)
    assert sent["a"].shape == (8, 6)
    assert sent["a"].addressable_data(0).shape[0] == 8 // parallel.num_batch_shards(mesh)
    np.testing.assert_array_equal(jnp.sum(sent["a"], axis=1), rows["a"].sum(axis=1))
    jax.tree.map(np.testing.assert_array_equal, parallel.to_host(sent), rows)


def test_to_host_assembles_any_sharding():
    x = np.arange(64.0).reshape(8, 8)
    mesh = mesh_of(fsdp=4, tensor=2)
    for spec in (P("tensor", "fsdp"), P(None, "fsdp"), P(("fsdp", "tensor")), P()):
        sent = jax.device_put(x, NamedSharding(mesh, spec))
        np.testing.assert_array_equal(parallel.to_host(sent), x)
    assert parallel.to_host(parallel.replicate(mesh, np.float32(3))) == 3


def fake_mesh(process_of_device):
    """A mesh [1, fsdp, tensor, 1] whose devices belong to these processes."""
    owner = np.array(process_of_device)[None, :, :, None]
    devices = np.vectorize(lambda p: SimpleNamespace(process_index=p), otypes=[object])(owner)
    shape = dict(zip(parallel.AXES, owner.shape, strict=True))
    return SimpleNamespace(devices=devices, axis_names=parallel.AXES, shape=shape)


@pytest.mark.parametrize(
    "owners, groups",
    [
        ([[0, 0], [1, 1]], [(0, (0,)), (1, (1,))]),  # tensor inside a host
        ([[0, 1], [0, 1]], [(0, (0, 1)), (0, (0, 1))]),  # tensor across hosts: the same rows
        (
            [[0], [1], [0], [1]],
            [(0, (0, 2)), (1, (1, 3))],
        ),  # a host's shards need not be neighbours
        ([[0, 1], [2, 3]], [(0, (0,)), (0, (0,)), (1, (1,)), (1, (1,))]),
    ],
)
def test_each_process_feeds_the_rows_of_its_own_devices(owners, groups):
    mesh = fake_mesh(owners)
    for process, (index, shards) in enumerate(groups):
        host_group = parallel.host_group(mesh, process)
        assert (host_group.index, host_group.shards) == (index, shards)
        assert host_group.count == 1 + max(i for i, _ in groups)
        assert host_group.leaders == tuple(
            next(p for p, (i, _) in enumerate(groups) if i == f) for f in range(host_group.count)
        )


def test_hosts_that_share_some_rows_only_are_refused():
    with pytest.raises(ValueError, match="share only in part"):
        parallel.host_group(fake_mesh([[0, 0], [0, 1], [1, 1]]), 0)


def test_gathering_in_one_process_is_the_identity():
    mesh = mesh_of(fsdp=2)
    x = np.array([0.1, 1e300])
    np.testing.assert_array_equal(parallel.gather_rows(mesh, x), x)
    np.testing.assert_array_equal(parallel.sum_over_host_groups(mesh, x), x)
    assert parallel.max_over_hosts(3) == 3


TWO_PROCESSES = """
import sys
sys.path.insert(0, sys.argv[3])
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
port, process = sys.argv[1], int(sys.argv[2])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
from opd_jax import parallel

for sizes in (dict(fsdp=8), dict(data=2, tensor=4), dict(fsdp=4, tensor=2), dict(tensor=8)):
    mesh = parallel.build_mesh(sizes.items())
    group = parallel.host_group(mesh)
    rows = np.arange(8 // group.count * 3, dtype=np.float32).reshape(-1, 3) + 100 * group.index
    sent = parallel.to_global(mesh, rows)
    assert sent.shape == (8, 3), sent.shape
    np.testing.assert_array_equal(parallel.to_host(sent), rows)
    total = jax.jit(lambda x: x.sum(), out_shardings=parallel.replicated(mesh))(sent)
    everything = parallel.gather_rows(mesh, rows)
    assert everything.shape == (8, 3)
    assert float(parallel.to_host(total)) == everything.sum()
    assert parallel.sum_over_host_groups(mesh, rows.sum()) == everything.sum()
    value = np.array([0.1 + process, 1e300])  # float64 stays float64
    np.testing.assert_array_equal(parallel.allgather(value)[process], value)
    assert parallel.max_over_hosts(process) == 1
    assert parallel.to_host(parallel.replicate(mesh, np.float32(7))) == 7
print("agreed")
"""


@pytest.mark.slow
def test_two_processes_agree_on_rows_and_sums(two_processes):
    two_processes(TWO_PROCESSES, str(pathlib.Path(__file__).parent.parent))
