"""Run the tests of deepspeed_acceptance.toml under the DeepSpeed that is installed, and write what they show.

Usage: python tests/support/acceptance_table.py [--table-only]

The outcome of each row goes to docs/deepspeed-acceptance-VERSION.json, and docs/deepspeed-acceptance.md is made of all
those files. `make acceptance DEEPSPEED=VERSION` does it in an environment of its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from paths import ROOT, SUPPORT, TESTS

DOCS = ROOT / "docs"
TABLE = DOCS / "deepspeed-acceptance.md"
PASSED = "passed"

Row = dict[str, Any]
INTRODUCTION = """\
# AdaX under DeepSpeed: what was run

Made by `make acceptance`, or `make acceptance DEEPSPEED=VERSION` for another version, from
`tests/support/deepspeed_acceptance.toml`; do not edit.

z0 to z3 are ZeRO stages. "Refused" is an error at the start, or before
anything is loaded, that names the setting and the remedy. "Reference" is the same training in one process without
DeepSpeed, on float32 masters. All of it ran on gloo ranks on a CPU, two if nothing else is said, where fp16 is
DeepSpeed's own path with its check for a device that has it taken out. What a GPU alone can show (pinned memory,
streams, states that leave the device) did not run.

"""


def rows() -> list[Row]:
    with (SUPPORT / "deepspeed_acceptance.toml").open("rb") as file:
        return tomllib.load(file)["row"]


def run_tests(files: list[str]) -> dict[str, str]:
    """Run whole test files and return {FILE::NAME[PARAMETER]: "passed", "failed" or "skipped: why"}."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [Path(sys.executable).with_name("pytest"), f"--junit-xml={report}", *files]
        subprocess.run(command, cwd=TESTS, check=False)  # a row says what became of its tests
        return {_name(case): _outcome(case) for case in ElementTree.parse(report).iter("testcase")}


def _name(case: ElementTree.Element) -> str:
    room, _, file = case.get("classname", "").rpartition(".")
    return f"{room.rpartition('.')[2]}/{file}.py::{case.get('name')}"


def _outcome(case: ElementTree.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    skipped = case.find("skipped")
    return PASSED if skipped is None else f"not run: {skipped.get('message')}"


def outcome_of_row(row: Row, outcomes: dict[str, str]) -> str:
    """Return what became of all tests of a row: "passed", or the first other outcome."""
    found = [[o for test, o in outcomes.items() if name in (test, test.partition("[")[0])] for name in row["tests"]]
    if not all(found):
        return f"not run: no test {row['tests'][found.index([])]}"
    return next((outcome for of_test in found for outcome in of_test if outcome != PASSED), PASSED)


def table(rows: list[Row], runs: list[dict[str, Any]]) -> str:
    """Return the table as Markdown: a column for each run, oldest DeepSpeed first."""
    from adax_triton.bench.harness.origin import origin

    versions = [run["environment"]["deepspeed"] for run in runs]
    lines = [f"- {origin(run)}" for run in runs]
    head = ["#", "configuration", "expected", "result", *(f"DeepSpeed {version}" for version in versions), "tests"]
    lines += ["", _line(head), _line(["---"] * len(head))]
    for number, row in enumerate(rows, start=1):
        outcomes = [run["rows"].get(str(number), "not run") for run in runs]
        result = row["result"] if PASSED in outcomes else "-"
        tests = ", ".join(f"`{test}`" for test in row["tests"])
        lines.append(_line([str(number), row["config"], row["expected"], result, *outcomes, tests]))
    return INTRODUCTION + "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def recorded_runs() -> list[dict[str, Any]]:
    runs = [json.loads(path.read_text()) for path in DOCS.glob("deepspeed-acceptance-*.json")]
    return sorted(runs, key=lambda run: [int(part) for part in run["environment"]["deepspeed"].split(".")])


def record_run() -> dict[str, Any]:
    import torch
    from adax_triton.bench.harness.environment import describe

    files = {test.partition("::")[0] for row in rows() for test in row["tests"]}
    outcomes = run_tests(sorted(file for file in files if (TESTS / file).exists()))
    found = {str(number): outcome_of_row(row, outcomes) for number, row in enumerate(rows(), start=1)}
    run = {"environment": describe(torch.device("cpu")), "rows": found}
    path = DOCS / f"deepspeed-acceptance-{run['environment']['deepspeed']}.json"
    path.write_text(json.dumps(run, indent=1) + "\n")
    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table-only", action="store_true", help="write the table from the files that are there")
    run = {"rows": {}} if parser.parse_args().table_only else record_run()
    TABLE.write_text(table(rows(), recorded_runs()))
    for number, outcome in run["rows"].items():
        print(f"{number:>2} {outcome}")
    return int("failed" in run["rows"].values())


if __name__ == "__main__":
    sys.exit(main())
