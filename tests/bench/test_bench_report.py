"""Tables and plots of handmade results and of the committed results."""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from adax_triton.bench.report import command as report
from adax_triton.bench.report import plots
from adax_triton.bench.step import table as step_table
from paths import ROOT

COMMITTED = sorted((ROOT / "bench" / "results").glob("*.json"))
PUBLISHED = report.files_of(ROOT / "README.md")
ENVIRONMENT = {"device": "A Machine", "threads": 3, "torch": "2.13", "commit": "abc123", "date": "2026-01-02T03:04:05"}
ENVIRONMENT |= {"driver": "580.1"}


def step(**of_adaxw: Any) -> dict[str, Any]:
    row = {"median_ms": 2.0, "p20_ms": 1.0, "p80_ms": 3.5, "gb_per_s": 14.0, "copy_share": 0.5}
    rows = {"adax_triton.AdaXW": {**row, **of_adaxw}, "another": {"absent": "ImportError: no | such"}, "copy": row}
    workload = {"name": "flat 10", "numel": 10, "tensors": 1, "providers": rows}
    return {
        "environment": ENVIRONMENT,
        "rounds": 2,
        "dtype": "float32",
        "bytes_per_element": 28.0,
        "workloads": [workload],
    }


def scaling() -> dict[str, Any]:
    points = [{"numel": n, "tensors": 1, "median_ms": n / 1e3, "p20_ms": 1, "p80_ms": 1} for n in (10, 1000)]
    slopes = {f"{line}_slope{last}": 1.0 for line in ("elements", "tensors") for last in ("", "_last")}
    rows = {"copy": {"elements": points, "tensors": points, **slopes}, "adax_triton.AdaXW": {"absent": "why"}}
    top = {"benchmark": "scale", "environment": ENVIRONMENT, "rounds": 1, "dtype": "float32", "tensor_size": 10}
    return {**top, "too_large": [], "copy_bytes_per_s": 5e9, "providers": rows}


def training() -> dict[str, Any]:
    shape = {"layers": 1, "width": 8, "ranks": 1, "batch": 1, "context": 8, "steps": 3, "warmup": 0, "clipping": 1.0}
    row = {"tokens_per_s": 10.0, "median_ms": 1, "p20_ms": 1, "p80_ms": 1, "optimizer_share": 0.5, "loss": 2.0}
    row |= {"peak_bytes": 2e6, "host_peak_bytes": 2e6, "host_before_bytes": 1e6, "state_bytes": 5e5}
    rows = {"plain / AdaXW": {**row, "optimizer_class": "a.b.AdaXW"}, "ZeRO-1 / AdaXW": {"absent": "why"}}
    top = {"benchmark": "train", "environment": ENVIRONMENT, "dtype": "float32", "device": "cpu"}
    return {**top, **shape, "cases": rows}


def norms() -> dict[str, Any]:
    row = {"median_ms": 2.0, "p20_ms": 1.0, "p80_ms": 3.5, "gb_per_s": 1400.0}
    rows = {"adax_triton": row, "torch get_total_norm": row, "copy": {**row, "gb_per_s": 2800.0}}
    workloads = [{"name": "flat 10", "dtype": "bfloat16", "rows": rows}]
    return {"benchmark": "norm", "environment": ENVIRONMENT, "workloads": workloads}


def written(folder: Path, name: str, result: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(result))
    return folder / name


def run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    return report.main(parser.parse_args([str(word) for word in words]))


def test_table_shows_the_measured_values() -> None:
    result = step()
    result["workloads"][0]["providers"]["one"] = {"absent": "not | here"}
    result["workloads"].append(
        {"name": "two", "providers": {"another": {"median_ms": 3.0}, "one": {"absent": "not | here"}}}
    )
    assert step_table.table(result).splitlines() == [
        f"float32, 28 bytes per element. {step_table.LEGEND}",
        "",
        "| flat 10 | median ms | p20 | p80 | GB/s | of copy |",
        "|---|---|---|---|---|---|",
        "| adax_triton.AdaXW | 2.000 | 1.000 | 3.500 | 14.0 | 50% |",
        "| another | absent: ImportError: no / such |  |  |  |  |",
        "| copy | 2.000 | 1.000 | 3.500 | 14.0 | 50% |",
        "",
        "| two | median ms |",
        "|---|---|",
        "| another | 3.000 |",
        "",
        "Absent: one: not | here.",
    ]


