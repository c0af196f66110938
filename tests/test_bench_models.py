"""The benchmark of whole transformers models: a run from end to end, and that a wrong one is noticed."""

import pytest
import torch
from test_bench import DEVICES

from bench import models, report, results_file
from bench.__main__ import main


@pytest.mark.parametrize("device", DEVICES)
def test_whole_models(device, tmp_path, capsys):
    pytest.importorskip("transformers")
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    arguments = ["--device", device, "--quick", "--save", "--results", str(results), "--readme-file", str(readme)]
    assert main([*arguments, "--shape", "quick", "--pass", "forward", "--peers", "none"]) == 0
    rows = results_file.read_all(results)[0][1]["results"]
    assert rows and main([*arguments, "--models"]) == 0
    assert "replace_moe_layers is" in capsys.readouterr().out
    (_, content), = results_file.read_all(results)
    result = content["models"]
    assert content["results"] == rows and result["ms"].keys() == result["times_as_fast"].keys() == {"prefill", "train"}
    for name, times in result["ms"].items():
        assert list(times) == ["moe_kernels", "replace_moe_layers", "grouped_mm", "eager"] and min(times.values()) > 0
        assert result["times_as_fast"][name]["moe_kernels"]["eager"] == times["eager"] / times["moe_kernels"]
        line = f"| {name} | moe_kernels | {times['moe_kernels']:.2f} | "
        assert line + f"{result['times_as_fast'][name]['moe_kernels']['grouped_mm']:.2f} | " in readme.read_text()


def test_a_wrong_model_is_not_timed(monkeypatch):
    pytest.importorskip("transformers")
    from moe_kernels.hf import backend

    forward = backend.experts_forward
    monkeypatch.setattr(backend, "experts_forward", lambda module, x, ids, weights: forward(module, x, ids, -weights))
    with pytest.raises(models.WrongModel, match="moe_kernels: hidden states differ from eager's by"):
        models.measure_models(torch.bfloat16, torch.device("cpu"), quick=True, budget_s=0.01)
