# SPDX-License-Identifier: Apache-2.0
"""The contract: what passes, what is refused by name, and Qwen3's two published templates."""

import dataclasses
import json
import shutil

import pytest

from opd_jax import build
from opd_jax.problems import contract, tiny_tokenizer
from opd_jax.problems.tokenizer import Tokenizer, probes
from opd_jax.stages.sampling import Knobs
from tests import advice, fakes

IDS = {"a": 0, "b": 1, "<|im_end|>": 2, "<|endoftext|>": 3}
STUDENT = contract.Side(
    name="student",
    token_ids=IDS,
    vocab_size=4,
    head_rows=8,
    eos_ids=(2, 3),
    rendered=("<user>1 + 1<assistant>", "<user>2<assistant>"),
)
PLAIN = Knobs()


def teacher(**changes):
    return dataclasses.replace(STUDENT, name="teacher", **changes)


def test_equal_sides_pass_whatever_their_padding():
    other = teacher(head_rows=16, eos_ids=(3, 2))
    assert contract.check_contract(STUDENT, [other], PLAIN) == []


MISMATCHES = [
    (
        "token_ids",
        dict(token_ids=IDS | {"a": 1, "b": 0}),
        "2 tokens have another id: 'a' is 0 and 1",
    ),
    (
        "token_ids",
        dict(token_ids={k: v for k, v in IDS.items() if k != "a"}),
        "no id in teacher: 'a'",
    ),
    ("token_ids", dict(token_ids=IDS | {"c": 9}), "no id in student: 'c' \\(9\\)"),
    ("vocab_size", dict(vocab_size=5), "student has 4 tokens, teacher 5"),
    ("padded_rows", dict(head_rows=3), "teacher's head has 3 rows for 4 tokens"),
    ("eos", dict(eos_ids=(3,)), "student ends at \\[2, 3\\], teacher at \\[3\\]"),
    (
        "template",
        dict(rendered=("<user>1 + 1<think>", STUDENT.rendered[1])),
        "differs at character 12",
    ),
    ("template", dict(rendered=("<user>1 + 1", STUDENT.rendered[1])), "differs at character 11"),
]


@pytest.mark.parametrize("name, changes, match", MISMATCHES)
def test_each_mismatch_is_shown_and_can_be_allowed_by_name(name, changes, match):
    with pytest.raises(ValueError, match=match) as caught:
        contract.check_contract(STUDENT, [teacher(**changes)], PLAIN)
    assert f"--config.contract_allow=\"('{name}',)\"" in str(caught.value)
    advice.check(caught.value)
    allowed = contract.check_contract(STUDENT, [teacher(**changes)], PLAIN, allow=(name,))
    assert len(allowed) == 1
    assert allowed[0].startswith(f"{name}, allowed by config.contract_allow: ")


@pytest.mark.parametrize(
    "changes, works",
    [
        (dict(temperature=0.7), "--config.rollout.temperature=1.0"),
        (dict(top_k=50), "--config.rollout.top_k=0"),
        (dict(top_p=0.9), "--config.rollout.top_p=1.0"),
        (dict(min_p=0.1), "--config.rollout.min_p=0.0"),
        (dict(top_k=5, min_p=0.1), "--config.rollout.top_k=0 --config.rollout.min_p=0.0"),
    ],
)
def test_sampling_must_be_what_the_log_probs_assume(changes, works):
    sampling = Knobs(**changes)
    given = ", ".join(f"{name}={value}" for name, value in changes.items())
    with pytest.raises(ValueError, match=f"sampling: .* with {given}, but") as caught:
        contract.check_contract(STUDENT, [], sampling)
    assert works in str(caught.value)
    advice.check(caught.value)
    assert contract.check_contract(STUDENT, [], sampling, allow=("sampling",))


def test_no_filter_is_what_the_sampler_calls_so():
    assert contract.NO_FILTER == dataclasses.asdict(PLAIN) and not PLAIN.filters


def test_all_mismatches_come_in_one_message_whose_advice_allows_them_all():
    other = teacher(eos_ids=(3,), vocab_size=5, head_rows=3)
    with pytest.raises(ValueError) as caught:
        contract.check_contract(STUDENT, [other], PLAIN, allow=("padded_rows",))
    message = str(caught.value)
    assert "eos:" in message and "vocab_size:" in message and "padded_rows:" not in message
    # A pasted flag replaces the one that was given, so what was allowed stays allowed.
    assert "--config.contract_allow=\"('padded_rows','vocab_size','eos')\"" in message
    advice.check(message)


def test_long_differences_are_cut_and_counted():
    ids = {str(i): i for i in range(100)}
    one = dataclasses.replace(STUDENT, token_ids=ids)
    other = teacher(token_ids={t: 99 - i for t, i in ids.items()})
    with pytest.raises(ValueError, match="100 tokens have another id: .* and 95 more"):
        contract.check_contract(one, [other], PLAIN)


