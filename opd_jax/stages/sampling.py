# SPDX-License-Identifier: Apache-2.0
"""One token per row from logits: an exact draw, its log-probability, top-K candidates, entropy.

The draw inverts the cumulative distribution at two levels, first over blocks of tokens and then
inside the chosen block, so it reads the logits a few times instead of drawing V random numbers.
Both levels sum integers: float32 cannot hold a running sum near 1 and a token of probability 1e-9
at once, integers add without rounding, and a weight of zero has a range of width zero that no
uniform can hit.

Order of the filters: temperature, top-k, top-p among what top-k kept, min-p against the likeliest
token. Each is compiled only when it is on. Tokens that tie with the last one kept are kept too.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from opd_jax.settings import Section, number

COLDEST = 1e-3  # temperature
BLOCK = 128  # tokens; one lane row of a TPU, and 151,936 is a multiple of it


@dataclasses.dataclass(frozen=True)
class Knobs(Section):
    """What the student's distribution goes through before the draw. The defaults change nothing."""

    section = "rollout"

    temperature: float = number(1.0, least=0)  # 0: the likeliest token, always
    top_k: int = number(0, least=0)  # tokens; 0: off
    top_p: float = number(1.0, above=0, most=1)  # probability; 1: off
    min_p: float = number(0.0, least=0, below=1)  # share of the likeliest's probability; 0: off

    def __post_init__(self) -> None:
        super().__post_init__()
        good = self.temperature == 0 or self.temperature >= COLDEST
        must = f"0 (greedy) or at least {COLDEST}: logits divided by less overflow float32"
        self.require(good, "temperature", must, 1.0)

    @property
    def filters(self) -> bool:
        return bool(self.top_k or self.top_p < 1 or self.min_p)


class Sample(NamedTuple):
    """One drawn token per row. Where `finite_b` is False every other field is zero."""

    token_b: jax.Array  # int32[B]
    logp_b: jax.Array  # float32[B], nats, of the distribution actually sampled; 0 when greedy
    candidates_bk: jax.Array  # int32[B, K], best first, ties by smaller id
    candidate_logp_bk: jax.Array  # float32[B, K], nats, temperature 1, unfiltered
    entropy_b: jax.Array  # float32[B], nats, temperature 1, unfiltered
    finite_b: jax.Array  # bool[B], False = the logits held a NaN, a +inf, or no finite value


