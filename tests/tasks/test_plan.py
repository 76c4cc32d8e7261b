import pytest
import torch
from pytorch_lightning.callbacks import Callback
from torch import nn

from benchmarks.measure import peak
from tests.test_configs import CONFIGS
from visattn.tasks.base import parts
from visattn.tasks.plan import Plan, Planned, Saved, Step, held, owned, plan, quiet

SHIPPED = {file.stem: f"--config={file}" for file in CONFIGS}
TINY = [SHIPPED["quickstart"], "--model.backbone=test_resnet", "--model.backbone_args=null", "--data.size=32"]


class Allocator(Callback):
    """What the forward and the backward of a step take from the allocator, and the batch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        def step():
            loss = pl_module.training_step(batch, batch_idx)
            pl_module.zero_grad()  # as in Lightning: behind the forward
            loss.backward()

        if trainer.global_step == 3:
            self.most = peak(step) + sum(part.nbytes for part in batch if isinstance(part, torch.Tensor))


def test_what_is_kept_is_counted_once():
    weight = torch.randn(100, 100, requires_grad=True)
    x = torch.randn(50, 100)
    with Saved([weight]) as nothing:
        pass
    assert nothing is None
    saved = Saved([weight])
    with saved:
        y = (x @ weight).exp()  # keeps the input, the weight that is there anyway, and its output
        (y * y).sum()  # the same output, twice
    assert saved.total == (50 * 100 + 50 * 100) * 4


def test_memory_is_that_of_distinct_storages():
    x = torch.zeros(10)
    assert held([x, x[:5], x.view(2, 5), torch.zeros(3)]) == 52
    assert held([]) == 0


def test_a_plan_is_a_line_through_two_batches():
    few, many = Step(4, 100, activations=1000), Step(8, 100, activations=1800, seconds=2.0)
    for step in (few, many):
        step.weights, step.divisible, step.gathered, step.gradients, step.optimizer = 110, 100, 40, 100, 200
    found = Plan(few, many, batch=16)
    assert found.per_image == 200
    assert found.memory(16) == {
        "weights": 110,
        "gradients": 100,
        "optimizer": 200,
        "averaged weights": 0,
        "activations": 3400,
    }
    divided = found.memory(16, gpus=4, divided=True)
    assert (divided["weights"], divided["gradients"], divided["optimizer"]) == (10 + 25 + 40, 25 + 40, 50)
    assert found.memory(16, gpus=1, divided=True) == found.memory(16)
    largest = found.largest(1e4)
    assert sum(found.memory(largest).values()) <= 10_000 < sum(found.memory(largest + 1).values())
    assert found.largest(100.0) == 0
    assert found.epoch(gpus=4) == 2.0 / 8 * 100 / 4
    with pytest.raises(ValueError, match="few must be a smaller batch than many, got 8 and 8"):
        Plan(many, many, batch=8)


def test_parts_own_every_parameter_once():
    inner = nn.Sequential(nn.Linear(1200, 1200), nn.Linear(1200, 1200))
    network = nn.ModuleDict({"body": nn.Sequential(inner, nn.Linear(3, 3)), "head": nn.Linear(5, 2)})
    assert parts(network) == [inner[1], inner[0], inner, network]
    layer = (1200 * 1200 + 1200) * 4
    assert owned(network) == [layer, layer, 0, (3 * 3 + 3 + 5 * 2 + 2) * 4]


@pytest.mark.slow
def test_noise_stands_for_data_that_is_not_at_hand():
    found = plan([*TINY, "--data.root=nowhere/", "--data.batch_size=64"], batch=4, classes=7, images=5000)
    assert (found.batch, found.few.batch, found.many.batch, found.many.images) == (64, 2, 4, 5000)
    assert found.many.parameters == found.many.trained == found.many.divisible // 4
    assert found.many.gradients == found.many.divisible
    assert found.many.optimizer > 2 * found.many.divisible
    assert found.many.activations > found.few.activations > 0
    assert found.many.macs == found.few.macs > 0
    assert found.many.seconds > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 3}, "batch must be even and at least 2, got 3"),
        ({"batch": 0}, "batch must be even and at least 2, got 0"),
        ({"images": 9}, "classes and images must be given together, got None and 9"),
        ({"batch": 2, "classes": 3, "images": 9}, "classes must be left out for Canvas, for which noise cannot stand"),
    ],
)
def test_says_what_it_cannot_plan(options, message):
    with pytest.raises(ValueError, match=message):
        plan([SHIPPED["recurrent_digits"]], **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    ["quickstart", "recurrent_digits", "caption_quickstart"],
)
def test_memory_is_that_of_the_allocator_within_15_percent(config):
    arguments = [SHIPPED[config]]
    found = plan(arguments)
    for batch in (8, 32):
        step = Allocator()
        with quiet():
            made = Planned(["fit", *arguments])
            made.datamodule.batch_size = batch
            made.trainer.callbacks.append(step)
            made.trainer.fit(made.model, datamodule=made.datamodule)
        optimizer = held(v for s in made.trainer.optimizers[0].state.values() for v in s.values())
        there = held([*made.model.parameters(), *made.model.buffers()])
        memory = found.memory(batch)
        assert memory["weights"] == pytest.approx(there, rel=0.01)
        assert memory["optimizer"] == pytest.approx(optimizer, rel=0.01)
        assert sum(memory.values()) == pytest.approx(there + optimizer + step.most, rel=0.15)
        if config != "recurrent_digits":  # whose weights act in every glimpse: their gradients lie there while summed
            made_in_steps = memory["activations"] + memory["gradients"] + memory["optimizer"]
            assert made_in_steps == pytest.approx(optimizer + step.most, rel=0.15)
