# SPDX-License-Identifier: Apache-2.0
"""Measurements of every stage: `python -m launch.bench --case=...` (see __main__.py).

What was tried for decoding, not kept unless it says so (8 rows, width 256, V = 151,936, one thread
of a two-core cloud CPU, milliseconds; a plain head takes 18.7, sampling as it then was 2.2):

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
  passes    reductions over blocks kept apart from those inside them, and the shifted logits taken
            twice instead of stored: 0.67 of the time of sampling, 0.94 of a token step (kept)
  sampling  two rows at a time, so that a cache holds them: 0.82, but 1.1 at V = 4,096; with the
            passes above no gain

Later, the same sizes, as shares of the time of a plain head, calls in turns:

  head      as the left-hand side of the product, which is not packed: 0.90, and 0.38 where a cache
            holds it, but 1.1 of a whole token step; with ten rows, twice the kernel's five, 1.08;
            by Eigen instead of YNN 2.9, [D, V] by Eigen 1.14
            in blocks of columns [D, 512], scanned, 0.91, as a batch of [D, 256] 0.92, which would
            be a second head to make at every step; each block read ahead by a sum 1.05; four tokens
            to a row of [V / 4, 4 D], so that a row is a page, 1.01; XNN, oneDNN or wider vectors
            asked for by flag: the same program; weights in pages of 2 MiB 0.98 to 1.02
  head      in blocks of rows of 512 KiB, copied to the cache and read there unpacked: 0.95 to 0.98
            of a token step, and 0.82 to 0.88 where a block's rows come from four places (kept;
            from two 0.95, eight 0.91, 384 KiB the same); the copy runs at the memory's rate, the
            product at the matmul's. 16 slots 0.80 to 0.93; V = 4,096 0.95. Not kept: for 32 slots
            in two parts 0.88, 64 in three 1.09, one 1.24; bf16 3.7; with two cores, over which XLA
            divides a matmul, the head alone 1.3 to 1.8, and on one core 1,024 wide 0.99 (both
            beside other jobs)
  scores    computed with columns first, then turned: 0.97 of a token step at V = 4,096, but the
            barrier that this takes stands in the way of training

And for the update (8 rows of 128 tokens, both heads; seconds unless it says otherwise):

  loss      a chunk's passes from memory 10.7, as many tokens at a time as the cache holds 7.6
            (kept); 2^16 to 2^21 logits at a time 8.0, 7.8, 7.6, 7.3, 8.6, 8.8; V = 4,096 0.188
            and 0.177. The sampled objective 6.0 and 5.8, V = 4,096 0.117 and 0.119
  layers    unrolled 0.75 against 0.97, V = 4,096 (kept on a CPU)
  rotation  cosines kept in a table, one multiply-add with the halves rolled; attention as products
            of [R x L, C] matrices: 0.87 of a trunk's forward and backward, 0.90 of the teacher's
            forward, 0.82 of a token step at V = 4,096 (kept)
  teacher   layers each on their own: 0.90 of its forward (kept on a CPU)
  chunk     256 tokens for 128: 0.9 x with everything supervised and 0.3 GiB more; at 25 and 13 %
            no difference was seen, though a line's last chunk is rounded up to 1.2 x the slots
  heap      kept between steps (MALLOC_MMAP_MAX_=0, no trimming): no faster, V = 4,096
"""
