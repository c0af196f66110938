"""The results files and what is made of them: merging, the summary, README's block, the check."""

import json

import pytest
from test_bench import LIMITS, ROOT

from bench import report, results_file
from bench.__main__ import main


def result_row(**changes):
    row = {"shape": "olmoe", "num_tokens": 4096, "pass": "forward", "dtype": "bf16", "routing": "uniform",
           "impl": "moe_kernels", "ms": 2.0, "floor_ms": 1.0, "share": 0.5, "tflop_per_s": 100.0, "gb_per_s": None,
           "peak_extra_mb": 1.0, "timing": "graph"}
    return {**row, **changes}


def results_content(rows, root=ROOT):
    return {"card": "NVIDIA H100 80GB HBM3", "date": "2026-11-24T10:00:00+00:00", "versions": {"torch": "2.11.0"},
            "source_hash": results_file.source_hash(root), "limits": LIMITS.as_json(),
            "tests": {"passed": 3, "failed": 0, "skipped": 1}, "failures": [], "results": rows}


@pytest.mark.parametrize("card, expected", [
    ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA GeForce RTX 4090", "rtx-4090"),
    ("NVIDIA L4", "l4"), ("CPU x86_64", "cpu-x86")])
def test_slug(card, expected):
    assert results_file.slug(card) == expected


def test_source_hash_sees_names_and_contents_and_no_binaries(tmp_path):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "moe_kernels").mkdir()
    (tmp_path / "csrc" / "a.cu").write_text("one")
    first = results_file.source_hash(tmp_path)
    (tmp_path / "moe_kernels" / "_C.so").write_text("binary")
    (tmp_path / "moe_kernels" / "__pycache__").mkdir()
    (tmp_path / "moe_kernels" / "__pycache__" / "a.py").write_text("cache")
    assert results_file.source_hash(tmp_path) == first
    (tmp_path / "csrc" / "a.cu").write_text("two")
    second = results_file.source_hash(tmp_path)
    (tmp_path / "csrc" / "a.cu").rename(tmp_path / "csrc" / "b.cu")
    assert len({first, second, results_file.source_hash(tmp_path)}) == 3


def test_a_second_run_on_the_same_sources_keeps_the_other_rows():
    previous = results_content([result_row(ms=9.0), result_row(**{"pass": "train"})])
    merged = results_file.merge(previous, {**results_content([result_row(ms=1.0)]), "tests": None})
    assert [(row["pass"], row["ms"]) for row in merged["results"]] == [("train", 2.0), ("forward", 1.0)]
    assert merged["tests"] == {"passed": 3, "failed": 0, "skipped": 1}
    with_peer = results_content([result_row(ms=9.0), result_row(impl="vllm", ms=3.0)])
    merged = results_file.merge(with_peer, results_content([result_row(ms=1.0)]))
    assert [row["impl"] for row in merged["results"]] == ["moe_kernels"]  # no ratio of one run to another
    rowless = {**results_content([]), "limits": {}, "date": "later", "failures": ["new"]}
    merged = results_file.merge({**previous, "failures": ["old"]}, rowless)
    assert (merged["limits"], merged["date"]) == (previous["limits"], previous["date"])
    assert merged["failures"] == ["old", "new"] and len(merged["results"]) == 2
    other = {**previous, "source_hash": "0"}
    assert len(results_file.merge(other, results_content([result_row()]))["results"]) == 1


def test_counts_of_tests(tmp_path):
    path = tmp_path / "junit.xml"
    path.write_text('<testsuites><testsuite tests="10" failures="1" errors="1" skipped="3"/></testsuites>')
    assert results_file.tests_from_junit(path) == {"passed": 5, "failed": 2, "skipped": 3}
    assert results_file.tests_from_text("812,0,3") == {"passed": 812, "failed": 0, "skipped": 3}
    with pytest.raises(ValueError, match="PASSED,FAILED,SKIPPED"):
        results_file.tests_from_text("many")


def test_summary_has_the_geometric_mean_and_names_what_is_slower():
    rows = [result_row(), result_row(impl="hf_grouped_mm", ms=8.0),
            result_row(shape="mixtral", num_tokens=8192, ms=4.0),
            result_row(shape="mixtral", num_tokens=8192, impl="hf_grouped_mm", ms=2.0)]
    line, = report.summary(rows)
    assert "1.41 times as fast as Hugging Face's grouped_mm" in line and "2 cases" in line  # sqrt(4 * 0.5)
    assert line.endswith("slower in mixtral 8192 (0.50).")


