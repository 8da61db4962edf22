# SPDX-License-Identifier: Apache-2.0
"""Packaging. Every dependency stands beside the reason it is here and the reason for its range."""

import setuptools

INSTALL = [
    "jax>=0.10,<0.11",  # the engine; the newest line for CPython 3.11, every figure is of it
    "flax>=0.12.8,<0.13",  # NNX modules; older ones do not know jax 0.10
    "optax>=0.2.8,<0.3",  # optimizers
    "orbax-checkpoint>=0.12.8,<0.13",  # asynchronous, atomic, sharded checkpoints
    "transformers>=5.0,<6",  # tokenizers and chat templates (never model code: no torch needed)
    "jinja2>=3.1",  # chat templates; transformers uses it and does not say so
    "huggingface_hub>=1.0,<3",  # fetches models by hub id; transformers brings it anyway
    "filelock>=4.3,<5",  # one run per workdir; huggingface_hub brings it anyway
    "safetensors>=0.5,<1",  # the weight format; the only one we read
    "nltk>=3.9.1,<4",  # Punkt sentences; 3.9.1 is the first without pickled models
    "ml_collections>=1.0,<2",  # configs that flags can override
    "tensorflow-datasets>=4.9.8,<5",  # datasets without TensorFlow through as_data_source
    "array_record>=0.7",  # tensorflow-datasets' random-access files
    "importlib_resources>=5",  # imported by tensorflow-datasets, which does not say so
    "grain>=0.2.12,<0.3",  # shuffling, sharding and a checkpointable data cursor
    "math-verify>=0.9,<0.10",  # equivalence of mathematical answers
    "latex2sympy2_extended>=1.10,<2",  # reads LaTeX for math-verify; called for expressions too
    "sympy>=1.13,<2",  # which those expressions are; the same two bring it
    "scipy>=1.15",  # intervals; the first whose bootstrap takes `rng`; jax brings it anyway
    "etils[epath]>=1.9",  # gs:// and local paths alike
    "tensorboardX>=2.6",  # event files without TensorFlow
    "tqdm>=4.66",  # progress on a terminal
]

EXTRAS = {
    "test": [
        "pytest>=8",
        "pytest-xdist>=3.6,<4",  # two workers in .ci/run
        "pyarrow>=15",  # makes the tables whose advice is tested; tensorflow-datasets brings it
        "hypothesis>=6",  # properties of the algorithm
        "ruff>=0.12,<0.17",  # lint and format; its formatting changes between minors
        "pyright[nodejs]>=1.1.400,<1.2",  # types; node comes as a wheel, nothing is fetched later
    ],
    # Live comparison with transformers' own models; pinned to the CPU build known to install.
    "parity": ["torch==2.13.0"],
    # Compiling for TPU topologies on a machine without one (launch.plan), and running on them.
    "tpu": ["jax[tpu]>=0.10,<0.11"],
    "gcs": ["gcsfs"],  # what etils.epath reads and writes gs:// with
}

setuptools.setup(
    name="opd_jax",
    version="0.1.0",
    description="On-policy distillation of Qwen3 with a release rule, in JAX",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["opd_jax*", "configs*", "launch*"]),
    package_data={
        "opd_jax": ["py.typed", "assets/**/*"],
        "launch.report": ["*.css", "*.js", "*.html"],
    },
    install_requires=INSTALL,
    extras_require=EXTRAS,
)
