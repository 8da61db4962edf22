# SPDX-License-Identifier: Apache-2.0
"""Every key once, with its unit and meaning. Experiments start from `get_config()` and change keys.

Not a runnable experiment by itself: see quickstart.py, study.py and paper.py. Any key can be set by
flag: `--config.selector.kind=full`. A flag cannot set None, so 0 or "" mean "off" where it says so.
"""

import ml_collections as mlc


def get_config() -> mlc.ConfigDict:
    c = mlc.ConfigDict()
    c.seed = 0  # everything random follows from it and the step
    c.num_steps = 100  # updates

    # Model directories (Hugging Face layout), hub ids, or "embedded:student" / "embedded:teacher".
    c.student = dict(path="embedded:student", param_dtype="float32")  # dtype that is trained
    c.teacher = dict(path="embedded:teacher", param_dtype="float32")  # dtype it is held in
    c.reference = dict(path="", param_dtype="float32")  # ExOPD's reference model; "" = none
    c.model = dict(
        compute_dtype="float32",  # of matmuls; norms, softmax and log-probs are always float32
        attention="xla",  # xla | splash (TPU, long rows) | cudnn (GPU)
        remat="none",  # what the backward pass recomputes: none | dots | layer
        unroll=-1,  # models of at most so many layers are not scanned; -1 = 8 on a CPU, else 0
    )
    c.contract_allow = ()  # student-teacher mismatches accepted by name (the error prints names)

    c.data = dict(
        source="embedded",  # "embedded", or a JSONL file of {"prompt", "answer"} / {"messages"}
        batch_size=32,  # prompts per step, over all hosts
        prompt_len=64,  # tokens, template included
        too_long="raise",  # a prompt over prompt_len: raise | drop
        on_error="raise",  # a bad JSONL line: raise | skip (counted)
        thinking=False,  # the chat template's thinking mode
    )
    c.rollout = dict(
        by="student",  # student | teacher: teacher's samples, for objective.kind=cross_entropy
        response_len=192,  # tokens at most, EOS included
        temperature=1.0,  # the loss assumes 1; others must be allowed by name
        top_k=0,  # 0 = off
        top_p=1.0,  # 1 = off
        min_p=0.0,  # 0 = off
        num_candidates=4,  # K, the student's top-K tokens per position
        num_slots=0,  # rows decoded at once, over all hosts; 0 = batch_size
        decode_chunk=32,  # decode steps between two host checks
        first_cache=0,  # columns of the cache at first, doubled as rows outgrow it; 0 = all at once
        head_dtype="",  # of the head's weights while decoding; "" = compute_dtype
    )
    c.pack = dict(  # micro-batches of one compiled shape; the teacher pass uses it too
        micro_batch_rows=0,  # lines of a micro-batch, over all hosts; 0 = chosen by the sizes
        micro_batch_tokens=0,  # tokens of a line, >= prompt_len + response_len; 0 = chosen
        head_chunk=128,  # tokens whose logits exist at once
    )

    # What the release rule measures (opd_jax/algorithm/margin.py).
    c.margin = dict(
        kind="top1_top2",  # top1_top2 (the paper) | top1_mean | entropy | advantage_variance
        include_sampled=False,  # the sampled token joins the candidates
        temperature=1.0,  # divides both models' log-probs
    )
    # How a response is cut into segments (opd_jax/algorithm/segments.py).
    c.segment = dict(
        kind="nltk",  # nltk | nltk_newline | fixed_tokens | token
        punkt="embedded",  # embedded | punkt_tab (NLTK's download)
        fixed_tokens=32,  # tokens per segment of kind fixed_tokens
        max_tokens=0,  # longer segments are split; 0 = off
        num_workers=1,  # processes that segment while the teacher scores; 0 = in line
    )
    # What is supervised (opd_jax/algorithm/selectors.py). A key that the kind does not read keeps
    # its default, or is refused. What each kind is: docs/selectors.md.
    c.selector = dict(
        kind="bic",  # bic | full | fixed_prefix | fixed_fraction | suffix_only | shuffled_bic | ...
        # bic and its controls; the defaults are the paper's, or our reading where it is silent
        aggregate="mean",  # of a segment's margins: mean | median | trimmed
        trim=0.1,  # share cut from each end by trimmed
        transform="log1p",  # of the aggregate: log1p | none
        eps=1e-12,  # added to the residual sums of squares
        min_side=1,  # segments at least on each side of the change point; 2 or 3 cut noise less
        min_gain=0.0,  # nats of BIC that a release must gain
        min_drop=0.0,  # of the mean score, from before to after
        min_segments=2,  # rows with fewer are not released
        drop_inside_search=True,  # False: find the best change of either sign, reject a rise
        penalty_none=1.0,  # parameters of "no change", times log(segments)
        penalty_change=3.0,  # parameters of "one change", times log(segments)
        robust=False,  # winsorised and median-filtered scores, 6 segments and 3 per side at least
        on_no_change="full",  # a row without a change point: full | prefix (no_change_length)
        no_change_length=4096,  # tokens
        keep_eos=False,  # True: a released EOS stays supervised
        min_supervised_tokens=0,  # no release before this token
        tail_weight=0.0,  # of released tokens; 0 = the paper
        # the other kinds
        length=1024,  # fixed_prefix: tokens
        fraction=0.0,  # of the tokens (fixed_fraction, suffix_only, ta_opd, tip, entropy);
        # 0 = the kind's own default
        start_length=256,  # growing_prefix: tokens at the first step
        end_length=4096,  # growing_prefix: tokens at the last
        grow_steps=0,  # growing_prefix: steps from start to end; 0 = num_steps
        gamma=0.5,  # iw_opd: how much more the first token weighs than the last
    )
    # The loss on supervised tokens (opd_jax/algorithm/objective.py); a key that the kind does not
    # read keeps its default, or is refused.
    c.objective = dict(
        kind="sampled_pg",  # sampled_pg (the paper) | reverse_kl | forward_kl | jsd | cross_entropy
        support="full",  # of the divergences: full | student_k | teacher_k | union
        tail="bin",  # of supports other than full: bin | renormalise | truncate
        top_k=16,  # tokens of the teacher's support; the student's is rollout.num_candidates
        beta=0.5,  # of jsd
        stop_gradient=False,  # reverse_kl on a support: fixed advantages per candidate
        extrapolation=1.0,  # sampled_pg: ExOPD's lambda; other than 1 needs reference.path
        advantage_clip=0.0,  # sampled_pg: |A| is cut to this, nats; 0 = off
        advantage_floor=0.0,  # sampled_pg: A is raised to this negative value; 0 = off
        is_threshold=0.0,  # sampled_pg: cap of the ratio trainer / sampler; 0 = no correction
        aggregate="row_mean",  # row_mean | token_mean
        rescale="sequence",  # loss mass kept: per sequence (the paper) | batch | none
        max_rescale=0.0,  # cap of that factor; 0 = off
    )

    c.optim = dict(
        learning_rate=1e-5,
        warmup_steps=0,
        decay="constant",  # constant | cosine (to 0 at num_steps)
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.01,
        clip_norm=1.0,  # of the global gradient; 0 = off
        max_skipped=3,  # that many non-finite updates in a row stop the run
    )
    # Sizes multiply to the number of devices; -1 takes the rest.
    c.mesh = (("data", 1), ("fsdp", -1), ("tensor", 1), ("expert", 1))

    c.checkpoint = dict(every_steps=20, keep_last=2, keep_every_steps=0, keep_best=1)
    c.evaluate = dict(
        every_steps=20,  # 0 = only before the first and after the last update
        source="embedded",  # "embedded" (held-out problems), a JSONL file, or "" = no evaluation
        num_problems=250,  # held-out, in-domain, over all families
        num_ood_problems=50,  # of the embedded held-out family; 0 = none
        num_samples=1,  # responses per problem
        batch_size=64,  # responses sampled at once, over all hosts
        teacher=True,  # evaluate the teacher once, at the end, for the final table
    )
    c.log = dict(
        every_steps=1,  # terminal lines, where there is no progress bar
        signals_every_steps=1,  # teachability signals to WORKDIR/signals; 0 = off, and then the
        # teacher is asked for no more than selector and objective need
        rollouts_every_steps=20,  # whole trajectories to WORKDIR/rollouts; 0 = off
        num_rollouts=8,  # trajectories written each time
        tensorboard=True,  # event files under WORKDIR/tensorboard
    )
    return c
