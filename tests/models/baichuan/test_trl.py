"""TRL computes the loss from `lm_head.weight` and never calls the layer: it must get the same."""

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("trl", reason="trl is not installed", exc_type=ImportError)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_fused_loss_is_the_models_own(checkpoint, ids, left):
    from trl.trainer.utils import add_fused_lm_head

    model = AutoModelForCausalLM.from_pretrained(checkpoint).train()
    labels = ids.masked_fill(left == 0, -100)
    expected = model(ids, attention_mask=left, labels=labels).loss
    add_fused_lm_head(model)
    with torch.no_grad():
        fused = model(ids, attention_mask=left, labels=labels, fused_lm_head=True).loss
    torch.testing.assert_close(fused, expected.detach(), rtol=0, atol=1e-5)
