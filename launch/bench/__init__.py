# SPDX-License-Identifier: Apache-2.0
"""Measurements of every stage: `python -m launch.bench --case=...` (see __main__.py).

docs/log.md records what was tried for speed and what came of it.
"""
