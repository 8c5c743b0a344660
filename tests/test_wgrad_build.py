"""The step of the build that refuses a kernel whose products ptxas has serialized."""

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "cmake" / "refuse_serialized_wgmma.sh"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="the sources are not beside the tests")

SERIALIZED = (
    "ptxas info    : (C7514) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non wgmma "
    "instructions reading accumulator registers of a wgmma between start and end of the pipeline stage"
)


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["true"], 0),
        (["echo", "ptxas info    : 0 bytes gmem"], 0),
        (["sh", "-c", "exit 3"], 3),
        (["echo", SERIALIZED], 1),
        (["sh", "-c", 'echo "$1" >&2', "sh", SERIALIZED], 1),
        (["echo", "ptxas info : (C7510) Potential Performance Loss"], 1),
    ],
    ids=["silent", "harmless remark", "failed", "serialized", "serialized, on stderr", "C7510"],
)
def test_exit_status(command, status):
    """The compiler's own, or 1 after such a remark; what the compiler says is shown."""
    process = subprocess.run(["sh", SCRIPT, *command], capture_output=True, text=True)
    assert process.returncode == status
    if command[0] == "echo":
        assert command[1] in process.stderr
