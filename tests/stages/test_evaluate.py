# SPDX-License-Identifier: Apache-2.0
"""Evaluation: hand-computed figures, the same sampler and template as training, stable samples."""

import dataclasses

import jax
import numpy as np
import pytest

from opd_jax.model import hf, qwen3
from opd_jax.problems import task, verify
from opd_jax.problems.tokenizer import load_tokenizer
from opd_jax.stages import evaluate, rollout
from opd_jax.stages.prompts import PromptStream
from opd_jax.stages.prompts import Settings as Data

T = 10
EXAMPLES = task.make_many(task.IN_DOMAIN, "heldout", 0, 6)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(hf.resolve("embedded:student"))


@pytest.fixture(scope="module")
def model(tokenizer):
    config = qwen3.Qwen3Config(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        tie_embeddings=True,
    )
    return config, qwen3.init_params(config, jax.random.key(0))


@pytest.fixture(scope="module")
def evaluator(tokenizer, model, one_device_mesh):
    sampler = rollout.build(
        model[0],
        rollout.Settings(response_len=T, decode_chunk=4),
        tokenizer.vocabulary._replace(size=model[0].vocab_size),
        mesh=one_device_mesh,
    )
    with verify.Verifier() as verifier:
        yield evaluate.build(sampler, tokenizer, verifier, prompt_len=160, batch_size=4)


@pytest.fixture(scope="module")
def evaluated(evaluator, model):
    return evaluator(model[1], EXAMPLES, 2, jax.random.key(1), prefix="ood_")


def by_place(samples):
    return {(s["example_id"], s["index"]): s["response"] for s in samples}


def test_every_problem_gets_its_samples_with_what_a_reader_needs(evaluated):
    metrics, samples = evaluated
    assert len(samples) == len(by_place(samples)) == 2 * len(EXAMPLES)
    assert {s["family"] for s in samples} == {e.family for e in EXAMPLES}
    assert all(0 < s["num_tokens"] <= T and s["group"] == "ood" for s in samples)
    assert metrics["eval/ood_num_problems"] == len(EXAMPLES)
    assert metrics["eval/ood_truncation_rate"] == np.mean([not s["finished"] for s in samples])
    assert not [name for name in metrics if not name.startswith("eval/ood_")]
    responses = [s["response"] for s in samples]
    assert len(set(responses)) == len(responses)  # no two rows share a sampling key


def test_a_sample_keeps_its_text_whatever_is_sampled_beside_it(evaluator, evaluated, model):
    before = by_place(evaluated[1])
    alone = evaluator(model[1], EXAMPLES, 1, jax.random.key(1))[1]
    assert by_place(alone) == {k: v for k, v in before.items() if k[1] == 0}
    done = set(list(before)[:7])
    rest = list(evaluator.calls(model[1], EXAMPLES, 2, jax.random.key(1), done=done))
    assert by_place(rest[0]) == {k: v for k, v in before.items() if k not in done}


def test_an_evaluation_can_be_given_up_between_two_chunks(evaluator, model, monkeypatch):
    """Of three chunks of four tokens the second is the last; nothing is verified."""
    monkeypatch.setattr(verify.Verifier, "are_correct", lambda *_: pytest.fail("it went on"))
    chunks = []

    def between():
        chunks.append(len(chunks))
        if len(chunks) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluator(model[1], EXAMPLES[:4], 1, jax.random.key(1), between=between)
    assert chunks == [0, 1]


def test_what_has_no_answer_is_not_verified_and_what_shares_an_id_is_refused(evaluator, model):
    """Both were reported: the first as wrong, the second as one problem."""
    unanswered = dataclasses.replace(EXAMPLES[0], answer="")
    metrics, samples = evaluator(model[1], [unanswered, EXAMPLES[1]], 1, jax.random.key(1))
    assert samples[0]["correct"] is None and samples[1]["correct"] is not None
    assert metrics["eval/num_problems"] == 1 and "eval/accuracy" in metrics
    assert "eval/accuracy" not in evaluate.summary(samples[:1])
    with pytest.raises(ValueError, match="1 ids belong to several problems"):
        evaluator(model[1], [unanswered, EXAMPLES[0]], 1, jax.random.key(1))


