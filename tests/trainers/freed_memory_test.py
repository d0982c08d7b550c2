"""What a step frees is there for the next, without the system's help."""

import os
import platform
import resource

import numpy as np
import pytest

from moe_tf_trainers import freed_memory
from tests import process

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc"
    or any("MALLOC_" in name or "GLIBC_" in name for name in os.environ),
    reason="needs glibc, with no settings in the environment",
)
STEPS = 20
ARRAY_BYTES = 8 * 2**20


def faults_of_steps(keep):
    """How often the system gives pages while steps free and ask again."""
    if keep:
        freed_memory.keep_freed_memory()
    counts = []
    for _ in range(STEPS + 1):
        arrays = [np.ones(ARRAY_BYTES, "u1") for _ in range(4)]
        del arrays
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return counts[-1] - counts[0]  # after the first, which needs them


def test_pages_are_given_once():
    given, kept = (process.run(faults_of_steps, keep) for keep in (False, True))
    assert given > 10 * kept


@pytest.mark.parametrize(
    "name,value",
    [
        ("MALLOC_TOP_PAD_", "131072"),
        ("GLIBC_TUNABLES", "glibc.malloc.top_pad=131072"),
    ],
)
def test_the_environment_decides(name, value):
    chosen = process.run(faults_of_steps, True, env={name: value})
    assert chosen > 10 * process.run(faults_of_steps, True)
