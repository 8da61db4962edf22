# SPDX-License-Identifier: Apache-2.0
"""The shape of a Qwen3 model, read from and written to Hugging Face's config.json.

Two dialects of config.json exist. Published files say `rope_theta`, `rope_scaling`, `torch_dtype`,
`num_experts`; transformers 5 writes `rope_parameters`, `dtype`, `num_local_experts`. We read both
and refuse what we do not compute: a key we ignored would be a model that is silently another one.
"""

import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from typing import Any

from etils import epath

ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
_ROPE_KEYS = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"}
_MAX_SIZE = 2**31 - 1  # an index of an array
_MAX_POSITIONS = 32768  # max_position_embeddings where the file has none
# Key -> the largest whole number it may hold, from 1 on. Layers and experts are enumerated.
_SIZES = dict.fromkeys(
    (
        *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim"),
        *("num_key_value_heads", "max_position_embeddings", "moe_intermediate_size"),
        *("num_experts_per_tok", "decoder_sparse_step", "original_max_position_embeddings"),
    ),
    _MAX_SIZE,
) | dict(num_hidden_layers=1024, num_experts=4096, num_local_experts=4096)
_POSITIVE = {"rms_norm_eps", "rope_theta", "factor", "attention_factor", "beta_fast", "beta_slow"}
_POSITIVE |= {"mscale", "mscale_all_dim", "partial_rotary_factor"}
_BOOLS = {"tie_word_embeddings", "norm_topk_prob", "truncate", "use_sliding_window"}
_BOOLS |= {"attention_bias"}
_TEXTS = {"model_type", "hidden_act", "rope_type", "type"}
_YARN_KEYS = {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}


@dataclass(frozen=True)
class YaRN:
    """Rotary frequencies stretched for contexts beyond those of training (arXiv 2309.00071)."""

    factor: float
    original_max_positions: int
    attention_factor: float | None = None  # None: 0.1 ln(factor) + 1
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # round the ramp's two ends to whole dimensions

    @property
    def scale(self) -> float:
        """Factor on cos and sin, so that attention logits sharpen as the context grows."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1.0 else 1.0


@dataclass(frozen=True)
class Qwen3Config:
    """What decides the parameters' shapes and the function they compute. A static argument."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of a dense layer's MLP
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # not hidden_size / num_heads: 128 in every published size
    rope_theta: float = 1_000_000.0
    rope_scaling: YaRN | None = None
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = False
    max_positions: int = 40960
    num_experts: int = 0  # 0: dense
    num_experts_per_token: int = 0
    moe_intermediate_size: int = 0  # of one expert
    norm_topk_prob: bool = False  # True: the chosen experts' weights sum to 1
    decoder_sparse_step: int = 1  # every n-th layer is sparse
    mlp_only_layers: tuple[int, ...] = ()  # these are dense all the same

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_heads} does not divide by "
                f"num_key_value_heads={self.num_kv_heads}: every key/value head serves the same "
                "number of query heads. Correct config.json."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} must be even: rotary embedding turns pairs."
            )
        if self.num_experts and not 0 < self.num_experts_per_token <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_token} must lie in 1..num_experts="
                f"{self.num_experts}. Correct config.json."
            )

    @property
    def sparse_layers(self) -> tuple[bool, ...]:
        """Per layer, True = mixture of experts."""
        return tuple(
            self.num_experts > 0
            and i not in self.mlp_only_layers
            and (i + 1) % self.decoder_sparse_step == 0
            for i in range(self.num_layers)
        )

    @property
    def context(self) -> int:
        """Tokens of the longest row that the model is made for; YaRN says it by its factor."""
        yarn = self.rope_scaling
        stretched = int(yarn.factor * yarn.original_max_positions) if yarn else 0
        return max(self.max_positions, stretched)

    @classmethod
    def from_hf(cls, directory) -> "Qwen3Config":
        """Reads DIRECTORY/config.json. Raises once, naming everything we cannot compute."""
        path = epath.Path(directory) / "config.json"
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist: a model directory holds config.json, *.safetensors and "
                "tokenizer files. Check the path, or download the model again."
            )
        try:
            raw = json.loads(path.read_text())
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} is not JSON ({error}); download or export the model again."
            ) from error
        return from_dict(raw, str(path))

    def to_hf(self) -> dict[str, Any]:
        """config.json that both dialects' readers (transformers 4 and 5, vLLM) understand."""
        kind = "qwen3_moe" if self.num_experts else "qwen3"
        raw = dict(
            architectures=[ARCHITECTURES[kind]],
            model_type=kind,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            hidden_act="silu",
            max_position_embeddings=self.max_positions,
            rms_norm_eps=self.rms_norm_eps,
            tie_word_embeddings=self.tie_embeddings,
            attention_bias=False,
            attention_dropout=0.0,
            use_sliding_window=False,
            sliding_window=None,
            initializer_range=0.02,
            use_cache=True,
            rope_theta=self.rope_theta,
            rope_scaling=_yarn_to_hf(self.rope_scaling),
        )
        rope = dict(rope_theta=self.rope_theta, rope_type="default")
        raw["rope_parameters"] = rope | (_yarn_to_hf(self.rope_scaling) or {})
        if self.num_experts:
            raw |= dict(
                num_experts=self.num_experts,
                num_experts_per_tok=self.num_experts_per_token,
                moe_intermediate_size=self.moe_intermediate_size,
                norm_topk_prob=self.norm_topk_prob,
                decoder_sparse_step=self.decoder_sparse_step,
                mlp_only_layers=list(self.mlp_only_layers),
            )
        return raw


