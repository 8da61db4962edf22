# SPDX-License-Identifier: Apache-2.0
"""Data flows one way: this is the import table, executed."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "opd_jax"

# Room (folder of opd_jax, or module that stands alone) -> rooms it may import beside itself.
LEAVES = {"structs", "workers", "parallel", "settings"}
ALLOWED = {
    "settings": set(),
    "structs": set(),
    "workers": set(),
    "parallel": set(),
    "algorithm": {"settings"},
    "model": {"structs", "settings"},
    "problems": {"structs", "workers", "settings"},
    "workdir": {"problems"} | LEAVES,
    "stages": {"algorithm", "model", "problems"} | LEAVES,
}
TOP = {  # may import every room, and each other
    "train",
    "build",
    "config",
    "run",
    "recorder",
    "step",
    "metrics",
}
STAGES_OF_STAGES = {"evaluate": {"rollout"}}  # a stage imports no stage, but for these
# Modules in stages/ that are parts of stages, not stages.
PARTS = {"packing", "decode", "sampling", "optimizer"}


def modules() -> list[pathlib.Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: pathlib.Path) -> str:
    """ "train", "model.hf", "algorithm" ... relative to opd_jax."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__")


def imports(path: pathlib.Path) -> set[str]:
    """Dotted names of everything a module imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layer"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: pathlib.Path) -> set[str]:
    """Rooms and modules of opd_jax that a module imports: "model", "structs", ..."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("opd_jax.")}


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_a_module_imports_only_what_its_room_may(path):
    room = name_of(path).split(".")[0]
    if room in TOP:
        return
    extra = ours(path) - {room} - (ALLOWED[room] if room else set())
    assert not extra, f"opd_jax/{path.relative_to(PACKAGE)} may not import {sorted(extra)}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "stages").glob("[a-z]*.py")), ids=name_of)
def test_a_stage_imports_no_stage(path):
    stages = {p.stem for p in path.parent.glob("[a-z]*.py")} - PARTS - {path.stem}
    found = {n.split(".")[2] for n in imports(path) if n.startswith("opd_jax.stages.")}
    extra = (found & stages) - STAGES_OF_STAGES.get(path.stem, set())
    assert not extra, f"opd_jax/stages/{path.name} may not import {sorted(extra)}"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_nothing_below_train_sees_a_config_or_a_launcher(path):
    tops = {name.split(".")[0] for name in imports(path)}
    assert not tops & {"launch", "configs"}
    if name_of(path) not in ("train", "build", "config"):
        assert "ml_collections" not in tops, "config stops at config.py: take settings"


def test_the_main_job_needs_neither_torch_nor_tensorflow():
    for path in modules():
        tops = {name.split(".")[0] for name in imports(path)}
        assert not tops & {"torch", "tensorflow"}, path


# Modules that run code when they read, or whose queues and pools do.
RUN_CODE = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
RUN_CODE |= {"multiprocessing", "yaml", "torch"}


def runs_code(source: str) -> list[str]:
    """What of a module's source could run code that comes from data."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names = [node.module] if isinstance(node, ast.ImportFrom) else names
            found += [name for name in names if name.split(".")[0] in RUN_CODE]
        elif isinstance(node, ast.Attribute):
            found += [node.attr] if node.attr == "ProcessPoolExecutor" else []
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            found += [called] if called in ("eval", "exec") else []
            for keyword in node.keywords:
                safe = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in ("allow_pickle", "trust_remote_code") and not safe:
                    found.append(f"{called}({keyword.arg}=...)")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import multiprocessing.pool",
        "def f():\n    from cloudpickle import loads",
        "np.load(file, allow_pickle=True)",
        "np.load(file, allow_pickle=allow)",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=True)",
        "torch.load(file)\nimport torch",
        "concurrent.futures.ProcessPoolExecutor(2)",
        "eval(text)",
    ],
)
def test_what_runs_code_is_seen(source):
    assert runs_code(source)


def test_no_module_reads_a_pickle_or_runs_what_it_reads():
    """tests/ is left out: it makes pickles, to see them refused, and runs torch for parity."""
    for folder in ("opd_jax", "configs", "launch"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            assert not runs_code(path.read_text()), path


def functions() -> list[tuple[str, int, int]]:
    """Every function of opd_jax and launch: where it is, its parameters, its lines without text."""
    found = []
    for folder in ("opd_jax", "launch"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    given = [a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg)]
                    lines = node.end_lineno - node.lineno + 1
                    if ast.get_docstring(node):
                        lines -= node.body[0].end_lineno - node.body[0].lineno + 1
                    where = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
                    found.append(
                        (where, len([a for a in given if a not in ("self", "cls")]), lines)
                    )
    return found


def test_no_function_is_long_or_takes_many_parameters():
    assert len(functions()) > 500
    assert [where for where, parameters, _ in functions() if parameters > 8] == []
    assert [where for where, _, lines in functions() if lines > 60] == []
