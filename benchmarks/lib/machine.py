"""What a result records of the machine and the sources it was measured with."""

import datetime
import os
import subprocess
from collections.abc import Iterable
from typing import Any

import jax
import jaxlib

from benchmarks.lib import ROOT
from benchmarks.lib.digest import digest


def command_output(*command: str) -> str:
    """What a command prints, nothing if it fails or is not there."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def commit() -> str:
    return command_output("git", "rev-parse", "HEAD")


def driver() -> str:
    """The version of the NVIDIA driver."""
    return command_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]


def cpu_name() -> str:
    return next(
        (line.partition(":")[2].strip() for line in command_output("lscpu").splitlines() if "Model name" in line), ""
    )


def environment() -> dict[str, str]:
    """The first device and the versions of JAX."""
    device = jax.devices()[0]
    return {
        "device": f"{cpu_name()}, {os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "platform_version": " ".join(device.client.platform_version.split()),
    }


def origin(platform: str, operations: Iterable[str], commit: str) -> dict[str, Any]:
    """When and of which kernels a result is."""
    return {
        "platform": platform,
        "driver": driver() if platform == "gpu" else None,
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "digest": digest(platform, operations),
    }
