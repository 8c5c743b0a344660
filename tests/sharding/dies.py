"""What test_sharding asks of a program whose process dies."""

import os

from tests import mesh

CASES = mesh.Cases()


@CASES.add(n=(1,))
def passes(n):
    assert n == 1


@CASES.add(n=(1,))
def fails(n):
    assert n == 2


@CASES.add()
def aborts():
    os.abort()


if __name__ == "__main__":
    CASES.main()