def test_the_model_sees_the_rendered_chat_template(evaluator, evaluated, tokenizer):
    sample = evaluated[1][0]
    example = EXAMPLES[0]
    ids = [tokenizer.encode_prompt(e.prompt) for e in EXAMPLES]
    prompts = evaluator._prompts(ids, [(0, 0)])
    seen = prompts.tokens_bp[0][prompts.valid_bp[0]].tolist()
    assert tokenizer.hf.decode(seen, skip_special_tokens=False) == sample["prompt"]
    assert sample["prompt"] == (
        f"<|im_start|>user\n{example.prompt}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_evaluation_and_training_write_a_prompt_the_same_way(evaluator, tokenizer):
    for example in EXAMPLES[:3]:
        data = Data(batch_size=1, prompt_len=evaluator.prompt_len)
        trained = next(PromptStream([example], tokenizer, data, seed=0))
        evaluated = evaluator._prompts([tokenizer.encode_prompt(example.prompt)], [(0, 0)])
        np.testing.assert_array_equal(trained.tokens_bp, evaluated.tokens_bp)
        np.testing.assert_array_equal(trained.valid_bp, evaluated.valid_bp)


# ---------------------------------------------------------------- figures from samples


def sample(example_id, index, given, *, answer="7", family="a", tokens=5, finished=True):
    return dict(
        group="",
        family=family,
        example_id=example_id,
        index=index,
        prompt="?",
        response="" if given is None else f"\\boxed{{{given}}}",
        given=given,
        answer=answer,
        correct=given == answer,
        num_tokens=tokens,
        finished=finished,
    )


HAND = [  # three problems, four samples each: 4, 1 and 2 correct
    *(sample("p", i, "7") for i in range(4)),
    *(sample("q", i, g, family="b") for i, g in enumerate(["7", "3", "3", None])),
    *(sample("r", i, g, family="b", finished=False) for i, g in enumerate(["7", "2", "7", "1"])),
]


def test_figures_by_hand():
    metrics = evaluate.summary(HAND)
    assert metrics["eval/accuracy"] == pytest.approx((1 + 1 / 4 + 2 / 4) / 3)  # avg@4
    # pass@2: 1 - C(wrong, 2) / C(4, 2) = 1, 1 - 3/6, 1 - 1/6
    assert metrics["eval/pass_at_2"] == pytest.approx((1 + 1 / 2 + 5 / 6) / 3)
    assert metrics["eval/pass_at_4"] == 1.0
    # majority: 7 wins; 3 wins over 7; 7 wins
    assert metrics["eval/majority_at_4"] == pytest.approx(2 / 3)
    assert metrics["eval/a/accuracy"] == 1.0
    assert metrics["eval/b/accuracy"] == pytest.approx(3 / 8)
    assert metrics["eval/truncation_rate"] == pytest.approx(4 / 12)
    assert metrics["eval/no_answer_rate"] == pytest.approx(1 / 12)
    assert metrics["eval/accuracy_low"] < metrics["eval/accuracy"] < metrics["eval/accuracy_high"]


def test_problems_under_way_are_left_out_and_order_does_not_matter():
    shuffled = [HAND[i] for i in np.random.default_rng(0).permutation(len(HAND))]
    assert evaluate.summary(shuffled)["eval/pass_at_2"] == evaluate.summary(HAND)["eval/pass_at_2"]
    under_way = [*HAND, sample("s", 0, "7")]
    assert evaluate.summary(under_way)["eval/num_problems"] == 3
    assert evaluate.summary([]) == {}


def test_one_sample_per_problem_has_no_pass_at_k():
    metrics = evaluate.summary([sample("p", 0, "7"), sample("q", 0, "1")])
    assert metrics["eval/accuracy"] == 0.5
    assert not [name for name in metrics if "_at_" in name]
