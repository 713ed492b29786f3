"""Run every benchmark, one after the other, each in a process of its own, and write the page.

    python -m benchmarks.run [--quick] [--data DIR] [--only solvers,memory]

What a script needs and does not find (real data) it says in one line, and the next one runs.
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks import common, render

SCRIPTS = (
    "products",
    "solvers",
    "model_quantization",
    "evaluation",
    "side_by_side",
    "sweep",
    "memory",
    "startup",
    "growth",
)


def main() -> int:
    """The number of scripts that could not run."""
    given = common.parser(__doc__ or "")
    given.add_argument("--only", default=",".join(SCRIPTS), help="comma-separated")
    given.set_defaults(repeats=None)  # a script has its own number unless one is asked for
    options = given.parse_args()
    passed = ["--threads", str(options.threads), "--work", str(options.work)]
    passed += ["--quick"] if options.quick else []
    passed += ["--data", str(options.data)] if options.data else []
    passed += ["--output", str(options.output)] if options.output else []
    passed += ["--repeats", str(options.repeats)] if options.repeats else []
    failed = []
    for name in options.only.split(","):
        print(f"\n== {name}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}", *passed]
        variables = common.child_environment(options.threads)
        if subprocess.run(command, cwd=common.ROOT, env=variables).returncode:
            failed.append(name)
    folder = common.output_folder(options)
    page = render.write(folder)
    shown = page.relative_to(common.ROOT) if page.is_relative_to(common.ROOT) else page
    print(f"\npage: {shown}" + (f"\nnot run: {', '.join(failed)}" if failed else ""))
    return len(failed)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
