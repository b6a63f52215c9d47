import pytest

from fedfora import ForaConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("inner_dim", 0),
        ("lora_dropout", 1.0),
        ("bias", "lora_only"),
        ("trainable", "A"),
        ("format_version", 99),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field.replace("_", ".")):
        ForaConfig(**{field: value})


def test_alpha_is_twice_the_rank_by_default():
    assert ForaConfig(r=6).lora_alpha == 12
    assert ForaConfig(r=6, lora_alpha=3).lora_alpha == 3


def test_layers_to_transform_needs_a_list_of_targets():
    with pytest.raises(ValueError, match="layers_to_transform"):
        ForaConfig(target_modules=".*proj", layers_to_transform=[0])
