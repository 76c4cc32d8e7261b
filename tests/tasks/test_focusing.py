import math
import shlex
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_lightning.callbacks import Callback
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import OneCycleLR

import visattn
from visattn.models import GlanceFocus, RecurrentAttention
from visattn.tasks import Focusing, RunError
from visattn.tasks.command_line import run_cli
from visattn.tasks.focusing import discounted

SMALL = {"backbone": "test_resnet", "patch": 16, "glimpses": 3, "width": 12, "policy_width": 8}
TINY = partial(GlanceFocus, **SMALL)
STAGES = ("random", "policy", "finetune")
TRAINED = {"random": {"backbones", "classifier", "auxiliary"}, "policy": {"locator"}}
TRAINED["finetune"] = TRAINED["random"]


def built(stage: str = "random", network=None, **options) -> Focusing:
    """A task with its network, outside of a training, ready for a step."""
    task = Focusing(network or partial(TINY, in_chans=1, num_classes=4), stage=stage, **options)
    task.configure_model()
    task.logged = {}
    task.log = lambda name, value, **_: task.logged.update({name: value})
    task.log_dict = lambda values, **_: task.logged.update(values)
    return task.train()


def batch(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(count, 1, 24, 30), torch.arange(count) * 3 % 4


def parts(found) -> set[str]:
    return {name.partition(".")[0] for name in found}


# --- what each stage trains -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains_what_the_paper_trains_and_leaves_the_rest(stage):
    task = built(stage, optimizer=partial(SGD, lr=0.1))
    before = {name: t.clone() for name, t in task.model.state_dict().items()}
    task.training_loss(batch()).backward()
    parameters = dict(task.model.named_parameters())
    assert parts(name for name, p in parameters.items() if p.requires_grad) == TRAINED[stage]
    assert parts(name for name, p in parameters.items() if p.grad is not None) == TRAINED[stage]
    assert parts(name for name, p in parameters.items() if p.grad is not None and p.grad.any()) == TRAINED[stage]
    SGD([p for p in task.parameters() if p.requires_grad], lr=0.1).step()
    changed = {name for name, t in task.model.state_dict().items() if not torch.equal(t, before[name])}
    assert parts(changed) == TRAINED[stage]
    assert any("running_mean" in name for name in changed) == (stage != "policy")
    modes = {name.partition(".")[0]: module.training for name, module in task.model.named_modules() if name}
    assert {name for name, training in modes.items() if training} == TRAINED[stage]
    assert not task.eval().model.backbones.training


@pytest.mark.parametrize("stage", ["random", "finetune"])
def test_the_loss_of_what_is_seen_is_the_papers(stage):
    task, (images, targets) = built(stage, auxiliary_factor=5.0, rollouts=2), batch()
    torch.manual_seed(3)
    found = task.training_loss((images, targets))
    torch.manual_seed(3)
    looks = task.model.look(images, rollouts=2, policy="random" if stage == "random" else "sample")
    expected = 0.0
    for m in range(12):
        for t in range(3):
            alone = task.model.auxiliary[0](looks.features[m, t])
            for factor, logits in ((1.0, looks.logits[m, t]), (5.0, alone)):
                expected -= factor * logits.log_softmax(-1)[targets[m // 2]] / (12 * 3)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("stage", "policies"), [("random", 0), ("policy", 2), ("finetune", 2)])
def test_only_the_first_stage_does_not_ask_the_policy(stage, policies):
    task, asked = built(stage), []
    sample = task.model.policy.sample
    task.model.policy.sample = lambda mean: asked.append(len(mean)) or sample(mean)
    task.training_loss(batch())
    assert asked == [6] * policies


# --- the policy -------------------------------------------------------------------------------------------------------


def as_loops(task: Focusing, p: np.ndarray, means, actions, before, values, spread: float) -> float:
    """The loss over images and steps, one after another; p of the true class after each glimpse."""
    h, (count, steps), total = task.hparams, before.shape, 0.0
    for m in range(count):
        for t in range(steps):
            gain = sum(h["discount"] ** (s - t) * (p[m, s + 1] - p[m, s]) for s in range(t, steps))
            advantage = gain - values[m, t]
            squares = ((actions[m, t] - means[m, t]) ** 2).sum() / (2 * spread**2)
            log_prob = -squares - 2 * math.log(spread * math.sqrt(2 * math.pi))
            ratio = math.exp(log_prob - before[m, t])
            clipped = min(max(ratio, 1 - h["clip"]), 1 + h["clip"])
            total -= min(ratio * advantage, clipped * advantage)
            total += h["value_factor"] * (values[m, t] - gain) ** 2
            total -= h["entropy_factor"] * 2 * math.log(spread * math.sqrt(2 * math.pi * math.e))
    return total / (count * steps)


def judged(task: Focusing, maps: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Means and values, glimpse by glimpse."""
    means, values, state = [], [], None
    with torch.no_grad():
        for seen in maps.unbind(1):
            mean, value, state = task.model.locator(seen, state)
            means.append(mean)
            values.append(value)
    return torch.stack(means, 1).numpy(), torch.stack(values, 1).numpy()


def test_the_loss_of_the_policy_is_a_loop_over_images_and_steps():
    task = built("policy", rollouts=2).double()
    images, targets = batch()
    images = images.double()
    torch.manual_seed(3)
    first = task.training_loss((images, targets))
    torch.manual_seed(3)
    looks = task.model.look(images, rollouts=2)
    p = looks.logits.softmax(-1)[torch.arange(12), :, targets.repeat_interleave(2)].numpy()
    before = task.model.judge(looks.maps, looks.actions)[0].detach().numpy()

    def expected() -> float:
        means, values = judged(task, looks.maps)
        return as_loops(task, p, means, looks.actions.numpy(), before, values, task.model.policy.spread.item())

    assert first.item() == pytest.approx(expected(), rel=1e-9)
    assert task.logged["train/reward"] == pytest.approx((p[:, -1] - p[:, 0]).mean())
    with torch.no_grad():  # another policy, on the same roll-out
        task.model.locator.mean.bias += torch.tensor([0.1, -0.2])
        task.model.locator.value.bias += 0.02
    ratios = (task.model.judge(looks.maps, looks.actions)[0].detach() - torch.tensor(before)).exp()
    assert ratios.min() < 0.8
    assert ratios.max() > 1.2
    assert task.training_loss((images, targets)).item() == pytest.approx(expected(), rel=1e-9)


def test_what_is_clipped_teaches_nothing_where_it_would_go_on():
    task = built("policy", value_factor=0.0, entropy_factor=0.0)
    maps, actions = torch.rand(4, 2, 96, 1, 1), torch.rand(4, 2, 2)
    now, _, values = (each.detach() for each in task.model.judge(maps, actions))
    for shift, gain, teaches in ((0.5, 1.0, False), (0.5, -1.0, True), (-0.5, 1.0, True), (-0.5, -1.0, False)):
        task.explored = maps, actions, now - shift, values + gain
        task.zero_grad()
        task.training_loss(batch(4)).backward()
        assert bool(task.model.locator.mean.weight.grad.any()) == teaches, (shift, gain)


def test_the_first_step_climbs_the_score_weighed_by_what_was_gained():
    task = built("policy", entropy_factor=0.0, value_factor=0.0).double()
    images, targets = batch()
    task.training_loss((images.double(), targets)).backward()
    found = task.model.locator.mean.weight.grad.clone()
    maps, actions, _, returns = task.explored
    log_probs, _, values = task.model.judge(maps, actions)
    task.zero_grad()
    (-(returns - values.detach()) * log_probs).mean().backward()
    torch.testing.assert_close(found, task.model.locator.mean.weight.grad)
    assert not task.model.locator.value.weight.grad


def test_an_action_has_the_rewards_behind_it():
    rewards = torch.randn(5, 4)
    found = discounted(rewards, 0.7)
    for t in range(4):
        torch.testing.assert_close(found[:, t], sum(0.7 ** (s - t) * rewards[:, s] for s in range(t, 4)))


def test_a_reward_that_is_no_number_ends_the_run_and_says_when():
    task = built("policy")
    torch.nn.init.constant_(task.model.classifier.linear.bias, math.nan)
    with pytest.raises(RunError, match=r"reward is not finite at step 0 \(epoch 0\)"):
        task.training_loss(batch())


# --- training ---------------------------------------------------------------------------------------------------------

FEW = {"limit_train_batches": 3, "limit_val_batches": 2, "limit_test_batches": 2}


class Counted(Callback):
    """Counts the steps of the optimizer, and how often images were looked at."""

    def __init__(self):
        self.steps = self.looks = 0

    def on_train_start(self, trainer, pl_module):
        trainer.optimizers[0].register_step_post_hook(lambda *_: setattr(self, "steps", self.steps + 1))
        look = pl_module.model.look

        def counted(*args, **options):
            self.looks += pl_module.trainer.training
            return look(*args, **options)

        pl_module.model.look = counted


@pytest.mark.slow
def test_three_stages_each_from_the_one_before(digits, trainer, tmp_path):
    models, start = {}, None
    for stage in STAGES:
        run = trainer(default_root_dir=tmp_path / stage, **FEW)
        task = Focusing(TINY, stage=stage, start=start)
        run.fit(task, datamodule=digits())
        start = str(tmp_path / stage / "model")
        models[stage] = visattn.load(start).state_dict()
        assert run.callback_metrics["val/top1"].isfinite()
    for stage, before in (("policy", "random"), ("finetune", "policy")):
        changed = {name for name, t in models[stage].items() if not torch.equal(t, models[before][name])}
        assert parts(changed) == TRAINED[stage]
    again = Focusing.load_from_checkpoint(tmp_path / "finetune/checkpoints/last.ckpt", weights_only=True)
    assert again.hparams["stage"] == "finetune"
    assert again.model.arguments["num_classes"] == 10


def test_a_stage_starts_from_a_checkpoint_too_and_resumes(digits, trainer, tmp_path):
    trainer(**FEW).fit(Focusing(TINY), datamodule=digits())
    first = tmp_path / "checkpoints/last.ckpt"
    later = trainer(default_root_dir=tmp_path / "later", limit_train_batches=0, **{"limit_val_batches": 0})
    task = Focusing(TINY, stage="policy", start=str(first))
    later.fit(task, datamodule=digits())
    held = torch.load(first, weights_only=True)["state_dict"]
    for name, tensor in task.state_dict().items():
        if name.startswith("model.") and "narrowed" not in name:
            assert torch.equal(tensor, held[name]), name


@pytest.mark.parametrize("epochs", [1, 3])
def test_steps_are_made_over_and_over_on_one_roll_out(digits, trainer, tmp_path, epochs):
    trainer(**FEW).fit(Focusing(TINY), datamodule=digits())
    counted, task = Counted(), Focusing(TINY, stage="policy", start=str(tmp_path / "model"), epochs=epochs)
    run = trainer(counted, default_root_dir=tmp_path / "policy", **FEW)
    run.fit(task, datamodule=digits())
    assert counted.steps == 3 * epochs
    assert counted.looks == 3
    assert run.global_step == 3


@pytest.mark.parametrize(("stage", "policy"), [("random", "random"), ("policy", "mean")])
def test_a_validation_looks_as_the_stage_does(stage, policy, monkeypatch):
    task, asked = built(stage), []
    rollout = task.model.rollout
    task.model.rollout = lambda images, **more: asked.append(more["policy"]) or rollout(images, **more)
    monkeypatch.setattr(type(task), "trainer", type("One", (), {"world_size": 1})())
    task.eval().validation_step(batch(), 0)
    assert asked == [policy]


def test_a_test_says_what_stopping_saves(digits, trainer):
    task, data = Focusing(partial(TINY, confidence=0.3)), digits()
    run = trainer(**FEW)
    run.fit(task, datamodule=data)
    run.test(task, datamodule=data, verbose=False)
    found = {name: value.item() for name, value in run.callback_metrics.items()}
    costs = task.model.macs
    assert 1 <= found["test/glimpses"] <= 3
    assert costs[0] <= found["test/macs"] <= costs[-1]
    assert {"test/top1", "test/top1_random", "test/top1_centre"} <= found.keys()
    batches = [images for images, _ in data.test_dataloader()][:2]
    with torch.no_grad():
        glimpses = torch.cat([task.model.eval().rollout(images, policy="mean").glimpses for images in batches])
    assert found["test/glimpses"] == pytest.approx(glimpses.float().mean().item())


# --- where the answer is in a small patch -----------------------------------------------------------------------------

SIDE, MARK = 48, 8


def marks(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Dark images with a small square somewhere, of one of four textures, all of which are grey from afar."""
    k = torch.arange(MARK)
    down, across = k[:, None].expand(MARK, MARK), k.expand(MARK, MARK)
    textures = torch.stack([down % 2, across % 2, (down + across) % 2, (down // 2 + across // 2) % 2]).float()
    images, targets = torch.zeros(count, 1, SIDE, SIDE), torch.randint(4, (count,))
    for image, target, (x, y) in zip(images, targets, torch.randint(SIDE - MARK + 1, (count, 2)), strict=True):
        image[0, y : y + MARK, x : x + MARK] = 2 * textures[target]
    return images, targets


def trained(task: Focusing, steps: int) -> None:
    optimizer = Adam([p for p in task.parameters() if p.requires_grad], lr=3e-3)
    schedule = OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        task.explored = None
        optimizer.zero_grad()
        task.training_loss(marks(64)).backward()
        optimizer.step()
        schedule.step()


@pytest.mark.slow
def test_learns_to_look_where_the_answer_is():
    torch.manual_seed(0)
    sizes = {"in_chans": 1, "num_classes": 4, "width": 64, "policy_width": 64}
    network = partial(TINY, backbone_args={"output_stride": 8}, **sizes)
    seen, policy = built("random", network), built("policy", network)
    trained(seen, 150)
    policy.model.load_state_dict(seen.model.state_dict())
    trained(policy, 150)
    (images, targets), model = marks(1000), policy.model.eval()

    def right(kind: str) -> torch.Tensor:
        """After each glimpse."""
        with torch.no_grad():
            logits = model.rollout(images, policy=kind).logits
        return (logits.argmax(-1) == targets[:, None]).float().mean(0)

    found, chance = right("mean"), torch.stack([right("random")[-1] for _ in range(5)])
    assert found[-1] > chance.mean() + max(0.15, 3 * chance.std().item())
    assert found[-1] > right("centre")[-1] + 0.15
    assert found[-1] > found[0] + 0.3  # the glance alone does not tell


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": RecurrentAttention}, "network must be GlanceFocus, got .*RecurrentAttention"),
        ({"stage": "ppo"}, "stage must be one of random, policy, finetune, got 'ppo'"),
        ({"discount": 1.5}, r"discount must lie in \[0, 1\], got 1.5"),
        ({"clip": 0.0}, "clip must lie between 0 and 1, got 0.0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"value_factor": -1.0}, "value_factor must not be negative, got -1.0"),
        ({"auxiliary_factor": -1.0}, "auxiliary_factor must not be negative, got -1.0"),
        ({"entropy_factor": -1.0}, "entropy_factor must not be negative, got -1.0"),
        ({"rollouts": 0}, "rollouts must be at least 1, got 0"),
    ],
)
def test_refuses_options_that_cannot_be(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        Focusing(**{"network": TINY} | options)


def test_refuses_a_start_that_does_not_fit(digits, trainer, tmp_path):
    with pytest.raises(ValueError, match="start must be the folder or checkpoint of the stage before for stage policy"):
        trainer(fast_dev_run=True).fit(Focusing(TINY, stage="policy"), datamodule=digits())
    with pytest.raises(ValueError, match="missing: there is no checkpoint"):
        trainer(fast_dev_run=True).fit(Focusing(TINY, stage="policy", start="missing"), datamodule=digits())
    other = GlanceFocus(10, in_chans=1, **SMALL | {"width": 13})
    visattn.save(other, tmp_path / "other")
    with pytest.raises(ValueError, match="its weights are of another model than GlanceFocus"):
        trainer(fast_dev_run=True).fit(
            Focusing(TINY, stage="policy", start=str(tmp_path / "other")), datamodule=digits()
        )
    visattn.save(GlanceFocus(10, in_chans=1, **SMALL), tmp_path / "letters", labels=list("abcdefghij"))
    with pytest.raises(ValueError, match=r"start must have the labels of the data, \['0', .*, got \['a', "):
        trainer(fast_dev_run=True).fit(
            Focusing(TINY, stage="policy", start=str(tmp_path / "letters")), datamodule=digits()
        )


def test_refuses_to_go_over_and_over_what_is_gathered(digits, trainer, tmp_path):
    trainer(**FEW).fit(Focusing(TINY), datamodule=digits())
    task = Focusing(TINY, stage="policy", start=str(tmp_path / "model"), epochs=2)
    with pytest.raises(ValueError, match="accumulate_grad_batches must be 1 where a roll-out has 2 epochs, got 4"):
        trainer(default_root_dir=tmp_path / "policy", accumulate_grad_batches=4, **FEW).fit(task, datamodule=digits())


# --- the command line -------------------------------------------------------------------------------------------------

LINE = (
    "--task Focusing --data.root digits --data.size 32 --data.train_per_class 8 --data.val_per_class 4"
    " --data.workers 0 --model.network GlanceFocus --model.network.backbone test_resnet --model.network.patch 16"
    " --model.network.glimpses 3 --model.network.width 12 --model.network.policy_width 8 --trainer.max_epochs 1"
    " --trainer.accelerator cpu --trainer.enable_progress_bar false --trainer.enable_model_summary false"
)


@pytest.mark.slow
def test_the_command_line_goes_through_the_stages_and_tests(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_cli(shlex.split(f"fit {LINE}"))
    run_cli(shlex.split(f"fit {LINE} --model.stage policy --model.start runs/version_0/model"))
    run_cli(shlex.split(f"fit {LINE} --model.stage finetune --model.start runs/version_1/checkpoints/last.ckpt"))
    run_cli(shlex.split(f"test {LINE} --model.stage finetune --ckpt_path best --model.network.confidence 0.5"))
    model = visattn.load(Path("runs/version_2/model"))
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 10)
    assert model.arguments["patch"] == 16