def check_context(
    config: Qwen3Config,
    prompt_len: int,
    response_len: int,
    name: str,
    prefixes: tuple[str, str] = ("config.data.", "config.rollout."),
) -> None:
    """Raises ValueError, with flags that work, unless a prompt and its response fit the context.

    Args:
      name: of the model in the message: "student", a path.
      prefixes: of the flags --{}prompt_len and --{}response_len.
    """
    row, limit = prompt_len + response_len, config.context
    if row <= limit:
        return
    prompt_flag, response_flag = (
        f"--{prefix}{key}_len" for prefix, key in zip(prefixes, ("prompt", "response"), strict=True)
    )
    if prompt_len < limit:
        shorter = f"{response_flag}={limit - prompt_len}"
    else:
        shorter = f"{prompt_flag}={limit // 2} {response_flag}={limit - limit // 2}"
    yarn = config.rope_scaling
    original = yarn.original_max_positions if yarn else config.max_positions
    scaling = dict(
        rope_type="yarn",
        factor=float(math.ceil(row / original)),
        original_max_position_embeddings=original,
    )
    raise ValueError(
        f"{prompt_flag}={prompt_len} and {response_flag}={response_len} make rows of {row} tokens, "
        f"and the {name} is made for {limit} (max_position_embeddings in its config.json): beyond "
        f"them its output has no meaning. Set {shorter}, or stretch the model by YaRN: write "
        f'"rope_scaling": {json.dumps(scaling)} into its config.json, with the length that it was '
        "trained on as original_max_position_embeddings (32768 for the first Qwen3)"
    )


def from_dict(raw: dict[str, Any], where: str) -> Qwen3Config:
    """Parsed config.json -> Qwen3Config; `where` names the file in errors."""
    if problems := _mistyped(raw):
        raise ValueError(
            f"{where} is not a model's config ({'; '.join(problems)}). Correct it, or download or "
            "export the model again."
        )
    try:
        return _from_typed(raw, where)
    except ValueError as error:  # of a combination of values
        raise ValueError(error if where in str(error) else f"{where}: {error}") from None


def _mistyped(raw: Any) -> list[str]:
    """What of a config.json no model can have, whatever its kind."""
    if not isinstance(raw, dict):
        return [f"it must hold an object, this is {_shown(raw)}"]
    problems = []
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(raw.get(key), dict):
            problems += _mistyped_values(raw[key])
        elif raw.get(key) is not None:
            problems.append(f"{key} must be an object or null, this is {_shown(raw[key])}")
    for key, kind in (("layer_types", str), ("mlp_only_layers", int)):
        value = raw.get(key) or []
        if not isinstance(value, list) or not all(isinstance(x, kind) for x in value):
            problems.append(f"{key} must be a list of {kind.__name__}, this is {_shown(value)}")
    return problems + _mistyped_values(raw)


def _mistyped_values(values: dict[str, Any]) -> list[str]:
    """`_mistyped` of the single values that we read; null stands for a missing one."""
    problems = []
    for key, value in values.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        number = (whole or isinstance(value, float)) and 0 < value <= sys.float_info.max
        if value is None:
            continue
        if key in _SIZES and not (whole and 1 <= value <= _SIZES[key]):
            problems.append(f"{key} must be 1 to {_SIZES[key]}, this is {_shown(value)}")
        elif key in _POSITIVE and not number:
            problems.append(f"{key} must be a positive number, this is {_shown(value)}")
        elif key in _BOOLS and not isinstance(value, bool):
            problems.append(f"{key} must be true or false, this is {_shown(value)}")
        elif key in _TEXTS and not isinstance(value, str):
            problems.append(f"{key} must be text, this is {_shown(value)}")
    return problems


def _shown(value: Any) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _from_typed(raw: dict[str, Any], where: str) -> Qwen3Config:
    raw = {key: value for key, value in raw.items() if value is not None}
    problems = _unsupported(raw)
    scaling, rope_theta, rope_problems = _rope(raw)
    problems += rope_problems
    needed = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    problems += [f"{key} is missing" for key in needed if raw.get(key) is None]
    if problems:
        raise ValueError(
            f"{where} describes a model we do not compute:\n  " + "\n  ".join(problems)
        )
    heads = raw["num_attention_heads"]
    config = Qwen3Config(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        rope_theta=float(rope_theta),
        rope_scaling=scaling,
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        max_positions=raw.get("max_position_embeddings", _MAX_POSITIONS),
    )
    if raw["model_type"] == "qwen3":
        return config
    return dataclasses.replace(
        config,
        num_experts=raw.get("num_experts") or raw.get("num_local_experts") or 128,
        num_experts_per_token=raw.get("num_experts_per_tok", 8),
        moe_intermediate_size=raw.get("moe_intermediate_size", 768),
        norm_topk_prob=bool(raw.get("norm_topk_prob", False)),
        decoder_sparse_step=raw.get("decoder_sparse_step", 1),
        mlp_only_layers=tuple(raw.get("mlp_only_layers") or ()),
    )


