"""What the transformers backend says: errors on what it cannot serve, the table of families, and the page's scripts."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import hf_families as tiny
import pytest
import torch

transformers = pytest.importorskip("transformers")

import moe_kernels as mk  # noqa: E402
from moe_kernels.hf import families  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "hugging_face.md").read_text()


@pytest.mark.parametrize("family, instead", [("dots1", "set_experts_implementation('moe_kernels')"),
                                             ("llama", "moe_kernels.MoE builds such layers")])
def test_an_unknown_family_names_itself_and_what_to_use(family, instead):
    config = transformers.AutoConfig.for_model(family, **{**tiny.COMMON, **tiny.GROUPS})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=rf"deepseek_v2.*got {type(model).__name__} \(model_type {family}\)") as error:
        mk.replace_moe_layers(model)
    assert instead in str(error.value)


def test_transformers_that_cannot_be_imported_says_why(tmp_path, monkeypatch):
    (tmp_path / "transformers.py").write_text("import a_package_that_it_needs")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "transformers")
    with pytest.raises(ImportError, match="and importing it fails: No module named 'a_package_that_it_needs'"):
        mk.hf.register()


@pytest.mark.parametrize("call", [mk.hf.register, lambda: mk.replace_moe_layers(torch.nn.Linear(1, 1)), families.table])
def test_transformers_missing_or_too_old(monkeypatch, call):
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    with pytest.raises(ImportError, match=f"wants transformers 5.7 or newer, got {transformers.__version__}") as error:
        call()
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="wants transformers 5.7 or newer, which is not installed") as error:
        call()
    assert "\n" not in str(error.value)


def test_an_interface_without_foreign_backends_is_too_old(monkeypatch):
    from transformers.integrations import moe

    monkeypatch.setattr(moe, "use_experts_implementation", lambda experts_class=None, *, is_transposed=False: None)
    with pytest.raises(ImportError, match=f"got {transformers.__version__}, whose models take no other experts: pip"):
        mk.hf.register()


def test_importing_the_package_does_not_import_transformers():
    code = "import sys, moe_kernels, moe_kernels.hf; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr


def test_the_table_of_families_is_current():
    written = re.search(r"<!-- families:begin -->\n(.*?)\n<!-- families:end -->", PAGE, re.DOTALL).group(1)
    version = re.match(r"transformers (\S+):", written).group(1)
    if version != transformers.__version__:
        pytest.skip(f"the table was made with transformers {version}, this is {transformers.__version__}")
    assert families.table() == written, "run python -m moe_kernels.hf and put its table into docs/hugging_face.md"


def test_the_module_prints_the_table(capsys, monkeypatch):
    monkeypatch.setattr(families, "table", lambda: "the table")
    runpy.run_module("moe_kernels.hf", run_name="__main__")
    assert capsys.readouterr().out == "the table\n"
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match="^moe_kernels.hf wants transformers 5.7 or newer, which is not installed"):
        runpy.run_module("moe_kernels.hf", run_name="__main__")


def test_the_table_agrees_with_the_models():
    rows = {row.family: row for row in families.rows()}
    served = {family: row for family, row in rows.items() if "interface" not in row.detail}
    assert len(served) >= 20
    for model_type, (_, route) in tiny.FAMILIES.items():
        row = served.get(model_type.removesuffix("_text"))
        assert row is None or row.route == route, model_type


BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
SCRIPTS = [code for language, code in BLOCKS if language == "python"]


@pytest.mark.parametrize("index", range(len(SCRIPTS)))
def test_scripts_of_the_page(index, capsys):
    exec(compile(SCRIPTS[index], "docs/hugging_face.md", "exec"), {})
    printed = capsys.readouterr().out
    assert index == 0 or sorted(printed.splitlines()) == sorted(
        next(code for language, code in BLOCKS if language == "text").splitlines())
