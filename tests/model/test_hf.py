# SPDX-License-Identifier: Apache-2.0
"""Hugging Face directories: read slice by slice, written atomically, refused with reasons."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_models
from safetensors.numpy import load_file, save_file

from opd_jax.model import hf, hf_files, hf_layout, qwen3
from opd_jax.model.qwen3 import Qwen3Config

MOE = tiny_models.CONFIGS["moe_mlp_only"]
TIED = tiny_models.CONFIGS["tied"]


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), (_, y) in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree_util.tree_leaves_with_path(b), strict=True
    ):
        assert x.dtype == y.dtype, path
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=str(path))


# ---- what goes in comes out ----


@pytest.mark.parametrize("raw", [TIED, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_save_and_load_give_back_every_bit(raw, dtype, tmp_path):
    config, params = hf.load(tiny_models.write(tmp_path / "model", raw), dtype)
    hf.save(config, params, tmp_path / "single")
    hf.save(config, params, tmp_path / "sharded", max_shard_bytes=10_000)
    for name in ("single", "sharded"):
        again, same = hf.load(tmp_path / name)
        assert again == config
        assert_same(params, same)


def test_saved_names_are_hugging_faces(tmp_path):
    directory = tiny_models.write(tmp_path / "model", MOE)
    hf.save(*hf.load(directory), tmp_path / "saved")
    ours, theirs = (load_file(d / "model.safetensors") for d in (tmp_path / "saved", directory))
    assert_same(ours, theirs)


def test_whoever_can_read_the_config_can_read_the_weights(tmp_path):
    """safetensors creates files for their owner alone; what serves the model may be another."""
    hf.save(*hf.load(tiny_models.write(tmp_path / "model", MOE)), tmp_path / "saved")
    assert len({file.stat().st_mode for file in (tmp_path / "saved").iterdir()}) == 1


def test_index_names_the_file_of_every_tensor(tmp_path):
    config, params = hf.load(tiny_models.write(tmp_path / "model", TIED))
    hf.save(config, params, tmp_path / "saved", max_shard_bytes=10_000)
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    held = {
        key: file.name
        for file in (tmp_path / "saved").glob("*.safetensors")
        for key in load_file(file)
    }
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == 4 * qwen3.num_params(config)
    sizes = [p.stat().st_size for p in (tmp_path / "saved").glob("*.safetensors")]
    assert len(sizes) > 3 and max(sizes) < 12_000


def test_config_json_survives(tmp_path):
    for name, raw in tiny_models.CONFIGS.items():
        (tmp_path / "config.json").write_text(json.dumps(raw))
        config = Qwen3Config.from_hf(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
        assert Qwen3Config.from_hf(tmp_path) == config, name


def test_tokenizer_and_ids_are_carried_over(tmp_path):
    source = tiny_models.write(tmp_path / "source", TIED | dict(eos_token_id=7, bos_token_id=None))
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        (source / name).write_text(name)
    (source / "modeling_custom.py").write_text("raise SystemExit")
    config, params = hf.load(source)
    hf.save(config, params, tmp_path / "saved", source=source)
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == "chat_template.jinja"
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["eos_token_id"] == 7
    assert not (tmp_path / "saved" / "modeling_custom.py").exists()


# ---- only what this process needs ----


class Counted:
    """A stored tensor that counts what is read of it."""

    def __init__(self, array):
        self.array, self.read = array, 0

    def __getitem__(self, index):
        part = self.array[index]
        self.read += part.size
        return part


@pytest.mark.parametrize("name", ["q_proj", "o_proj", "k_norm"])
@pytest.mark.parametrize("axis", range(3))
def test_a_slice_of_ours_reads_its_slice_of_theirs(name, axis):
    config = qwen3.Qwen3Config(64, 32, 48, 2, 4, 2, 16)
    leaf = hf_layout.leaves(config)["layers", "attention", name]
    if axis >= len(leaf.perm):
        pytest.skip("a vector")
    theirs = np.arange(np.prod(leaf.hf_shape)).reshape(leaf.hf_shape)
    everything = (slice(None),) * len(leaf.perm)
    whole = leaf.read(theirs, everything)
    assert whole.shape == leaf.shape[1:]
    np.testing.assert_array_equal(leaf.to_hf(whole), theirs)
    half = whole.shape[axis] // 2
    index = everything[:axis] + (slice(half, None),) + everything[axis + 1 :]
    view = Counted(theirs)
    np.testing.assert_array_equal(leaf.read(view, index), whole[index])
    cut_inside_heads = leaf.shape[1 + axis] == config.head_dim and len(leaf.perm) > 1
    assert view.read == (whole.size if cut_inside_heads else whole.size / 2)


def test_load_fills_shards(tmp_path):
    """Experts over one mesh axis, widths over another: equal to the whole, and truly divided."""
    directory = tiny_models.write(tmp_path, MOE)
    config, whole = hf.load(directory)
    mesh = jax.make_mesh((2, 2), ("a", "b"), devices=jax.devices()[:4])
    rules = dict(embed="a", heads="b", mlp="b", vocab="b", experts=None)

    def sharding(names):
        spec = jax.sharding.PartitionSpec(*(rules.get(name) for name in names))
        return jax.sharding.NamedSharding(mesh, spec)

    shardings = jax.tree.map(
        sharding, qwen3.param_axes(config), is_leaf=lambda x: isinstance(x, tuple)
    )
    _, params = hf.load(directory, shardings=shardings)
    assert_same(whole, params)
    gate = params["layers"]["moe"]["gate_proj"]
    assert gate.addressable_shards[0].data.size == gate.size / 4


# ---- refused ----


def change_config(**changes):
    def change(directory):
        raw = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(raw | changes))

    return change


def change_weights(function):
    def change(directory):
        weights = load_file(directory / "model.safetensors")
        function(weights)
        save_file(weights, directory / "model.safetensors")

    return change


def several(weights):
    weights.pop("model.norm.weight")
    weights["extra.bias"] = np.zeros(3, np.float32)
    key = "model.layers.1.self_attn.q_proj.weight"
    weights[key] = weights[key][:, :-1]
    key = "model.layers.0.mlp.up_proj.weight"
    weights[key] = weights[key].astype(np.int8)


def not_a_number(weights):
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan


def other_head(weights):
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1


def truncate(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def half_header(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:50])


def pickled(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def no_weights(directory):
    (directory / "model.safetensors").unlink()


def shards(change):
    def apply(directory):
        config, params = hf.load(directory)
        hf.save(config, params, directory, max_shard_bytes=10_000)
        change(directory)

    return apply


def lose_shard(directory):
    (directory / "model-00002-of-00013.safetensors").unlink()


def index_outside(directory):
    index = directory / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["model.norm.weight"] = "../other/model.safetensors"
    index.write_text(json.dumps(raw))


def index_of_other_export(directory):
    index = directory / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["gone.weight"] = "model-00001-of-00013.safetensors"
    index.write_text(json.dumps(raw))


REFUSED = {
    "no config": (lambda d: (d / "config.json").unlink(), "config.json does not exist"),
    "broken config": (lambda d: (d / "config.json").write_text('{"a":'), "is not JSON"),
    "other architecture": (change_config(model_type="llama"), r"\"llama\"; we compute \['qwen3', "),
    "sliding window": (change_config(use_sliding_window=True), "use_sliding_window is on"),
    "layer types": (
        change_config(layer_types=["full_attention", "sliding_attention"]),
        "layer_types holds sliding_attention; we compute 'full_attention'",
    ),
    "other layer types": (
        change_config(layer_types=["linear_attention", "chunked_attention"]),
        "layer_types holds chunked_attention, linear_attention; we",
    ),
    "bias": (change_config(attention_bias=True), "attention_bias is true"),
    "activation": (change_config(hidden_act="gelu"), "hidden_act is .gelu.; we compute 'silu'"),
    "quantised": (change_config(quantization_config={"a": 1}), "name the unquantised model"),
    "rope type": (
        change_config(rope_scaling=dict(rope_type="llama3", factor=8.0)),
        "rope_type is .llama3.; we compute 'default' and 'yarn'",
    ),
    "rope setting": (
        change_config(rope_scaling=tiny_models.YARN | dict(low_freq_factor=1)),
        r"rope settings \['low_freq_factor'\] of rope_type 'yarn' are unknown",
    ),
    "rope base": (change_config(rope_theta=None), "rope_theta is missing"),
    "no width": (change_config(hidden_size=None), "hidden_size is missing"),
    "four at once": (
        change_weights(several),
        r"(?s)4 problems.*missing: model.norm.weight \[32\]"
        r".*wrong dtype: model.layers.0.mlp.up_proj"
        r".*wrong shape: model.layers.1.self_attn.q_proj.weight is \[64, 31\].*\[64, 32\]",
    ),
    "NaN": (
        change_weights(not_a_number),
        r"NaN or infinity in 1 tensors: model.layers.1.mlp.up_proj.weight\. Weights must",
    ),
    "untied in truth": (
        change_weights(other_head),
        "lm_head.weight differs from model.embed_tokens",
    ),
    "truncated": (truncate, "is not a whole safetensors file.*Download or export the model again"),
    "half a header": (half_header, "is not a whole safetensors file"),
    "pickle": (pickled, r"pickles \['pytorch_model.bin'\], which run code.*safetensors only"),
    "no weights": (no_weights, "neither model.safetensors nor model.safetensors.index.json"),
    "missing shard": (
        shards(lose_shard),
        r"lacks 1 of the 13 files in its index: \['model-00002-of-00013.safetensors'\]",
    ),
    "index outside": (shards(index_outside), r"points to \['../other/model.safetensors'\]"),
    "stale index": (shards(index_of_other_export), r"1 tensors that its files do not.*gone.weight"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_directories_are_refused_with_the_reason(case, tmp_path):
    change, message = REFUSED[case]
    change(tiny_models.write(tmp_path, TIED))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        hf.load(tmp_path)


def test_unused_is_named_beside_the_rest(tmp_path):
    change_weights(several)(tiny_models.write(tmp_path, TIED))
    with pytest.raises(ValueError, match=r"unused: extra.bias \[3\]"):
        hf.load(tmp_path)


def renamed(change):
    """Every tensor under another name: a checkpoint of another layout."""

    def apply(weights):
        for key in list(weights):
            weights[change(key)] = weights.pop(key)

    return apply


LAYOUTS = {
    "prefixed": lambda key: f"language_model.{key}",
    "without model.": lambda key: key.removeprefix("model."),
    "other layer names": lambda key: key.replace("self_attn.", "attn.").replace("mlp.", "ff."),
    "hidden in a module": lambda key: key.replace("layers.", "layers.module."),
    "every tensor its own name": lambda key: key.replace("layers.", "block_"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", ["dense", "moe"])
def test_a_checkpoint_of_another_layout_is_refused_in_one_screen(layout, size, tmp_path):
    raw = {
        "dense": tiny_models.BASE | dict(num_hidden_layers=28),
        "moe": MOE | dict(num_hidden_layers=12, num_experts=32, mlp_only_layers=[]),
    }[size]
    tiny_models.write(tmp_path, raw)
    change_weights(renamed(LAYOUTS[layout]))(tmp_path)
    with pytest.raises(ValueError) as caught:
        hf.load(tmp_path)
    first, *lines = str(caught.value).splitlines()
    names = tiny_models.tensors(raw)
    wrong = sum(LAYOUTS[layout](key) != key for key in names)
    assert f"({2 * wrong} problems)" in first
    assert len(lines) <= 19
    layers = raw["num_hidden_layers"]
    missing = [line.strip() for line in lines if line.startswith("  missing: ")]
    if layout != "other layer names":
        assert f"missing: model.layers.N.input_layernorm.weight [32], {layers} tensors" in missing
    assert f"missing: model.layers.N.self_attn.q_norm.weight [16], {layers} tensors" in missing
    assert any(line.startswith("  unused: ") for line in lines)


def test_tensors_share_a_line_only_if_numbers_alone_tell_them_apart():
    pairs = [
        ("a.0.w", " [2]"),
        ("a.1.w", " [2]"),
        ("a.2.w", " [3]"),
        ("a.10.b", " [2]"),
        ("a2.0.w", " [2]"),
        ("a.0.e.3.w", ""),
        ("a.1.e.7.w", ""),
        ("v2", ""),
        ("v3", ""),
        ("head", ""),
    ]
    assert hf_files.by_pattern(pairs) == [
        "a.N.w [2], 2 tensors",
        "a.2.w [3]",
        "a.10.b [2]",
        "a2.0.w [2]",
        "a.N.e.N.w, 2 tensors",
        "v2",
        "v3",
        "head",
    ]


def test_a_tied_head_stored_twice_is_accepted(tmp_path):
    """Qwen3-0.6B and 1.7B are published so."""
    tiny_models.write(tmp_path, TIED)
    _, params = hf.load(tmp_path)

    def twice(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()

    change_weights(twice)(tmp_path)
    assert_same(hf.load(tmp_path)[1], params)


def test_mixed_dtypes_take_the_wider(tmp_path):
    def mix(weights):
        key = "model.layers.1.mlp.up_proj.weight"
        weights[key] = weights[key].astype(ml_dtypes.bfloat16)

    change_weights(mix)(tiny_models.write(tmp_path, TIED))
    assert hf.load(tmp_path)[1]["layers"]["mlp"]["up_proj"].dtype == jnp.float32


# ---- a failed save ----


def contents(directory):
    return {p.name: p.read_bytes() for p in pathlib.Path(directory).rglob("*") if p.is_file()}


@pytest.mark.parametrize("fails", ["save_file", "_write_extras"])
def test_a_failed_save_leaves_what_was_there(fails, tmp_path, monkeypatch):
    config, params = hf.load(tiny_models.write(tmp_path / "model", TIED))
    before = contents(tmp_path)

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(hf, fails, full)
    with pytest.raises(OSError, match="No space left"):
        hf.save(config, jax.tree.map(lambda x: x + 1, params), tmp_path / "model")
    assert contents(tmp_path) == before  # nothing temporary either


def test_save_replaces_a_model_but_nothing_else(tmp_path):
    config, params = hf.load(tiny_models.write(tmp_path / "model", TIED))
    hf.save(config, params, tmp_path / "model", max_shard_bytes=10_000)
    assert not (tmp_path / "model" / "model.safetensors").exists()  # the old file is gone
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("years")
    with pytest.raises(FileExistsError, match="holds no model: it would be replaced"):
        hf.save(config, params, tmp_path / "work")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_save_refuses_params_of_another_config(tmp_path):
    config, params = hf.load(tiny_models.write(tmp_path / "model", TIED))
    params = params | dict(head=params["embed"], final_norm=params["final_norm"][:-1])
    with pytest.raises(ValueError, match=r"(?s)unused: head.*wrong shape: final_norm is \(31,\)"):
        hf.save(config, params, tmp_path / "saved")


# ---- names ----


def test_names_of_models(tmp_path):
    assert hf.resolve(str(tiny_models.write(tmp_path / "model", TIED))) == tmp_path / "model"
    with pytest.raises(ValueError, match=r"'embedded:nobody' is not in this package; it has \["):
        hf.resolve("embedded:nobody")
    with pytest.raises(FileNotFoundError, match="neither a directory here nor a hub id"):
        hf.resolve(str(tmp_path / "nothing" / "here"))


def test_a_hub_id_without_network_says_what_to_do(tmp_path, monkeypatch):
    import huggingface_hub

    tried = []

    def refuse(repo, revision, allow_patterns):
        tried.append((repo, revision))
        assert not any(re.search(r"bin|py\b|\*$|pt\b", pattern) for pattern in allow_patterns)
        raise huggingface_hub.errors.LocalEntryNotFoundError("Connection refused")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(hf.time, "sleep", lambda seconds: None)
    with pytest.raises(ConnectionError, match="hub cannot be reached.*hf download Qwen/Qwen3-0.6B"):
        hf.resolve("Qwen/Qwen3-0.6B@abc123")
    assert tried == [("Qwen/Qwen3-0.6B", "abc123")] * hf._HUB_TRIES


def test_remote_directories_are_read_and_written(tmp_path, monkeypatch):
    """A fake scheme: gs:// is a folder here."""
    real = hf.epath.Path

    def fake(path):
        return real(str(path).replace("gs://", f"{tmp_path}/bucket/"))

    monkeypatch.setattr(hf.epath, "Path", fake)
    monkeypatch.setattr(hf.Path, "home", lambda: tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    config, params = hf.load(tiny_models.write(tmp_path / "model", TIED))
    hf.save(config, params, "gs://run/model", max_shard_bytes=10_000)
    again, same = hf.load(hf.resolve("gs://run/model"))
    assert again == config
    assert_same(params, same)