def test_empty_columns_are_omitted() -> None:
    more = {"mode": "bf16", "bytes_per_element": 14.0625, "host_us": 31.4, "peak_bytes": 25e6, "launches": 2}
    lines = step_table.table(step(**more)).splitlines()
    titles = "mode | median ms | p20 | p80 | bytes/element | GB/s | of copy | host us | launches | peak MB"
    assert lines[2] == f"| flat 10 | {titles} |"
    assert lines[4] == "| adax_triton.AdaXW | bf16 | 2.000 | 1.000 | 3.500 | 14.06 | 14.0 | 50% | 31 | 2 | 25 |"
    assert lines[5] == "| copy |  | 2.000 | 1.000 | 3.500 |  | 14.0 | 50% |  |  |  |"
    assert lines[-1] == "Absent: another: ImportError: no | such."
    assert {line.count("|") for line in lines[2:6]} == {12}


def test_other_modes_are_compared_with_fp32() -> None:
    result = step(mode="fp32")
    rows = result["workloads"][0]["providers"]
    rows["adax_triton.AdaXW, bf16 + 8bit_v16"] = {"mode": "bf16 + 8bit_v16", "median_ms": 0.5}
    lines = step_table.table(result).splitlines()
    assert lines[2].endswith("| fp32 / this |")
    assert lines[4].endswith("| 50% |  |")
    assert lines[6] == "| adax_triton.AdaXW | bf16 + 8bit_v16 | 0.500 |  |  |  |  | 4.00 |"


def test_every_kind_of_result_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = {"step.json": step(), "scale.json": scaling(), "train.json": training(), "norm.json": norms()}
    files = [written(tmp_path, name, result) for name, result in made.items()]
    assert run(*files, *COMMITTED) == 0
    printed = capsys.readouterr().out
    for path in COMMITTED:
        environment = json.loads(path.read_text())["environment"]
        assert f"## {path.stem}\n" in printed
        assert f"commit {environment['commit']}" in printed
    assert "| flat 10 | bfloat16 | adax_triton | 2.000 | 1.000 | 3.500 | 1,400 | 50% |" in printed
    for kind in ("step", "scale", "train", "norm", "precision", "long run", "modes", "passes"):
        assert f"\n{kind}: " in printed
    assert "step: A Machine, driver 580.1, 3 threads, torch 2.13, commit abc123, 2026-01-02\n" in printed


def test_summary_compares_each_mode_with_the_fastest_other_provider() -> None:
    mode = "bf16 + 8bit_v16 + 24-bit masters"
    ours = {"mode": "fp32", "median_ms": 2.0, "bytes_per_element": 28.0, "copy_share": 0.99}
    rows: dict[str, dict[str, Any]] = {
        "adax_triton.AdaXW": ours,
        "adax_triton.AdamW": ours | {"median_ms": 1.0},  # also of this package
        "torch AdamW fused": {"mode": "fp32", "median_ms": 3.0},
        "another": {"mode": "fp32", "median_ms": 2.5},
        "absent": {"mode": "fp32", "absent": "not here"},
        f"adax_triton.AdaXW, {mode}": {
            "mode": mode,
            "median_ms": 0.75,
            "bytes_per_element": 14.0625,
            "copy_share": 0.5,
        },
    }
    large = {"numel": 1000, "tensors": 1, "providers": rows}
    small = {"numel": 5, "tensors": 1, "providers": {"adax_triton.AdaXW": ours | {"median_ms": 0.1}}}
    many = {"numel": 9999, "tensors": 3, "providers": {}}
    lines = step_table.summary({"workloads": [small, large, many]}).splitlines()
    assert lines[0] == "One step of 1,000 weights in one tensor."
    assert lines[4:] == [
        "| fp32 | 28 | 2.00 | 99% | 1.50 | another: 2.50 ms |",
        f"| {mode} | 14.06 | 0.75 | 50% | 4.00 |  |",
    ]


def test_readme_contains_the_committed_numbers() -> None:
    text = (ROOT / "README.md").read_text()
    for path in PUBLISHED:
        flat = [one for one in json.loads(path.read_text())["workloads"] if one["tensors"] == 1]
        for mode in ("fp32", "bf16 + 8bit_v16 + 24-bit masters"):
            label = "adax_triton.AdaXW" if mode == "fp32" else f"adax_triton.AdaXW, {mode}"
            row = flat[-1]["providers"][label]
            assert f"| {mode} | {row['bytes_per_element']:.4g} | {row['median_ms']:.2f} | " in text


