# SPDX-License-Identifier: Apache-2.0
"""The stages of a step: prompts, rollout (decode, sampling), score, selection, update, evaluate.

A stage imports no other stage, except evaluate, which samples with rollout.
"""
