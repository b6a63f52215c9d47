"""What published config.json files leave open is filled in; what cannot be is refused."""

import pytest
from transformers import AutoConfig

from fedfora.models.baichuan.configuration import BaichuanConfig

# Sizes of the published models.
BAICHUAN_7B = {"vocab_size": 64000, "max_position_embeddings": 4096}
BAICHUAN_13B = {"vocab_size": 64000, "hidden_size": 5120, "num_attention_heads": 40}
BAICHUAN2_7B = {"vocab_size": 125_696, "max_position_embeddings": 4096, "z_loss_weight": 0}
BAICHUAN2_13B = {"vocab_size": 125_696, "hidden_size": 5120, "num_attention_heads": 40}


@pytest.mark.parametrize(
    ("published", "position_embedding", "norm_head"),
    [
        (BAICHUAN_7B, "rope", False),
        (BAICHUAN_13B, "alibi", False),
        (BAICHUAN2_7B, "rope", True),
        (BAICHUAN2_13B, "alibi", True),
    ],
)
def test_each_published_model_is_recognized(published, position_embedding, norm_head):
    config = BaichuanConfig(**published)
    assert config.position_embedding == position_embedding
    assert config.norm_head is norm_head
    assert config.max_position_embeddings == 4096


def test_tokens_added_to_a_vocabulary_do_not_change_the_generation():
    assert BaichuanConfig(**BAICHUAN_7B | {"vocab_size": 64_008}).norm_head is False
    assert BaichuanConfig(**BAICHUAN2_7B | {"vocab_size": 125_704}).norm_head is True


def test_a_13b_model_has_alibi_even_if_its_file_has_been_given_a_number_of_positions():
    config = BaichuanConfig(**BAICHUAN2_13B, max_position_embeddings=4096)
    assert config.position_embedding == "alibi"


def test_what_a_file_says_outright_wins(tmp_path):
    config = BaichuanConfig(**BAICHUAN2_13B, position_embedding="rope", norm_head=False)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert (again.position_embedding, again.norm_head) == ("rope", False)


def test_the_13b_files_do_not_turn_gradient_checkpointing_on():
    assert not hasattr(BaichuanConfig(gradient_checkpointing=[False]), "gradient_checkpointing")
    assert BaichuanConfig(gradient_checkpointing=True).gradient_checkpointing is True


def test_a_saved_config_names_no_remote_code(tmp_path):
    BaichuanConfig(auto_map={"AutoConfig": "x.Y"}).save_pretrained(tmp_path)
    assert "auto_map" not in (tmp_path / "config.json").read_text()


def test_a_loss_that_is_not_added_is_told(caplog):
    BaichuanConfig(z_loss_weight=0)
    assert not caplog.records
    BaichuanConfig(z_loss_weight=1e-4)
    assert "z_loss_weight is 0.0001" in caplog.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position_embedding": "alibii"}, "'rope' or 'alibi', got 'alibii'"),
        ({"num_key_value_heads": 8}, "num_key_value_heads is 8 .* W_pack"),
        ({"head_dim": 64}, "hidden_size 4096 is not head_dim 64"),
        ({"tie_word_embeddings": True}, "exclude each other"),
    ],
)
def test_a_config_that_contradicts_the_architecture_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        BaichuanConfig(**fields)
