# SPDX-License-Identifier: Apache-2.0
"""No message, --help or docstring of the project advises a flag that fails when it is pasted."""

import pytest

from tests import advice


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("Set --config.seed=3.", ["--config.seed=3"]),
        ("as --sweep='config.seed=0,1,2' (or more)", ["--sweep=config.seed=0,1,2"]),
        ("Set --config.mesh=\"(('data',1),)\".", ["--config.mesh=(('data',1),)"]),
        ("(as --num_processes=2)", ["--num_processes=2"]),
        ("Leave --config.selector.length out", []),
        ("a--b=c is no flag", []),
    ],
)
def test_flags_are_found_as_bash_hands_them_on(message, arguments):
    assert advice.pasted(advice.words(message)) == arguments


@pytest.mark.parametrize(
    "message",
    [
        "Set --config.mesh=(('data',1),('fsdp',-1)).",  # a syntax error in bash
        "Set --config.contract_allow=('vocab_size',)",
        "Set --config.sead=3",
        "Set --config.seed=three",
        "Set --work_dir=runs/a",
        "Set --workdir=runs/$(date",
    ],
)
def test_advice_that_fails_is_seen(message):
    with pytest.raises((AssertionError, ValueError)):
        advice.check(message)
    advice.check("--config.sead=(a must be known. Set --config.seed=3")  # what was given may fail


@pytest.mark.parametrize("path", advice.SOURCES, ids=lambda p: str(p.relative_to(advice.ROOT)))
def test_every_flag_in_a_string_of_the_project_can_be_pasted(path):
    """What is filled in at run time is checked where the message is: `advice.check`."""
    advice.pasted([word for text in advice.texts(path) for word in advice.words(text)])