def sample(
    logits_bv: jax.Array,
    bits_b2: jax.Array,
    knobs: Knobs,
    *,
    num_candidates: int,
    vocab_size: int | None = None,
) -> Sample:
    """Draws one token per row from softmax(logits / temperature), filtered as `knobs` says.

    Args:
      logits_bv: float[B, V]. -inf forbids a token.
      bits_b2: uint32[B, 2], uniform random bits: one word chooses the block, one the token in it.
      knobs: static.
      num_candidates: static, K.
      vocab_size: static, number of real tokens; columns from there on are padding of the head and
        count for nothing. None = all V.
    """
    vocab_size = logits_bv.shape[1] if vocab_size is None else vocab_size
    if not 0 < num_candidates <= vocab_size:
        raise ValueError(
            f"num_candidates={num_candidates} must be 1 to {vocab_size}, the tokens "
            f"in the vocabulary. Set --config.rollout.num_candidates={min(4, vocab_size)}."
        )
    blocks_bnm = _blocks(logits_bv, vocab_size)
    num_columns = blocks_bnm.shape[1] * BLOCK
    flat_bv = blocks_bnm.reshape(-1, num_columns)

    best_bn = _apart(jnp.max(blocks_bnm, axis=-1))  # NaN where any token of the block is NaN
    best_b = jnp.max(best_bn, axis=-1)
    finite_b = jnp.isfinite(best_b)
    best_b = jnp.where(finite_b, best_b, 0.0)

    weight_bnm = jnp.exp(blocks_bnm - best_b[:, None, None])
    mass_bn = _apart(jnp.sum(weight_bnm, axis=-1))
    mass_b = jnp.sum(mass_bn, axis=-1)
    shifted_bnm = blocks_bnm - _apart(best_b)[:, None, None]  # taken again, not kept for two uses
    # A forbidden token adds 0 * -1e4 to the entropy: 0 * -inf would be NaN.
    product_bn = _apart(jnp.sum(weight_bnm * jnp.maximum(shifted_bnm, -1e4), axis=-1))
    log_mass_b = jnp.log(mass_b)
    entropy_b = log_mass_b - jnp.sum(product_bn, axis=-1) / mass_b

    value_bk, candidates_bk = _top_k(blocks_bnm, best_bn, num_candidates)
    candidate_logp_bk = value_bk - (best_b + log_mass_b)[:, None]

    if knobs.temperature == 0:
        token_b, logp_b = candidates_bk[:, 0], jnp.zeros_like(best_b)
    else:
        if knobs.temperature != 1 or knobs.filters:
            shifted_bnm = _filtered(shifted_bnm / knobs.temperature, knobs)
            mass_bn = jnp.sum(jnp.exp(shifted_bnm), axis=-1)
            flat_bv = shifted_bnm.reshape(-1, num_columns)
            best_b, log_mass_b = jnp.zeros_like(best_b), jnp.log(jnp.sum(mass_bn, axis=-1))
        token_b, logit_b = _draw(flat_bv, best_b, mass_bn, bits_b2)
        logp_b = logit_b - best_b - log_mass_b

    drawn = Sample(token_b, logp_b, candidates_bk, candidate_logp_bk, entropy_b, finite_b)
    return Sample(*(_keep(finite_b, x) for x in drawn[:-1]), finite_b)


def draw_index(weight_bn: jax.Array, bits_b: jax.Array) -> jax.Array:
    """Index n of each row with probability weight[n] / sum(weight), by inversion.

    Exact to 2^-31 of the row's sum beside the float32 rounding of the weights themselves; a weight
    of zero (or below 2^-32 of the sum) is never drawn. Fewer than 2^20 weights a row.

    Args:
      weight_bn: float32[B, N], not negative, finite, sum above zero.
      bits_b: uint32[B], uniform.

    Returns:
      int32[B].
    """
    total_b = jnp.sum(weight_bn, axis=-1, keepdims=True)
    # At most 2^31 in all: the other half of the range is room for the rounding of `total_b`.
    width_bn = jnp.round(weight_bn * (2.0**31 / total_b)).astype(jnp.uint32)
    end_bn = jnp.cumsum(width_bn, axis=-1, dtype=jnp.uint32)
    target_b = _multiply_high(bits_b, end_bn[:, -1])  # < end: lies in no range of width zero
    return jnp.sum(end_bn <= target_b[:, None], axis=-1, dtype=jnp.int32)


def _multiply_high(a: jax.Array, b: jax.Array) -> jax.Array:
    """floor(a * b / 2^32) of uint32 values, in 16-bit halves because 64-bit integers are off."""
    a_high, a_low, b_high, b_low = a >> 16, a & 0xFFFF, b >> 16, b & 0xFFFF
    middle = a_high * b_low + (a_low * b_low >> 16)
    carry = (middle & 0xFFFF) + a_low * b_high
    return a_high * b_high + (middle >> 16) + (carry >> 16)


def _draw(flat_bv, best_b, mass_bn, bits_b2):
    """Token of each row and its entry in `flat_bv`; mass_bn is each block's sum of exp."""
    block_b = draw_index(mass_bn, bits_b2[:, 0])
    columns_bm = block_b[:, None] * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)[None]
    inside_bm = jnp.take_along_axis(flat_bv, columns_bm, axis=1)
    # Against the block's own maximum: a block of tiny tokens must not underflow on its own.
    weight_bm = jnp.exp(inside_bm - jnp.max(inside_bm, axis=-1, keepdims=True))
    offset_b = draw_index(weight_bm, bits_b2[:, 1])
    logit_b = jnp.take_along_axis(inside_bm, offset_b[:, None], axis=1)[:, 0]
    return block_b * BLOCK + offset_b, logit_b


