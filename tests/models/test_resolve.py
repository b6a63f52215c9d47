"""Where a model's name leads: a directory, Hugging Face, or ModelScope."""

import json
import sys
from types import ModuleType

import pytest

from fedfora.models.adapter_base import add_adapter
from fedfora.models.loading import load_base
from fedfora.models.resolve import check_start, model_path
from fedfora.models.saving import adapter_config
from fedfora.models.settings import AdapterArguments, ModelArguments

ID = "baichuan-inc/Baichuan2-7B-Chat"


@pytest.fixture
def modelscope(monkeypatch, tiny_dir):
    """A stand-in for the package: every id is the tiny base, except one that does not exist."""
    calls = []

    def snapshot_download(model_id, **options):
        calls.append((model_id, options))
        if model_id == "nobody/nothing":
            raise RuntimeError("404: no such model")
        return tiny_dir

    module = ModuleType("modelscope")
    module.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "modelscope", module)
    return calls


def test_hugging_face_is_the_default_and_gets_the_id(modelscope):
    assert model_path(ID) == ID
    assert modelscope == []


def test_a_model_of_modelscope_is_downloaded_once_without_code(modelscope, tiny_dir):
    settings = ModelArguments(
        model_name_or_path=ID, hub="modelscope", cache_dir="cache", quantization="none"
    )
    base = load_base(settings)
    ((model_id, options),) = modelscope
    assert model_id == ID
    assert options["cache_dir"] == "cache"
    assert "*.py" in options["ignore_patterns"]
    assert base.model.config.hidden_size == 64


def test_an_adapter_records_the_name_and_not_the_directory(modelscope):
    settings = ModelArguments(model_name_or_path=ID, hub="modelscope", quantization="none")
    model = add_adapter(load_base(settings), AdapterArguments(lora_rank=2), seed=1)
    assert adapter_config(model)["base_model_name_or_path"] == ID


def test_an_adapter_on_the_bundled_base_records_its_name_too():
    base = load_base(ModelArguments(model_name_or_path="clinic-base", quantization="none"))
    model = add_adapter(base, AdapterArguments(lora_rank=2), seed=1)
    assert adapter_config(model)["base_model_name_or_path"] == "clinic-base"


def test_directories_and_the_bundled_base_win_over_any_hub(modelscope, tiny_dir):
    assert model_path(tiny_dir, hub="modelscope") == tiny_dir
    assert model_path("clinic-base", hub="modelscope") == model_path("clinic-base")
    assert model_path("our/clinic-base") == "our/clinic-base"  # an id, however near the name
    assert modelscope == []


def test_a_model_that_modelscope_does_not_have_is_named(modelscope):
    with pytest.raises(ValueError, match=r"--model_name_or_path nobody/nothing: ModelScope .*404"):
        model_path("nobody/nothing", hub="modelscope")


def test_without_the_package_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ValueError, match=r'pip install "fedfora\[modelscope\]"'):
        model_path(ID, hub="modelscope")


NAMES = ["v_proj", "q_proj"]


@pytest.mark.parametrize(
    ("saved", "ours", "wanted"),
    [
        ({}, {}, None),
        ({"r": 4, "lora_alpha": 8}, {}, "--lora_rank 4"),
        ({"lora_alpha": 16}, {}, None),
        ({"lora_alpha": 4}, {}, "--lora_alpha 4"),
        ({"lora_alpha": 4}, {"lora_alpha": 4}, None),
        ({"use_rslora": True}, {}, "--use_rslora true"),
        ({}, {"use_rslora": True}, "--use_rslora false"),
        ({"target_modules": NAMES}, {}, None),  # all-linear, as far as is known without a base
        ({"target_modules": NAMES}, {"target_modules": NAMES[::-1]}, None),
        ({"target_modules": NAMES}, {"target_modules": ["q"]}, "--target_modules q_proj v_proj"),
        ({"target_modules": "[qv]_.*"}, {"target_modules": NAMES}, None),
        ({"r": 4, "use_rslora": True}, {}, "--lora_rank 4 --use_rslora true"),
    ],
)
def test_a_start_of_another_form_names_each_flag_that_differs(tmp_path, saved, ours, wanted):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "FORA", "r": 8} | saved))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    settings = AdapterArguments(start_adapter=str(tmp_path), **ours)
    if wanted is None:
        check_start(settings)
        return
    with pytest.raises(ValueError, match=f"of another form; use {wanted}$"):
        check_start(settings)