def test_readme_accepts_only_step_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    assert run(written(tmp_path, "train.json", training()), "--readme", readme) == 2
    assert "'train'" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"benchmark": "another", "environment": {}}'])
def test_invalid_result_file_is_named_in_the_error(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong.json").write_text(text)
    assert run(tmp_path / "wrong.json") == 2
    assert "wrong.json" in capsys.readouterr().err


def test_tables_and_plots_are_written_to_the_folder(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = {"step.json": step(), "scale.json": scaling(), "train.json": training()}
    files = [written(tmp_path, name, result) for name, result in made.items()]
    out = tmp_path / "out"
    no_picture = ROOT / "bench" / "results" / "gpt-modes.json"
    assert run(*files, PUBLISHED[0], no_picture, "--out", out) == 0
    drawn = {path.stem for path in out.glob("*.png")}
    assert drawn == {"step", "scale", "train", PUBLISHED[0].stem}
    assert all((out / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in drawn)
    text = (out / "report.md").read_text()
    assert all(f"]({name}.png)" in text for name in drawn)


def test_picture_has_a_bar_for_each_time_in_the_readme_table(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (axes,) = plots.steps(json.loads(PUBLISHED[0].read_text())).axes
    bars = dict(zip([label.get_text() for label in axes.get_yticklabels()], axes.patches, strict=True))
    text = (ROOT / "README.md").read_text()
    assert len(bars) > 6 and "torch AdamW fused, fp32" in bars
    for label, bar in bars.items():
        name, _, mode = label.partition(", ")
        cell = f"{bar.get_width():.2f}"
        assert name == "torch AdamW fused" or re.search(rf"^\| {re.escape(mode)} \|.*\b{cell}\b", text, re.MULTILINE)
    assert run(PUBLISHED[0], "--picture", tmp_path / "speed.png") == 0
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_duplicate_file_names_are_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [written(tmp_path / folder, "step.json", step()) for folder in ("a", "b")]
    assert run(*files, "--out", tmp_path / "out") == 2
    assert "same name" in capsys.readouterr().err


def test_missing_matplotlib_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    file = written(tmp_path, "step.json", step())
    assert run(file, "--out", tmp_path / "out") == 2
    assert "adax-triton[bench]" in capsys.readouterr().err
    assert run(file) == 0  # tables do not need matplotlib


def test_only_the_readme_section_is_replaced(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n")
    files = [written(tmp_path / "results", name, step()) for name in ("one.json", "two.json")]
    assert run(*files, "--readme", readme) == 0
    first = readme.read_text()
    assert first.startswith(f"before\n\n{report.BEGIN}\nFrom `results/one.json`: A Machine, driver 580.1, 3 threads, ")
    assert first.endswith(f"|\n{report.END}\n\nafter\n")
    assert "old" not in first
    assert report.files_of(readme) == files
    assert f"{report.BEGIN}\n{report.section(files, tmp_path)}{report.END}" in first
    assert run("--readme", readme) == 0  # regenerates from the files that the section names
    assert readme.read_text() == first


@pytest.mark.parametrize("text", ["", "<!-- bench:begin -->", "<!-- bench:end --> <!-- bench:begin -->"])
def test_readme_without_markers_is_unchanged(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text)
    assert run(written(tmp_path, "step.json", step()), "--readme", readme) == 2
    assert "bench:begin" in capsys.readouterr().err
    assert readme.read_text() == text


def test_readme_matches_the_committed_results() -> None:
    assert PUBLISHED
    assert f"{report.BEGIN}\n{report.section(PUBLISHED, ROOT)}{report.END}" in (ROOT / "README.md").read_text()


def test_report_matches_the_committed_results() -> None:
    folder = ROOT / "docs" / "benchmarks"
    text = (folder / "report.md").read_text()
    stems = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    files = [ROOT / "bench" / "results" / f"{stem}.json" for stem in stems]
    assert set(PUBLISHED) <= set(files)
    assert text == report.document(files, pictures=True)
    assert set(re.findall(r"\]\((.*?\.png)\)", text)) == {path.name for path in folder.glob("*.png")}


def test_report_without_files_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    assert "files" in capsys.readouterr().err
