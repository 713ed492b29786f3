"""The page: an introduction and every report that a folder holds.

python -m benchmarks.render [FOLDER]     benchmarks/results by default
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.common import RESULTS, Report

ORDER = (
    "products",
    "solvers",
    "model_quantization",
    "evaluation",
    "side_by_side",
    "sweep",
    "memory",
    "growth",
    "startup",
)
INTRODUCTION = Path(__file__).parent / "introduction.md"


def render(folder: Path) -> str:
    """The page of the reports in a folder."""
    introduction = INTRODUCTION.read_text(encoding="utf-8")
    reports = [Report.load(folder / f"{n}.json") for n in ORDER if (folder / f"{n}.json").is_file()]
    if not reports:
        return f"{introduction}\nNo report yet.\n"
    return "\n".join([introduction, *(f"{report.markdown()}\n" for report in reports)])


def write(folder: Path) -> Path:
    """Write the page: beside this file for the reports kept, else into the folder itself."""
    kept = folder.resolve() == RESULTS.resolve()
    page = (Path(__file__).parent if kept else folder) / "README.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(render(folder), encoding="utf-8")
    return page


if __name__ == "__main__":
    given = argparse.ArgumentParser(description="Write the page of a folder of reports.")
    given.add_argument("folder", type=Path, nargs="?", default=RESULTS)
    write(given.parse_args().folder)
