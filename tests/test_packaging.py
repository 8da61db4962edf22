# SPDX-License-Identifier: Apache-2.0
"""requirements.lock holds all that setup.py asks for, within its ranges."""

import re

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests import fakes

LOCKED_EXTRAS = ("test", "parity", "tpu")
PINS = {}
for line in (fakes.ROOT / "requirements.lock").read_text().splitlines():
    if not line.startswith("#"):
        name, _, version = line.partition("==")
        PINS[canonicalize_name(name)] = version


@pytest.fixture(scope="module")
def asked():
    """What setup.py gives setuptools."""
    given = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", given.update)
        exec(compile((fakes.ROOT / "setup.py").read_text(), "setup.py", "exec"), {})
    return given


def test_every_requirement_is_locked_within_its_range(asked):
    """Catches a range moved past the lock, and a requirement added without a new lock."""
    wanted = [*asked["install_requires"]]
    wanted += [r for extra in LOCKED_EXTRAS for r in asked["extras_require"][extra]]
    for requirement in map(Requirement, wanted):
        pin = PINS.get(canonicalize_name(requirement.name))
        assert pin, f"{requirement.name} is not locked: run .ci/lock"
        assert requirement.specifier.contains(pin), (
            f"{requirement} is locked at {pin}: run .ci/lock"
        )


def test_the_lock_holds_exact_versions_and_no_address():
    """A local version (torch's +cpu) is on no public index; a file or URL is on one machine."""
    assert len(PINS) > 50
    for name, version in PINS.items():
        assert re.fullmatch(r"[a-z0-9-]+", name), name
        assert str(Version(version)) and "+" not in version, (name, version)


def test_types_styles_and_assets_are_in_the_package(asked):
    """What is not Python is shipped only if package_data says so."""
    for package, patterns in asked["package_data"].items():
        folder = fakes.ROOT / package.replace(".", "/")
        for pattern in patterns:
            assert any(folder.glob(pattern)), f"{package}: {pattern}"
    assert "py.typed" in asked["package_data"]["opd_jax"]