def _unsupported(raw: dict[str, Any]) -> list[str]:
    problems = []
    if raw.get("model_type") not in ARCHITECTURES:
        problems.append(
            f"model_type is {_shown(raw.get('model_type'))}; we compute {sorted(ARCHITECTURES)}: "
            "name a Qwen3 model"
        )
    if raw.get("use_sliding_window"):
        problems.append(
            "use_sliding_window is on; every layer here attends to the whole context: use a "
            "checkpoint with use_sliding_window=false"
        )
    others = sorted(set(raw.get("layer_types") or ()) - {"full_attention"})
    if others:
        problems.append(
            f"layer_types holds {', '.join(others)}; we compute 'full_attention': use another "
            "checkpoint"
        )
    if raw.get("attention_bias"):
        problems.append(
            "attention_bias is true; Qwen3 projections have no bias: use another checkpoint"
        )
    if raw.get("hidden_act", "silu") != "silu":
        problems.append(
            f"hidden_act is {_shown(raw['hidden_act'])}; we compute 'silu': use another checkpoint"
        )
    if raw.get("quantization_config"):
        problems.append(
            "quantization_config is set; we read bf16, f16 and f32: name the unquantised model"
        )
    return problems


def _rope(raw: dict[str, Any]) -> tuple[YaRN | None, float, list[str]]:
    """Rotary settings of either dialect -> (scaling or None, base, problems).

    Where both places are filled, `rope_scaling` replaces `rope_parameters` whole, with its base:
    transformers 5 reads them so, and Qwen3's documentation says to add the former.
    """
    rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    # The published dialect has the base at the top level; a class default would be a silently wrong
    # model.
    theta = rope.get("rope_theta", raw.get("rope_theta"))
    kind = rope.get("rope_type", rope.get("type", "default"))
    problems = []
    if theta is None:
        problems.append(
            "rope_theta is missing (neither at the top level nor in the rope settings that count: "
            "rope_scaling if it is there, else rope_parameters): add it"
        )
        theta = 0.0
    if raw.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(
            f"partial_rotary_factor is {_shown(raw['partial_rotary_factor'])}; we rotate whole "
            "heads, as Qwen3 does: use another checkpoint"
        )
    if kind not in ("default", "yarn"):
        problems.append(
            f"rope_type is {_shown(kind)}; we compute 'default' and 'yarn': use another checkpoint"
        )
        return None, theta, problems
    unknown = sorted(set(rope) - _ROPE_KEYS - (_YARN_KEYS if kind == "yarn" else set()))
    if unknown:
        problems.append(
            f"rope settings {unknown} of rope_type {kind!r} are unknown to us: remove them"
        )
    if kind == "default":
        return None, theta, problems
    yarn, yarn_problems = _yarn(raw, rope)
    return yarn, theta, problems + yarn_problems


def _yarn(raw: dict[str, Any], rope: dict[str, Any]) -> tuple[YaRN | None, list[str]]:
    """`rope`, the settings that count of the file `raw`, with transformers' defaults."""
    original = rope.get("original_max_position_embeddings")
    outside = raw.get("original_max_position_embeddings")
    if None not in (original, outside) and original != outside:
        return None, [
            f"original_max_position_embeddings is {outside} at the top level and {original} in "
            "the rope settings: remove the wrong one"
        ]
    longest = raw.get("max_position_embeddings", _MAX_POSITIONS)
    original = original or outside or longest
    if "factor" not in rope:
        return None, ["rope_type 'yarn' without a factor: add it (4.0 in Qwen3's documentation)"]
    factor = float(longest / original if rope["factor"] is None else rope["factor"])
    return YaRN(
        factor=factor,
        original_max_positions=original,
        attention_factor=_yarn_attention_factor(rope, factor),
        beta_fast=float(rope.get("beta_fast") or 32.0),
        beta_slow=float(rope.get("beta_slow") or 1.0),
        truncate=bool(rope.get("truncate", True)),
    ), []


def _yarn_attention_factor(rope: dict[str, Any], factor: float) -> float | None:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim") and factor > 1.0:
        log = 0.1 * math.log(factor)
        return (rope["mscale"] * log + 1.0) / (rope["mscale_all_dim"] * log + 1.0)
    return None


def _yarn_to_hf(scaling: YaRN | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    raw = dict(
        rope_type="yarn",
        factor=scaling.factor,
        original_max_position_embeddings=scaling.original_max_positions,
    )
    for name in ("attention_factor", "beta_fast", "beta_slow", "truncate"):
        value = getattr(scaling, name)
        if value != YaRN.__dataclass_fields__[name].default:  # readers disagree on which they know
            raw[name] = value
    return raw