def test_the_fastest_of_other_kernels_stands_beside_ours():
    rows = [result_row(), result_row(impl="hf_grouped_mm", ms=8.0), result_row(impl="vllm", ms=3.0),
            result_row(impl="sonic_moe", ms=1.0), result_row(**{"pass": "train"}),
            result_row(**{"pass": "train", "impl": "hf_grouped_mm"})]
    forward, train = report.summary(rows)
    assert "0.50 times as fast as the fastest of sonic_moe, vllm" in forward and forward.endswith("(0.50).")
    assert "the fastest" not in train and "sonic" not in train
    text = "\n".join(report.card_section(results_content(rows), "h100"))
    assert "| 4.00 | sonic_moe | 1.000 | 0.50 |" in text and text.count("fastest of the others") == 1


def test_readme_shows_skew_memory_and_host_time_where_they_were_measured():
    plain = "\n".join(report.card_section(results_content([result_row()]), "h100"))
    assert "Skewed" not in plain and "Host time" not in plain and "S*(I + H)" not in plain
    extra = {"floor_ms": None, "share": None, "shape": "olmoe", "num_tokens": 4096}
    rows = [result_row(extra_over_rows=1.04), result_row(num_tokens=32768, extra_over_rows=1.1),
            result_row(**{"pass": "train", "backward_extra_over_rows": 0.98}),
            result_row(impl="hf_grouped_mm", extra_over_rows=7.0),
            result_row(**{"pass": "skew:forward", "routing": "zipf", "over_uniform": 1.03, **extra}),
            result_row(**{"pass": "skew:forward", "routing": "same", "over_uniform": 0.91, **extra}),
            result_row(**{"pass": "skew:train", "routing": "zipf", "over_uniform": 1.06, **extra}),
            result_row(**{"pass": "host:forward", "in_operations": 7.62, "shape": "qwen3-30b", "num_tokens": 64}),
            result_row(**{"pass": "host:forward", "in_operations": 37.0, "shape": "qwen3-30b", "num_tokens": 64,
                          "impl": "hf_grouped_mm"})]
    text = "\n".join(report.card_section(results_content(rows), "h100"))
    assert "| olmoe | 4096 | 1.03 | 1.06 | 0.91 | - |" in text
    assert "inference: 1.04 to 1.10 times S*(I + H) elements." in text
    assert "backward: 0.98 times S*(I + H) elements." in text
    assert "qwen3-30b with 64 tokens" in text and "moe_kernels 7.6, hf_grouped_mm 37.0." in text


def test_check_tells_what_is_stale(tmp_path):
    for folder in ("csrc", "moe_kernels", "results"):
        (tmp_path / folder).mkdir()
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(f"top\n{report.BEGIN}\n{report.END}\nbottom\n")
    report.fill_readme(readme, results)
    assert report.NO_RESULTS in readme.read_text()
    assert ["there is no results file" in problem for problem in report.check(readme, results, tmp_path)] == [True]

    rows = [result_row(), result_row(impl="hf_grouped_mm", ms=3.0, timing="eager")]
    results_file.write(results / "h100.json", results_content(rows, tmp_path))
    assert json.loads((results / "h100.json").read_text()) == results_content(rows, tmp_path)
    assert "README.md does not show" in report.check(readme, results, tmp_path)[0]
    report.fill_readme(readme, results)
    assert report.check(readme, results, tmp_path) == []
    text = readme.read_text()
    assert text.startswith("top\n") and text.endswith("\nbottom\n")
    assert "| olmoe | 4096 | 2.000 | 100 | 0.50 | 3.000* | 1.50 |" in text and "3 passed, 0 failed, 1 skipped" in text

    (tmp_path / "csrc" / "new.cu").write_text("changed")
    assert ["h100.json is stale" in problem for problem in report.check(readme, results, tmp_path)] == [True]


def test_the_stored_readme_block_is_that_of_the_stored_results():
    readme = (ROOT / "README.md").read_text()
    assert report.readme_block() in readme


def test_test_counts_go_into_the_newest_file(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    for name, day in (("a.json", "2026-11-27"), ("b.json", "2026-11-26")):
        results_file.write(tmp_path / name, {**results_content([result_row()]), "date": f"{day}T10:00:00+00:00"})
    assert main(["--readme", "--tests", "6,0,0", "--results", str(tmp_path), "--readme-file", str(readme)]) == 0
    assert "into a.json" in capsys.readouterr().out
    passed = [content["tests"]["passed"] for _, content in results_file.read_all(tmp_path)]
    assert passed == [6, 3]
