# SPDX-License-Identifier: Apache-2.0
"""Measurements of every stage: `python -m launch.bench --case=...` (see __main__.py).

What was tried for decoding, not kept unless it says so (8 rows, width 256, V = 151,936, one thread
of a two-core cloud CPU, milliseconds; a plain head takes 18.7, sampling as it is now 2.2):

  draw      jax.random.categorical 38; a bare argmax 4.6
  top 4     jax.lax.top_k over the whole row 1.8, two levels 0.26
  entropy   with the normaliser in one variadic reduction 5.0, as two reductions 1.8
  blocks    of strided columns, so that sums run over a major axis: 0.66 against 0.63
  head      float32 [D, V] 21.9 (another CPU preferred it: 19.5 against 24.6); a scan over blocks of
            columns 18 to 28; the blocks as one batched product 100 to 190; multiply and sum
            without a matmul 22
  bf16 head [V, D] 84, [D, V] 7.9; with bf16 results instead of float32 87
  layers    unrolled, their weights and cache still in stacks: no faster than scanned (XLA copies
            each out of its stack at every token); with arrays of their own 3.2 against 4.0 without
            the head, the cache still copied, as it was read before it was written; written first,
            2.0 (kept: `Backend.unroll`). Keys stored [H, C] would make it 1.7
  query     sums of products in place of the two products of attention: 0.87 of the time where the
            cache is scanned (kept there), 1.05 to 1.1 where each layer has its own

And for the update (8 rows of 128 tokens, both heads; seconds unless it says otherwise):

  loss      a chunk's passes from memory 10.7, as many tokens at a time as the cache holds 7.6
            (kept); 2^16 to 2^21 logits at a time 8.0, 7.8, 7.6, 7.3, 8.6, 8.8; V = 4,096 0.188
            and 0.177. The sampled objective 6.0 and 5.8, V = 4,096 0.117 and 0.119
  layers    unrolled 0.75 against 0.97, V = 4,096 (kept on a CPU)
  chunk     256 tokens for 128: 0.9 x with everything supervised and 0.3 GiB more; at 25 and 13 %
            no difference was seen, though a line's last chunk is rounded up to 1.2 x the slots
  heap      kept between steps (MALLOC_MMAP_MAX_=0, no trimming): no faster, V = 4,096
"""
