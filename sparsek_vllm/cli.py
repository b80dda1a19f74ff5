"""The ``sparsek`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

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
    options = parser.parse_args(argv)
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


if __name__ == "__main__":
    sys.exit(main())
