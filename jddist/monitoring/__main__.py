"""``python -m jddist.monitoring report RUN_DIR``: one HTML page of what was recorded."""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jddist.monitoring", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    page = commands.add_parser("report", help="write one self-contained HTML page of a run")
    page.add_argument("run_dir", help="the folder that was given to the recorder")
    page.add_argument("--out", help="the file to write (default: RUN_DIR/report.html)")
    figures = commands.add_parser("plot", help="write every figure of a run as an image")
    figures.add_argument("run_dir", help="the folder that was given to the recorder")
    figures.add_argument("--out", required=True, help="the folder to write to")
    figures.add_argument("--format", default="png", choices=["png", "svg", "pdf"])
    args = parser.parse_args(arguments)
    try:
        if args.command == "report":
            from .report import report

            print(report(args.run_dir, args.out))
        else:
            from .plots import save_all

            for path in save_all(args.run_dir, args.out, args.format):
                print(path)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
