"""A row that stands padded beside a longer one is answered as transformers answers it alone."""

import pytest
import torch
import transformers

from stages.serving.eager import eager

SHAPE = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40,
    "max_position_embeddings": 20, "is_decoder": True, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip


@pytest.mark.parametrize(
    ("made", "config"), [("RobertaForCausalLM", "RobertaConfig"), ("BertLMHeadModel", "BertConfig")]
)
def test_row_padded_on_its_left_has_the_answers_of_the_row_alone(made, config, tmp_path):
    torch.manual_seed(0)
    model = getattr(transformers, made)(getattr(transformers, config)(**SHAPE)).eval()
    with torch.no_grad():
        for one in model.parameters():
            one.add_(torch.randn_like(one) * 0.1)
    model.save_pretrained(tmp_path)
    ids = torch.arange(4, 14).view(2, 5)
    mask = torch.ones_like(ids)
    ids[1, :2], mask[1, :2] = 1, 0
    found = torch.from_numpy(eager(tmp_path).forward(ids.numpy(), mask.numpy()))
    with torch.no_grad():
        alone = [model(row[kept.bool()][None]).logits[0] for row, kept in zip(ids, mask, strict=True)]
    torch.testing.assert_close(found[0], alone[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1, 2:], alone[1], rtol=1e-4, atol=1e-5)