@pytest.mark.parametrize(
    "given, works", [(("tokens",), "()"), (("eos", "thinking"), "('eos',)"), (("EOS",), "()")]
)
def test_an_unknown_name_to_allow_is_refused(given, works):
    with pytest.raises(ValueError, match="no checks; the checks are token_ids, ") as caught:
        contract.check_contract(STUDENT, [], PLAIN, allow=given)
    assert f'Set --config.contract_allow="{works}"' in str(caught.value)
    advice.check(caught.value)


# ---- the two templates of configs/paper.py ----

# What Qwen3-1.7B's (hybrid) and Qwen3-30B-A3B-Instruct-2507's chat templates write for text
# messages without tools, told from their public text. Left out: tools, tool messages, and what the
# hybrid one does to an answer after the last question, which no prompt has.
TURN = "{{- '<|im_start|>' + m.role + '\\n' + %s + '<|im_end|>\\n' }}"
MESSAGES = (
    "{%- for m in messages %}{%- if m.role != 'assistant' %}"
    + TURN % "m.content"
    + "{%- else %}"
    + TURN % "ANSWER"
    + "{%- endif %}{%- endfor %}"
)
OPEN = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{{ END }}{%- endif %}"
BLOCK = (
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
)
HYBRID = MESSAGES.replace("ANSWER", "m.content.split('</think>')[-1].lstrip('\\n')")
HYBRID += OPEN.replace("{{ END }}", BLOCK)
INSTRUCT = MESSAGES.replace("ANSWER", "m.content") + OPEN.replace("{{ END }}", "")
THINKING = INSTRUCT.replace("assistant\\n'", "assistant\\n<think>\\n'")  # of the 2507 Thinking ones

DATA = (
    "What is 2 + 3?",
    [("system", "Be brief."), ("user", "Hi")],
    [("user", "Hi"), ("assistant", "Hello"), ("user", "2 + 3?")],
)


@pytest.fixture(scope="module")
def backend():
    return tiny_tokenizer.train(num_problems=20)


def side(name, backend, template, thinking=False, data=DATA):
    import transformers

    hf = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", chat_template=template
    )
    tokenizer = Tokenizer(hf)
    tokenizer.check_template(data, thinking)
    rendered = [tokenizer.render(probe, thinking) for probe in probes(data)]
    return dataclasses.replace(STUDENT, name=name, rendered=rendered)


def checked(backend, ours, theirs, **given):
    student = side("student", backend, ours, **given)
    return contract.check_contract(student, [side("teacher", backend, theirs, **given)], PLAIN)


def test_the_published_templates_write_what_the_models_were_trained_on(backend):
    """As the model cards show it; if this fails, the rows below speak of other templates."""
    for template, thinking, end in (
        (HYBRID, False, "<think>\n\n</think>\n\n"),
        (HYBRID, True, ""),
        (INSTRUCT, False, ""),
        (INSTRUCT, True, ""),
    ):
        rendered = side("student", backend, template, thinking, DATA[:1]).rendered
        assert len(rendered) == 1
        assert rendered[0].startswith("<|im_start|>user\nIs 'a' & <b> ")
        assert rendered[0].endswith(".<|im_end|>\n<|im_start|>assistant\n" + end)


@pytest.mark.parametrize(
    "ours, theirs, thinking, line",
    [
        (HYBRID, INSTRUCT, False, "student's own tokens, block included"),  # configs/paper.py
        (INSTRUCT, HYBRID, False, "student's own tokens, without the block"),
        (tiny_tokenizer.CHAT_TEMPLATE, INSTRUCT, False, "block included"),
        (HYBRID, INSTRUCT, True, None),
        (INSTRUCT, HYBRID, True, None),
        (HYBRID, HYBRID, False, None),
        (HYBRID, tiny_tokenizer.CHAT_TEMPLATE, False, None),
        (INSTRUCT, INSTRUCT, False, None),
        (THINKING, THINKING, True, None),
    ],
)
def test_an_empty_think_block_at_the_end_is_no_mismatch_and_is_said_once(
    backend, ours, theirs, thinking, line
):
    said = checked(backend, ours, theirs, thinking=thinking)
    assert len(said) == (line is not None) and (line is None or line in said[0])


def instruct(old, new):
    assert INSTRUCT.count(old) >= 1
    return INSTRUCT.replace(old, new)


