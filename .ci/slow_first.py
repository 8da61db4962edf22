# SPDX-License-Identifier: Apache-2.0
"""Pytest plugin of .ci/run: files with slow tests first, those with most of them foremost.

With a queue of files (`--dist loadfile --no-loadscope-reorder`) the order is that of the start.
"""

import collections

import pytest


@pytest.hookimpl(trylast=True)  # after -m and -k have deselected
def pytest_collection_modifyitems(items):
    slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])  # stable: within a file the order stays
