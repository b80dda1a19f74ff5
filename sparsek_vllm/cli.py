"""The ``sparsek`` command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sparsek_vllm._version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="sparsek", description="sparsek-vllm: attention backend for vLLM"
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="what is installed, which path would run, what is missing")
    demo = commands.add_parser("demo", help="serve a small model with our backend and ask it")
    demo.add_argument("--ask", default="What is the capital of France?", metavar="TEXT")
    demo.add_argument("--keep", action="store_true", help="leave the server running until Ctrl-C")
    demo.add_argument("--model", metavar="PATH", help="a model folder instead of the demo model")
    demo.add_argument("--port", type=int, default=8000)
    demo.add_argument("--timeout", type=int, default=240, help="seconds to wait for the server")
    bench = commands.add_parser("bench", help="time kernels and serving beside installed peers")
    bench.add_argument(
        "sets",
        nargs="*",
        metavar="SET",
        help="decode, uneven, multi-query, fp8, prefill, paged-prefill, fp8-prefill, chunks, "
        "mixed, decode-256, prefill-256, decode-sizes, prefill-sizes, small, floor, serve, load "
        "(default: all but load; floor on Hopper alone)",
    )
    bench.add_argument("--warm", action="store_true", help="inputs stay in the L2 cache")
    bench.add_argument(
        "--shape",
        default="llama-3.1-8b",
        metavar="NAME",
        help="of serve and load: llama-3.1-8b (default) or llama-3.2-1b",
    )
    bench.add_argument(
        "--kv-cache-dtype", default="auto", choices=("auto", "fp8"), help="of serve and load"
    )
    bench.add_argument(
        "--tensor-parallel-size", type=int, default=1, metavar="GPUS", help="of serve and load"
    )
    bench.add_argument(
        "--compilation-config", type=object_of, metavar="JSON", help="of serve and load, as vLLM's"
    )
    bench.add_argument("--json", metavar="FILE", help="write everything measured there")
    bench.add_argument("--plots", metavar="FOLDER", help="draw a picture for each set there")
    options = parser.parse_args(argv)
    if options.command == "bench":
        try:
            return _bench(options, bench)
        except (RuntimeError, OSError, ImportError, ValueError) as error:
            print(f"sparsek bench: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130
    if options.command == "doctor":
        from sparsek_vllm.doctor import report

        print(report())
        return 0
    from sparsek_vllm.demo import DemoError, run

    try:
        run(options.ask, options.keep, options.model, options.port, options.timeout)
    except (DemoError, ImportError, FileNotFoundError) as error:
        print(f"sparsek demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def object_of(text: str) -> dict[str, Any]:
    """A JSON object; ArgumentTypeError where the text is none."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return value


def _bench(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    import torch

    from sparsek_vllm.bench import floor, kernels, load, report, serving
    from sparsek_vllm.core import get_default_config

    known = [*kernels.SETS, "floor", "serve", "load"]
    for name in options.sets:
        if name not in known:
            parser.error(f"SET must be one of {', '.join(known)}, got {name}")
    if options.shape not in serving.SHAPES:
        parser.error(f"--shape must be one of {', '.join(serving.SHAPES)}, got {options.shape}")
    if options.plots and find_spec("matplotlib") is None:
        parser.error("--plots needs matplotlib: pip install matplotlib")
    if not torch.cuda.is_available():
        raise RuntimeError("a CUDA GPU is needed, torch finds none")
    on_hopper = torch.cuda.get_device_capability()[0] == 9
    left_out = {"load"} if on_hopper else {"load", "floor"}
    chosen = options.sets or [name for name in known if name not in left_out]
    if "floor" in chosen and not on_hopper:
        parser.error("SET floor is for Hopper alone")
    environment = kernels.environment()
    print(", ".join(f"{key} {value}" for key, value in environment.items()))
    print("L2 cache: " + ("warm" if options.warm else "cold, inputs rotate") + "\n", flush=True)
    measured: dict[str, list[kernels.Row]] = {}
    floors = served = loads = None

    def save() -> None:
        """What there is so far: a later set may fail."""
        if options.json:
            text = report.as_json(environment, measured, floors, served, loads)
            Path(options.json).write_text(text)

    save()  # now, if it cannot be written
    for name in chosen:
        if name in kernels.SETS:
            measured[name] = list(kernels.SETS[name](options.warm))
            print(report.table(name, measured[name]) + "\n", flush=True)
            save()
    if options.plots and measured:
        for path in report.plot(Path(options.plots), environment, measured):
            print(path)
    kernels.free_memory()  # for engines
    if "floor" in chosen:
        floors = floor.run(get_default_config().build_path())
        print(floor.table(floors) + "\n", flush=True)
        save()
    if "serve" in chosen:
        served = serving.run(
            options.shape,
            kv_cache_dtype=options.kv_cache_dtype,
            tensor_parallel_size=options.tensor_parallel_size,
            compilation_config=options.compilation_config,
        )
        save()
    if "load" in chosen:
        loads = load.run(
            options.shape,
            kv_cache_dtype=options.kv_cache_dtype,
            tensor_parallel_size=options.tensor_parallel_size,
            compilation_config=options.compilation_config,
        )
        save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