ELSEWHERE = {
    "another header": instruct("'<|im_start|>assistant\\n'", "'<|im_start|>model\\n'"),
    "no line after the header": instruct("assistant\\n", "assistant"),
    "a space at the end": instruct("assistant\\n", "assistant\\n "),
    "a line at the end": instruct("assistant\\n", "assistant\\n\\n"),
    "an open think block": THINKING,
    "half a think block": instruct("assistant\\n", "assistant\\n<think>\\n\\n</think>"),
    "a think block of one line": instruct("assistant\\n", "assistant\\n<think>\\n</think>\\n\\n"),
    "a think block in words": instruct("assistant\\n", "assistant\\n<think>\\nno\\n</think>\\n\\n"),
    "two think blocks": instruct(
        "assistant\\n", "assistant\\n" + "<think>\\n\\n</think>\\n\\n" * 2
    ),
    "a block before the header": instruct(
        "'<|im_start|>assistant\\n'", "'<think>\\n\\n</think>\\n\\n<|im_start|>assistant\\n'"
    ),
    "a system message of its own": (
        "{%- if messages[0].role != 'system' %}"
        "{{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{%- endif %}" + INSTRUCT
    ),
    "a token of the beginning": "{{- '<|endoftext|>' }}" + INSTRUCT,
    "another end of a turn": instruct("<|im_end|>", "<|endoftext|>"),
    "two lines between turns": instruct("<|im_end|>\\n", "<|im_end|>\\n\\n"),
    "system told as user": instruct("+ m.role +", "+ m.role.replace('system', 'user') +"),
    "answers with an empty thought": instruct(
        "+ m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}",
        "+ '<think>\\n\\n</think>\\n\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}",
    ),
}


@pytest.mark.parametrize("student", [HYBRID, INSTRUCT], ids=["hybrid", "instruct"])
@pytest.mark.parametrize("difference", ELSEWHERE)
def test_templates_that_differ_in_anything_else_are_refused(backend, student, difference):
    with pytest.raises(ValueError, match="template: prompt [0-2] differs at character") as caught:
        checked(backend, student, ELSEWHERE[difference])
    advice.check(caught.value)


def test_what_the_data_do_not_need_may_differ(backend):
    """A teacher that tells system messages otherwise does for data that have none."""
    other = ELSEWHERE["system told as user"]
    assert checked(backend, INSTRUCT, other, data=["Hi", DATA[2]]) == []


# ---- a run: each model directory's own template, and the data's own roles ----


def config_with(pair, tmp_path, template, **overrides):
    """A run whose teacher has another template than the embedded student's, which is hybrid."""
    shutil.copytree(pair.teacher, tmp_path / "teacher")
    path = tmp_path / "teacher" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    given = {"teacher.path": str(tmp_path / "teacher"), "evaluate.source": ""}
    return fakes.small_config(pair, **given | overrides)


# A template that refuses what these data do not have is right for them.
NO_SYSTEM = "{%- if messages[0].role == 'system' %}{{ raise_exception('none') }}{%- endif %}"


@pytest.mark.usefixtures("on_one_device")
@pytest.mark.parametrize("template", [INSTRUCT, NO_SYSTEM + INSTRUCT], ids=["2507", "no system"])
def test_a_run_of_a_hybrid_student_and_an_instruct_teacher_starts(pair, tmp_path, template, caplog):
    with build.build(config_with(pair, tmp_path, template), str(tmp_path / "run")):
        assert caplog.text.count("teacher scores the student's own tokens, block included") == 1


@pytest.mark.usefixtures("on_one_device")
@pytest.mark.parametrize(
    "template, prompt, match",
    [
        (ELSEWHERE["another header"], "Hi", "template: prompt 0 differs"),
        (INSTRUCT + "{% if %}", "Hi", "teacher.tokenizer_config.json cannot write.*roles user,"),
        (NO_SYSTEM + INSTRUCT, DATA[1], "roles system, user, which the data need"),
        (ELSEWHERE["system told as user"], DATA[1], "template: prompt [01] differs"),
        (INSTRUCT.replace("m.content", "''"), "Hi", "content of the user message"),
        (INSTRUCT.replace("add_generation_prompt", "no"), "Hi", "no generation prompt"),
    ],
)
@pytest.mark.parametrize("where", ["data.source", "evaluate.source"])
def test_a_run_whose_templates_do_not_fit_its_data_is_refused(
    pair, tmp_path, where, template, prompt, match
):
    turns = [("user", prompt)] if isinstance(prompt, str) else prompt
    line = {"messages": [{"role": role, "content": text} for role, text in turns], "answer": "2"}
    (tmp_path / "data.jsonl").write_text(json.dumps(line))
    config = config_with(pair, tmp_path, template, **{where: str(tmp_path / "data.jsonl")})
    with pytest.raises(ValueError, match=match) as caught:
        build.build(config, str(tmp_path / "run"))
    advice.check(caught.value)
