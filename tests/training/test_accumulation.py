"""The Hugging Face Trainer as anyone would use it: accumulation over batches with unequal numbers of targets."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from newllm.models import create_model


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_a_step_in_parts_has_the_loss_and_gradient_of_the_whole(micro_batch, tmp_path):
    shape = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16, "vocab_size": 40}
    model = create_model("pythia", **shape)
    ids = torch.randint(40, (4, 12))
    labels = ids.clone()
    for row, ignored in enumerate((0, 9, 3, 6)):
        labels[row, 12 - ignored :] = -100
    rows = [{"input_ids": i, "labels": t} for i, t in zip(ids, labels, strict=True)]
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    expected = {name: p.detach() - p.grad for name, p in model.named_parameters()}
    model.zero_grad()

    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant",
        max_grad_norm=0, per_device_train_batch_size=micro_batch, gradient_accumulation_steps=4 // micro_batch,
        use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    result = Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert result.training_loss == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-5, atol=1e-6)
