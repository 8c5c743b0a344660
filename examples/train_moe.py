"""Trains a Mixture-of-Experts model of bytes in bf16 and with products of FP8 operands, and compares.

Text is Python source: the standard library, jax and numpy. The model is sharded over a mesh ("expert", "tensor");
everything is jitted, with traced group sizes. On a machine without a GPU it runs on 8 host devices.

    python -m examples.train_moe                          all modes, tables, loss curves, results as JSON
    python -m examples.train_moe --modes bf16 fp8-mlp --steps 100 --mesh 8x1
    python -m examples.train_moe --size gpu --steps 2000 --seeds 0 1 --checkpoint /tmp/moe.npz --minutes 9

The same command goes on where it was stopped: runs in the result file are not made again, and the last one that was on
its way goes on from the checkpoint. On several hosts, start it once on each, with --process 0, 1, ... and otherwise the
same arguments:

    python -m examples.train_moe --coordinator HOST:PORT --processes 2 --process 0
"""

import argparse
import importlib.util
import json
import math
import os
import time
from pathlib import Path

import jax

from examples.moe import checkpoint, measure, model, modes, report, text, training
from examples.moe.training import say


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


def parse() -> tuple[argparse.Namespace, model.Config]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=modes.MODES, default=list(modes.MODES))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--chunk", type=int, default=20, help="steps of one program (default %(default)s)")
    parser.add_argument("--microbatches", type=int, default=1, help="of a step, whose gradients are summed in float32")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--mesh", help='for example "4x2": expert x tensor; all devices by default')
    parser.add_argument("--host-devices", type=int, default=8, help="devices to split the CPU into")
    parser.add_argument("--coordinator", help="where process 0 listens: its host and a free port there, HOST:PORT")
    parser.add_argument("--processes", type=int, default=1, help="how many there are")
    parser.add_argument("--process", type=int, default=0, help="number of this one")
    parser.add_argument("--dispatch", choices=["auto", *model.DISPATCH], default="auto")
    parser.add_argument("--out-dir", type=Path, default=Path("train-moe"), help="for results and loss curves")
    parser.add_argument("--checkpoint", type=Path, help="file for the run on its way; one process only")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many")
    parser.add_argument("--commit", default=measure.commit(), help="recorded in the result")
    parser.add_argument("--report", type=Path, help="draw this result file and fill docs/training.md; train nothing")
    parser.add_argument("--size", choices=model.SIZES, default="small", help="what the sizes below are by default")
    for name, default in model.Config()._asdict().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default))
    args = parser.parse_args()
    sizes = {name: getattr(args, name) for name in model.Config._fields}
    config = model.SIZES[args.size]._replace(**{name: size for name, size in sizes.items() if size is not None})
    if args.chunk % training.WINDOW or args.steps % args.chunk:
        parser.error(
            f"--chunk {args.chunk} must be a multiple of {training.WINDOW}, whose mean is recorded, and --steps "
            f"{args.steps} one of --chunk."
        )
    if args.checkpoint and args.processes > 1:
        parser.error("--checkpoint needs one process, which holds all of the model.")
    return args, config


def settings(args, config: model.Config, mesh, dispatch: str) -> dict:
    """What runs that are compared have in common."""
    devices = jax.devices()
    name = f"CPU, {mesh.size} host devices" if jax.default_backend() == "cpu" else devices[0].device_kind
    return {
        "config": config._asdict(),
        "steps": args.steps,
        "chunk": args.chunk,
        "seeds": args.seeds,
        "microbatches": args.microbatches,
        "window": training.WINDOW,
        "mesh": list(mesh.shape.values()),
        "dispatch": dispatch,
        "kernels": os.environ.get("JAX_TSQ_KERNELS", "auto"),
        "device": name if mesh.size == 1 or jax.default_backend() == "cpu" else f"{mesh.size} x {name}",
        "jax": jax.__version__,
        "platform": " ".join(devices[0].client.platform_version.split()),
        "commit": args.commit,
        "text": text.read().summary,
    }


def write(path: Path, result: dict) -> None:
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".part")
        unfinished.write_text(json.dumps(result) + "\n")
        os.replace(unfinished, path)


def run_mode(trainer: model.Trainer, mode: str, args, result: dict, path: Path, deadline: float) -> None:
    """Makes the runs of a mode that the result lacks, and writes it after each."""
    entry = result["modes"].setdefault(mode, {"label": trainer.mode.label, "runs": {}})
    compilations = measure.Compilations()
    for seed in args.seeds:
        if str(seed) in entry["runs"]:
            continue
        identity = {
            name: result[name] for name in ("config", "steps", "microbatches", "mesh", "dispatch", "jax", "text")
        }
        identity |= {"mode": mode, "seed": seed}
        begun = checkpoint.load(args.checkpoint, trainer.state_shardings, identity) if args.checkpoint else None
        saver = training.Saver(args.checkpoint, identity, deadline)
        run, compiled = training.train(trainer, seed, args.steps, args.chunk, compilations, begun, saver)
        entry["runs"][str(seed)] = training.record(trainer, run, 1 + compiled)
        if "stored_bytes" not in entry:
            entry["stored_bytes"] = measure.stored(trainer)
            entry["temporary_bytes"] = measure.scratch_bytes(trainer, args.chunk)
        if (mode, seed) == (args.modes[-1], args.seeds[-1]) and jax.process_count() == 1:
            result["requantization"] = measure.requantization(trainer, run.state)
        write(path, result)


def show(args) -> None:
    root, result = Path(__file__).parents[1], json.loads(args.report.read_text())
    report.draw(result, root / "docs/images" / f"{args.report.stem}.svg")
    report.fill(root / "docs/training.md", report.blocks(result, args.report.stem))


def main() -> None:
    begin = time.perf_counter()
    args, config = parse()
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("Loss curves are drawn by matplotlib, which is not installed. Run: pip install matplotlib")
    if args.report:
        show(args)
        return
    if not jax.distributed.is_initialized():
        jax.config.update("jax_num_cpu_devices", args.host_devices)
    if args.coordinator:
        join(args.coordinator, args.processes, args.process)
    devices = jax.devices()
    shape = tuple(map(int, args.mesh.split("x"))) if args.mesh else default_mesh(len(devices), config.experts)
    mesh = model.make_mesh(shape)
    config.check(mesh, args.microbatches)
    dispatch = args.dispatch
    if dispatch == "auto":  # XLA:CPU has no ragged_all_to_all, and one device needs none
        dispatch = "all_to_all" if jax.default_backend() == "gpu" and mesh.size > 1 else "replicate"
    path = args.out_dir / f"training-{jax.default_backend()}.json"
    result = settings(args, config, mesh, dispatch)
    if path.exists() and jax.process_count() == 1:
        found = json.loads(path.read_text())
        checkpoint.check_same(path, found, result, free=("commit", "platform"))
        result = found
    result.setdefault("modes", {})
    say(f"{result['device']}, mesh {dict(mesh.shape)}, dispatch {dispatch}")
    for mode in args.modes:
        trainer = model.Trainer(config, mesh, mode, dispatch, args.microbatches)
        run_mode(trainer, mode, args, result, path, begin + 60 * args.minutes)
    say("", report.provenance(result), "", report.losses_table(result), "", report.cost_table(result), sep="\n")
    if "requantization" in result:
        say("", report.requantization_table(result), sep="\n")
    if jax.process_index() == 0:
        report.draw(result, path.with_suffix(".svg"))
        report.draw(result, path.with_suffix(".png"))
        print(f"\n{path}, and its curves as .svg and .png")


if __name__ == "__main__":
    main()
