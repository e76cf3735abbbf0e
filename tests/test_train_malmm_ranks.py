"""MA-LMM trained on two gloo processes against one: the same losses, gradients and weights.

But for the biases of keys: such a bias adds the same to all scores of a query, which a softmax does not see, so its
gradient is 0 but for rounding (measured: 2e-11, where those of the values are 2e-3). AdamW divides a gradient by its
own size, so each of them walks up to the learning rate per step wherever rounding points, and an order of additions
leads it elsewhere (measured: 4e-6 after 4 steps at 1e-3). What holds for them is that nothing depends on them.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pyvidx.models import MALMM
from pyvidx.train import Ranks, Recipe, train
from pyvidx.train.data import Batch
from pyvidx.train.malmm import MALMMTask
from tests.two import two_processes

pytest.importorskip("transformers", reason="pip install 'pyvidx[hosts]'")

RECIPE = Recipe(epochs=2, batch=4, warmup=1, start_lr=1e-3, peak_lr=1e-3, amp="none")
ANSWERS = ["red", "stirring eggs", "blue", "running and then stirring", "person", "cup", "eggs", "red and blue"]


class Clips(torch.utils.data.Dataset):
    """Random clips of four frames, with answers of different lengths."""

    def __len__(self):
        return len(ANSWERS)

    def __getitem__(self, at):
        return torch.randn(4, 3, 42, 42, generator=torch.Generator().manual_seed(at[1])), ANSWERS[at[1]]

    def collate(self, samples):
        pixels, answers = zip(*samples)
        return Batch(torch.stack(pixels), ["what is the color ?"] * len(answers), list(answers), {})


def trained(out: Path, recipe: Recipe, alike: Ranks) -> tuple[list[float], list[dict], dict]:
    """Losses and gradients of every step, and the weights after the last."""
    from pyvidx.models.language import Language
    from tests.test_language import causal_lm, tokenizer

    config = MALMM.default().config
    torch.manual_seed(0)
    model = MALMM(replace(config, qformer=replace(config.qformer, dropout=0.0)))  # each process draws its own
    task = MALMMTask(model, Language(causal_lm(), tokenizer(), tokenizer(bos=False)), {"length": 2})
    losses, gradients = [], []

    def before_step(optimizer, *_):
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    hook = register_optimizer_step_pre_hook(before_step)
    try:
        train(task, Clips(), recipe, alike, out, report=lambda step: losses.append(step.loss))
    finally:
        hook.remove()
    return losses, gradients, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def half(both: Ranks, out: Path):
    result = trained(out, replace(RECIPE, batch=RECIPE.batch // 2), both)
    if both.first:
        torch.save(result, out / "result.pt")


def key_biases(values: dict) -> dict:
    """The biases of keys among parameters or their gradients: the second of the three parts of qkv; in keys_values, of
    every layer the first of two."""
    found = {n: v.chunk(3)[1] for n, v in values.items() if n.endswith("qkv.bias")}
    both = values["qformer.keys_values.bias"].view(-1, 2, len(values["qformer.query_tokens"][0]))
    return found | {"qformer.keys_values.bias": both[:, 0]}


def test_two_processes_are_one(tmp_path):
    two_processes(half, tmp_path)
    losses, gradients, weights = trained(tmp_path / "one", RECIPE, Ranks())
    two_losses, two_gradients, two_weights = torch.load(tmp_path / "result.pt", weights_only=True)
    assert len(losses) == 4
    torch.testing.assert_close(two_losses, losses, rtol=1e-6, atol=0)

    for one, two in zip(gradients, two_gradients):
        noise = key_biases(one)
        assert len(noise) == 5 and one.keys() == two.keys()
        for name, g in one.items():
            size = g.abs().max()
            assert size > 0 and (two[name] - g).abs().max() <= 1e-5 * size, name
            if name in noise:
                assert noise[name].abs().max() < 1e-6 * size, name

    for values in (weights, two_weights):
        for bias in key_biases(values).values():
            bias.zero_()
    start = dict(MALMM.default().named_parameters())
    assert all((weights[name] - start[name]).abs().max() > 1e-3 for name in gradients[0])
    torch.testing.assert_close(two_weights, weights, rtol=1e-5, atol=2e-6)
