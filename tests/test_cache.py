"""The persistent compilation cache: a second process compiles nothing."""

import pytest

from tests import mesh
from tests.conftest import NATIVE

PROCESSES = ["first", "second"]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """The same program twice on each platform, with one cache for both."""
    results = {}
    for platform in NATIVE:
        directory = str(tmp_path_factory.mktemp("cache"))
        for process in PROCESSES:
            results[platform, process] = mesh.run("cached", platform, directory, process)
    return results


@pytest.mark.parametrize("process", PROCESSES)
@mesh.parametrize("cached")
def test_cache(outcomes, platform, program, process, case):
    """Right bytes in both processes; hits in the second, but for Auto axes only with JAX's flag for them."""
    mesh.check_case(outcomes[platform, process], case)
