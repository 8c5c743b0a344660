"""Trains a Mixture-of-Experts character model in bf16 and with products of FP8 operands, and compares.

Text is Python's own reference manual. The model is sharded over a mesh ("expert", "tensor"); everything is jitted, with
traced group sizes. On a machine without a GPU it runs on 8 host devices.

    python -m examples.train_moe                          all modes, table, loss curves, results as JSON
    python -m examples.train_moe --modes fp8-pow2 --steps 100 --mesh 8x1
    python -m examples.train_moe --profile                on a GPU: where the time of a step goes

On several hosts, start it once on each, with --process 0, 1, ... and otherwise the same arguments:

    python -m examples.train_moe --coordinator HOST:PORT --processes 2 --process 0
"""

import argparse
import importlib.util
import json
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from examples.moe import layer, measure, model, report

CHUNK = 20  # steps between two lines of progress


def say(*words: str, sep: str = " ") -> None:
    if jax.process_index() == 0:
        print(*words, sep=sep, flush=True)


def join(coordinator: str, processes: int, process: int) -> None:
    """Makes this one of several processes: `jax.devices()` lists the devices of all from then on."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator, processes, process, heartbeat_timeout_seconds=30, shutdown_timeout_seconds=30
    )


def default_mesh(devices: int, experts: int) -> tuple[int, int]:
    """Two devices share an expert from four devices on."""
    tensor = 2 if devices >= 4 and devices % 2 == 0 else 1
    expert = max(n for n in range(1, devices // tensor + 1) if experts % n == 0)
    return expert, tensor


def train(trainer: model.Trainer, seed: int, steps: int, label: str, compilations: measure.Compilations) -> dict:
    """Trains from one seed: last state, losses, routings, milliseconds a step, compilations after the first step."""
    key = jax.random.key(seed)
    state = trainer.init(key)
    losses, loads, times = [], [], []
    compiled, start = 0, time.perf_counter()
    for i in range(steps):
        state, (loss, load) = trainer.step(state, trainer.text, jax.random.fold_in(key, i))
        losses.append(loss)
        loads.append(load)
        if i == 0 or jax.default_backend() == "cpu":  # host devices that run ahead of each other may block each other
            loss.block_until_ready()
        if i == 0:
            say(f"{label}, seed {seed}: first step after {time.perf_counter() - start:.1f} s")
            compiled, start = compilations.count, time.perf_counter()
        elif i % CHUNK == 0 or i == steps - 1:
            loss.block_until_ready()
            seconds = time.perf_counter() - start
            times.append(1e3 * seconds / ((i - 1) % CHUNK + 1))
            say(f"{label}, seed {seed}: step {i + 1} of {steps}, loss {float(loss):.4f}, {times[-1]:.0f} ms a step")
            start = time.perf_counter()
    return {
        "state": state,
        "losses": [round(float(loss), 6) for loss in losses],
        "routings": {np.asarray(load).tobytes() for load in loads},
        "milliseconds": float(np.median(times)) if times else 0.0,
        "compilations": compilations.count - compiled,
    }


def run_mode(trainer: model.Trainer, label: str, args, compilations: measure.Compilations) -> tuple[dict, dict]:
    """All seeds of a mode: its entry in the results and the last run."""
    runs = {seed: train(trainer, seed, args.steps, label, compilations) for seed in args.seeds}
    entry = {
        "label": label,
        "losses": {str(seed): run["losses"] for seed, run in runs.items()},
        "milliseconds_per_step": float(np.median([run["milliseconds"] for run in runs.values()])),
        "compilations": 1 + sum(run["compilations"] for run in runs.values()),
        "routings": len(set().union(*(run["routings"] for run in runs.values()))),
        "stored_bytes": measure.stored(trainer),
        "temporary_bytes": measure.scratch_bytes(trainer),
    }
    last = runs[args.seeds[-1]]
    if args.profile:
        entry["profile"] = measure.profile(trainer, jax.tree.map(jnp.copy, last["state"]), jax.random.key(0))
    return entry, last


def parse() -> tuple[argparse.Namespace, model.Config]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=layer.MODES, default=list(layer.MODES))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--mesh", help='for example "4x2": expert x tensor; all devices by default')
    parser.add_argument("--host-devices", type=int, default=8, help="devices to split the CPU into")
    parser.add_argument("--coordinator", help="where process 0 listens: its host and a free port there, HOST:PORT")
    parser.add_argument("--processes", type=int, default=1, help="how many there are")
    parser.add_argument("--process", type=int, default=0, help="number of this one")
    parser.add_argument("--dispatch", choices=["auto", *layer.DISPATCH], default="auto")
    parser.add_argument(
        "--control", action="store_true", help="also train bf16 on one device: what rounding alone does"
    )
    parser.add_argument("--profile", action="store_true", help="device time of a step by kind of kernel; GPU only")
    parser.add_argument("--output", type=Path, default=Path("train-moe.json"))
    parser.add_argument("--plot", type=Path, help="loss curves; beside the output by default")
    parser.add_argument("--report", type=Path, help="draw this result file and fill docs/training.md; train nothing")
    for name, default in model.Config()._asdict().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    args = parser.parse_args()
    return args, model.Config(**{name: getattr(args, name) for name in model.Config._fields})


def main() -> None:
    args, config = parse()
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("Loss curves are drawn by matplotlib, which is not installed. Run: pip install matplotlib")
    if args.report:
        root, result = Path(__file__).parents[1], json.loads(args.report.read_text())
        if result["steps"] >= report.LAST * 2:
            report.draw(result, args.plot or root / "docs/images" / f"{args.report.stem}.svg")
        report.fill(root / "docs/training.md", result)
        return
    if not jax.distributed.is_initialized():
        jax.config.update("jax_num_cpu_devices", args.host_devices)
    if args.coordinator:
        join(args.coordinator, args.processes, args.process)
    if args.profile and jax.default_backend() != "gpu":
        raise SystemExit("--profile needs a GPU: on CPU no device time can be told from the rest.")
    devices = jax.devices()
    shape = tuple(map(int, args.mesh.split("x"))) if args.mesh else default_mesh(len(devices), config.experts)
    mesh = model.make_mesh(shape)
    dispatch = args.dispatch
    if dispatch == "auto":  # XLA:CPU has no ragged_all_to_all
        dispatch = "all_to_all" if jax.default_backend() == "gpu" else "replicate"
    compilations = measure.Compilations()
    result = {
        "config": config._asdict(),
        "steps": args.steps,
        "seeds": args.seeds,
        "mesh": list(shape),
        "dispatch": dispatch,
        "kernels": os.environ.get("JAX_TSQ_KERNELS", "auto"),
        "device": f"{mesh.size} x {devices[0].device_kind}"
        if jax.default_backend() != "cpu"
        else f"CPU, {mesh.size} host devices",
        "jax": jax.__version__,
        "modes": {},
    }
    say(f"{result['device']}, mesh {dict(mesh.shape)}, dispatch {dispatch}")
    for mode in args.modes:
        trainer = model.Trainer(config, mesh, mode, dispatch)
        result["modes"][mode], last = run_mode(trainer, layer.MODES[mode].label, args, compilations)
        if mode == args.modes[-1] and jax.process_count() == 1:
            result["requantization"] = measure.requantization(trainer, last["state"])
    if args.control:
        trainer = model.Trainer(config, model.make_mesh((1, 1)), "bf16", "replicate")
        result["modes"]["control"], _ = run_mode(trainer, "bf16 on one device", args, compilations)
    say("", report.provenance(result), "", report.table(result), sep="\n")
    if "requantization" in result:
        say("", report.requantization_table(result), sep="\n")
    if args.profile:
        say("", report.profile_table(result), sep="\n")
    if jax.process_index() == 0:
        args.output.write_text(json.dumps(result) + "\n")
        plot = args.plot or args.output.with_suffix(".svg")
        report.draw(result, plot)
        print(f"\n{args.output}, {plot}")


if __name__ == "__main__":
    main()
