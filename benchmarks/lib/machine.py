"""Output of other programs, for what a result records of the machine and the sources."""

import subprocess
from pathlib import Path


def command_output(*command: str) -> str:
    """What a command prints, nothing if it fails or is not there."""
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