def _top_k(blocks_bnm, best_bn, k):
    """`jax.lax.top_k` of the flat logits, ids and tie order included, from the k best blocks.

    The k best tokens lie in the k best blocks; of blocks that tie, the earlier has smaller ids.
    """
    _, block_bk = jax.lax.top_k(best_bn, min(k, blocks_bnm.shape[1]))
    block_bk = jnp.sort(block_bk, axis=-1)  # earlier blocks first: top_k breaks ties by position
    values_bkm = jnp.take_along_axis(blocks_bnm, block_bk[:, :, None], axis=1)
    value_bk, place_bk = jax.lax.top_k(values_bkm.reshape(values_bkm.shape[0], -1), k)
    block_of_bk = jnp.take_along_axis(block_bk, place_bk // BLOCK, axis=1)
    return value_bk, block_of_bk * BLOCK + place_bk % BLOCK


def _blocks(logits_bv, vocab_size):
    """float32[B, N, BLOCK] with -inf in every column that is not a real token."""
    B, V = logits_bv.shape
    logits_bv = logits_bv.astype(jnp.float32)
    if vocab_size < V:
        logits_bv = jnp.where(jnp.arange(V)[None] < vocab_size, logits_bv, -jnp.inf)
    logits_bv = jnp.pad(logits_bv, ((0, 0), (0, -V % BLOCK)), constant_values=-jnp.inf)
    return logits_bv.reshape(B, -1, BLOCK)


def _filtered(scaled_bnm, knobs):
    """Logits with -inf for every token that a filter drops. Each row's largest must be 0."""
    if knobs.top_k:
        ones = jnp.ones_like(scaled_bnm)
        scaled_bnm = _keep_largest(scaled_bnm, ones, jnp.full(scaled_bnm.shape[0], knobs.top_k))
    if knobs.top_p < 1:
        weight_bnm = jnp.exp(scaled_bnm)
        need_b = knobs.top_p * jnp.sum(weight_bnm, axis=(-2, -1))
        scaled_bnm = _keep_largest(scaled_bnm, weight_bnm, need_b)
    if knobs.min_p:
        scaled_bnm = jnp.where(scaled_bnm >= jnp.log(knobs.min_p), scaled_bnm, -jnp.inf)
    return scaled_bnm


def _keep_largest(value_bnm, weight_bnm, need_b):
    """Keeps the fewest largest values whose weights reach `need_b`, ties kept; others become -inf.

    Finds the threshold bit by bit (32 passes of a sum, no sort: sums also work when the vocabulary
    is sharded).
    """
    bits = jax.lax.bitcast_convert_type(value_bnm, jnp.uint32)
    # Order-preserving: flip every bit of a negative number, the sign bit of the others.
    sign = jnp.uint32(1 << 31)
    order_bnm = jnp.where(bits >= sign, ~bits, bits | sign)

    def set_bit(i, threshold_b):
        trial_b = threshold_b | (sign >> jnp.uint32(i))
        above_bnm = order_bnm >= trial_b[:, None, None]
        reached_b = jnp.sum(jnp.where(above_bnm, weight_bnm, 0.0), axis=(-2, -1)) >= need_b
        return jnp.where(reached_b, trial_b, threshold_b)

    threshold_b = jax.lax.fori_loop(0, 32, set_bit, jnp.zeros(need_b.shape, jnp.uint32))
    return jnp.where(order_bnm >= threshold_b[:, None, None], value_bnm, -jnp.inf)


def _apart(x):
    """`x`, computed by itself: XLA would join a sum over blocks to the sums inside them and read
    all of V once more, and would write a difference of V numbers down because two sums read it."""
    return jax.lax.optimization_barrier(x)


def _keep(finite_b, x):
    return jnp.where(finite_b.reshape((-1,) + (1,) * (x.ndim - 1)), x, jnp.zeros_like(x))
