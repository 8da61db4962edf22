# SPDX-License-Identifier: Apache-2.0
"""Settings of every test: CPU, eight fake devices, silent rank promotion refused.

A test that asks for no mesh runs on one device: what is not sharded lives on `jax.devices()[0]`.
"""

import functools
import os
import socket
import subprocess
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported, or an accelerator is taken
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forked workers would warn about it

import jax
import pytest
from hypothesis import settings

if os.environ["JAX_PLATFORMS"] == "cpu":
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
CACHE = "JAX_COMPILATION_CACHE_DIR"
LEAST_SECONDS = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


def pytest_configure(config):
    """One compilation cache per session, for xdist's workers and the runs that tests start too.

    It travels in the environment: workers are started by the process that makes the folder and
    inherit it. Who sets JAX_COMPILATION_CACHE_DIR shares it between sessions too.
    """
    if CACHE not in os.environ:
        cache = tempfile.TemporaryDirectory(prefix="opd_jax_compiled_")
        config.add_cleanup(cache.cleanup)
        os.environ[CACHE] = cache.name
        config.add_cleanup(lambda: os.environ.pop(CACHE))
    os.environ.setdefault(LEAST_SECONDS, "0.2")
    # jax has read its environment by now, except in workers.
    jax.config.update(CACHE.lower(), os.environ[CACHE])
    jax.config.update(LEAST_SECONDS.lower(), float(os.environ[LEAST_SECONDS]))


# Compilation makes the first example slow, and a run is its seed: the same examples every time,
# unless somebody asks for more of them (tests/test_fuzz.py).
rounds = int(os.environ.get("OPD_JAX_FUZZ", 0))
settings.register_profile(
    "opd_jax", deadline=None, derandomize=not rounds, max_examples=rounds or 100
)
settings.load_profile("opd_jax")


@pytest.fixture(scope="session")
def one_device_mesh():
    """The mesh of a run on one device, with the axes that every mesh of ours has."""
    axes = ("data", "fsdp", "tensor", "expert")
    kinds = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.make_mesh((1, 1, 1, 1), axes, axis_types=kinds, devices=jax.devices()[:1])


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Directories of a random student and teacher."""
    from tests import fakes

    return fakes.make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def one_device_module():
    """Runs of this module see the first device alone."""
    from opd_jax import parallel

    with pytest.MonkeyPatch.context() as patch:
        one = functools.partial(parallel.build_mesh, devices=jax.devices()[:1])
        patch.setattr(parallel, "build_mesh", one)
        yield


@pytest.fixture
def on_one_device(one_device_module):
    """The same, for a test."""


@pytest.fixture(scope="module")
def quick_compile():
    """Half the compile time for code that runs a few times only; for modules that time nothing."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def two_processes(tmp_path):
    """Runs a script twice, side by side: argv = a free port, the process's number, `arguments`.

    Both must print "agreed" last.
    """

    def run(source: str, *arguments: str, timeout: float = 600.0):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        script = tmp_path / "script.py"
        script.write_text(source)
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes = [
            subprocess.Popen([sys.executable, str(script), str(port), str(p), *arguments], **pipes)
            for p in range(2)
        ]
        try:
            for process in processes:
                out, err = process.communicate(timeout=timeout)
                assert out.endswith("agreed\n"), err[-3000:]
        finally:
            for process in processes:
                process.kill()

    return run
