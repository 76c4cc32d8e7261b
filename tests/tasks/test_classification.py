import copy
import csv
import math
from contextlib import suppress
from functools import partial
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EMAWeightAveraging
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

import visattn
from visattn import CBAM, Attention, DynamicConvolution, NonLocal, SqueezeExcitation, StructuredSelfAttentivePool
from visattn.models import AttentionBranchNetwork, DigitClassifier, LearnToPayAttention, RecurrentPoolNetwork
from visattn.surgery import insertions
from visattn.tasks import Classification, RunError
from visattn.tasks.base import warmup_cosine

TINY = {"backbone": "test_resnet"}
BUILT = {**TINY, "backbone_args": {"num_classes": 10, "in_chans": 1}}


class Seen(Callback):
    """Notes the loss and the learning rates of every step."""

    def __init__(self):
        self.losses, self.rates = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])


class StopAt(Callback):
    """Ctrl-C at the start of an epoch, or of a batch of training or validation in it."""

    def __init__(self, epoch, *, batch=None, val_batch=None):
        self.epoch, self.batch, self.val_batch = epoch, batch, val_batch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch and self.batch is None and self.val_batch is None:
            raise KeyboardInterrupt

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (self.epoch, self.batch):
            raise KeyboardInterrupt

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if (trainer.current_epoch, batch_idx) == (self.epoch, self.val_batch) and not trainer.sanity_checking:
            raise KeyboardInterrupt


def built(**options) -> Classification:
    task = Classification(**BUILT | options)
    task.configure_model()
    return task


# --- the network ------------------------------------------------------------------------------------------------------


def test_builds_the_network_for_the_classes_and_channels_of_the_data(digits, trainer):
    task = Classification(**TINY, attention=[CBAM, partial(NonLocal, reduction=2)], at=["blocks", "stages[-1]"])
    assert not hasattr(task, "model")
    trainer(fast_dev_run=True).fit(task, datamodule=digits())
    assert task.model.num_classes == 10
    assert task.model.conv1[0].in_channels == 1
    assert [type(i.attention) for i in insertions(task.model)] == [CBAM] * 4 + [NonLocal]
    assert task.labels == [str(k) for k in range(10)]


def test_gate_null_inserts_as_in_the_paper():
    assert all(i.gate is not None for i in insertions(built(attention=CBAM).model))
    assert all(i.gate is None for i in insertions(built(attention=CBAM, gate=None).model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnt18"}, "backbone 'resnt18' is not known to timm; close: resnet18"),
        ({"backbone": "!"}, "backbone '!' is not known to timm; timm.list_models\\(\\) lists the names"),
        ({"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\), got 1.0"),
        ({"warmup": -0.1}, r"warmup must lie in \[0, 1\), got -0.1"),
        ({"attention": [CBAM], "at": ["blocks", "stages"]}, "at must give one place for each of the 1 modules, got 2"),
        ({"attention": lambda channels: CBAM(channels)}, "attention must be a class or functools.partial of one"),
    ],
)
def test_refuses_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Classification(**TINY | options)


def test_refuses_what_does_not_fit_the_classes():
    with pytest.raises(ValueError, match="num_classes must be given in backbone_args"):
        Classification(**TINY).configure_model()
    with pytest.raises(ValueError, match="class_weights must have one entry for each of 10 classes, got 2"):
        built(class_weights=[1.0, 2.0])


def test_refuses_pretrained_weights_that_do_not_exist(digits, trainer):
    with pytest.raises(
        ValueError, match="pretrained must be false for backbone 'resnet200': timm has no weights of it"
    ):
        trainer(fast_dev_run=True).fit(Classification("resnet200", pretrained=True), datamodule=digits())


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_smoothing_and_class_weights_enter_the_loss_of_training_and_only_weights_that_of_evaluation():
    weights = [float(k + 1) for k in range(10)]
    task = built(label_smoothing=0.2, class_weights=weights)
    logits, targets = torch.randn(6, 10), torch.tensor([0, 3, 9, 9, 1, 2])
    log_p, w = logits.log_softmax(1), torch.tensor(weights)
    hard = -(w[targets] * log_p[range(6), targets]).sum() / w[targets].sum()
    smooth = -(0.8 * (w[targets] * log_p[range(6), targets]).sum() + 0.2 / 10 * (w * log_p).sum()) / w[targets].sum()
    torch.testing.assert_close(task.train().loss(logits, targets), smooth)
    torch.testing.assert_close(task.eval().loss(logits, targets), hard)


def test_many_labels_are_many_yes_or_no_questions():
    task = built(multi_label=True, label_smoothing=0.2).train()
    logits, targets = torch.randn(4, 10), torch.randint(0, 2, (4, 10)).float()
    soft, p = 0.8 * targets + 0.1, logits.sigmoid()
    expected = -(soft * p.log() + (1 - soft) * (1 - p).log()).mean()
    torch.testing.assert_close(task.loss(logits, targets), expected)


def test_mixes_even_batches_in_training():
    task = built(mixup=1.0)
    _, targets = task.mix(torch.randn(4, 1, 32, 32), torch.tensor([0, 1, 2, 3]))
    assert targets.shape == (4, 10)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    assert built().mix is None


@pytest.mark.parametrize("label", [10, -1])
def test_names_a_label_out_of_range(label):
    batch = [torch.zeros(3, 1, 32, 32), torch.tensor([0, label, 2])]
    with pytest.raises(ValueError, match=f"label {label} is out of range: the model has 10 classes, 0 to 9"):
        built().on_before_batch_transfer(batch, 0)


def test_names_the_shape_of_many_labels():
    with pytest.raises(ValueError, match=r"labels must be of shape \(b, 10\), one column a class, got \(3, 4\)"):
        built(multi_label=True).on_before_batch_transfer([torch.zeros(3, 1, 32, 32), torch.zeros(3, 4)], 0)


class Thrifty(SqueezeExcitation):
    """Pays for every channel it lets through."""

    def penalty(self, weights):
        return weights.mean()


class Fused(Thrifty):
    def forward(self, x):
        return x


def test_penalties_of_modules_are_added_and_logged(digits, trainer):
    seen, free = Seen(), Seen()
    for callback, factor in ((seen, 2.0), (free, 0.0)):
        torch.manual_seed(0)
        task = Classification(**TINY, attention=Thrifty, at="stages", gate=None, penalty_factor=factor)
        run = trainer(callback, limit_train_batches=1, limit_val_batches=0)
        run.callbacks = [c for c in run.callbacks if not isinstance(c, pl.callbacks.ModelCheckpoint)]
        run.fit(task, datamodule=digits())
    penalty = run.callback_metrics["train/penalty"].item()
    assert penalty > 0.5
    assert seen.losses[0] - free.losses[0] == pytest.approx(2 * penalty, rel=1e-4)
    assert "attend" not in vars(insertions(task.model)[0].attention)


class Temperatures(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, task, *rest):
        self.seen.append({round(m.temperature.item(), 4) for m in task.modules() if isinstance(m, DynamicConvolution)})


@pytest.mark.parametrize(("epochs", "seen"), [(4, [30, 15.5, 1, 1]), (2, [30, 1])])
def test_temperatures_fall_over_half_of_a_short_run(digits, trainer, epochs, seen):
    temperatures = Temperatures()
    task = Classification(**TINY, attention=DynamicConvolution, at="convolutions", gate=None)
    run = trainer(temperatures, limit_train_batches=1, limit_val_batches=0, max_epochs=epochs)
    run.callbacks = [c for c in run.callbacks if not isinstance(c, pl.callbacks.ModelCheckpoint)]
    run.fit(task, datamodule=digits())
    assert temperatures.seen == [{value} for value in seen]


def noted(task):
    """What a task logs in steps outside a trainer."""
    logged = {}
    task.log = lambda name, value, **_: logged.update({name: value})
    task.log_dict = logged.update
    return logged


@pytest.mark.parametrize("gate", ["identity", None])
def test_every_penalty_is_logged_by_its_module_s_name_and_reaches_its_parameters(gate):
    batch = torch.randn(4, 1, 64, 96), torch.tensor([0, 1, 2, 3])
    modules = [StructuredSelfAttentivePool, Thrifty]
    task = built(attention=modules, at=["pool", "stages[-2:]"], gate=gate, penalty_factor=3.0).train()
    logged, pool = noted(task), task.model.global_pool
    loss = task.training_step(batch, 0)
    names = ["penalty/global_pool", "penalty/layer3.Thrifty", "penalty/layer4.Thrifty"]
    assert sorted(name for name in logged if name.startswith("penalty/")) == names
    total = sum(logged[name] for name in names)
    torch.testing.assert_close(loss, logged["train/loss"] + 3 * total)
    torch.testing.assert_close(logged["train/penalty"], total)
    given = []
    pool.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    task.training_step(batch, 0)
    torch.testing.assert_close(logged[names[0]], pool.penalty(pool.attend(given[0])))
    (3 * logged[names[1]]).backward(retain_graph=True)
    assert insertions(task.model)[1].attention.squeeze.weight.grad.any()
    assert insertions(task.model)[2].attention.squeeze.weight.grad is None
    logged[names[0]].backward()
    assert pool.hop.weight.grad.any()


def test_penalties_come_out_of_a_compiled_network_that_is_compiled_once(unchecked):
    batch = torch.randn(4, 1, 32, 32), torch.tensor([0, 1, 2, 3])
    task = built(attention=[StructuredSelfAttentivePool, Thrifty], at=["pool", "stages"]).train()
    for norm in task.model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()
    logged, graphs = noted(task), []
    eager = task.training_step(batch, 0), dict(logged)
    logged.clear()

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    task.model.compile(backend=compiler, fullgraph=True)
    for step in range(3):
        torch.testing.assert_close((task.training_step(batch, step), dict(logged)), eager)
    assert len(graphs) == 1


def test_penalties_leave_nothing_behind():
    task = built(attention=Thrifty, at="stages", gate=None).train()
    noted(task)
    task.training_step((torch.randn(4, 1, 32, 32), torch.tensor([0, 1, 2, 3])), 0)
    assert all(each.penalty is None for each in task.penalised.values())
    task.__dict__.pop("log"), task.__dict__.pop("log_dict")
    twin = copy.deepcopy(task)
    for name, each in twin.penalised.items():
        assert "attend" not in vars(each.module)
        assert each.module is not task.penalised[name].module
        assert each.module in [i.attention for i in insertions(twin.model)]


def test_a_penalty_that_is_never_computed_is_an_error():
    task = built(attention=Fused, at="stages[-1]", gate=None)
    task.log = lambda *_, **__: None
    with pytest.raises(RunError, match=r"has a penalty on its weights, but its forward does not call attend"):
        task.training_step((torch.randn(2, 1, 32, 32), torch.tensor([0, 1])), 0)


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint(digits, trainer, tmp_path, capsys):
    class Explode(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 7:
                batch[0][:] = math.inf

    with pytest.raises(RunError, match=r"loss is nan at step 7 \(epoch 1\)"):
        trainer(Explode(), max_epochs=3).fit(Classification(**TINY), datamodule=digits())
    assert f"the last good checkpoint is {tmp_path}/checkpoints/last.ckpt" in capsys.readouterr().err
    weights = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(w.isfinite().all() for w in weights.values())
    visattn.load(tmp_path / "model")


# --- optimization -----------------------------------------------------------------------------------------------------


def test_norms_biases_and_gates_do_not_decay_and_inserted_modules_have_their_own_rate(digits, trainer):
    seen = Seen()
    task = Classification(
        **TINY,
        attention=CBAM,
        attention_lr_factor=5.0,
        optimizer=partial(SGD, lr=0.1, weight_decay=0.01),
        schedule=partial(StepLR, step_size=1, gamma=0.5),
    )
    run = trainer(seen, max_epochs=2)
    run.fit(task, datamodule=digits())
    names = {id(p): name for name, p in task.model.named_parameters()}
    count = 0
    for group in run.optimizers[0].param_groups:
        for p in group["params"]:
            name = names[id(p)]
            count += 1
            flat = p.ndim == 1 or name.endswith("bias")
            assert group["weight_decay"] == (0.0 if flat else 0.01), name
            assert group["initial_lr"] == (0.5 if name.startswith("visattn.") else 0.1), name
    assert count == len(names)
    assert {rate for rates in seen.rates[:5] for rate in rates} == {0.1, 0.5}
    assert {rate for rates in seen.rates[5:] for rate in rates} == {0.05, 0.25}


def test_the_rate_rises_and_falls_by_steps_without_a_schedule(digits, trainer):
    seen = Seen()
    trainer(seen, max_epochs=2).fit(Classification(**TINY, warmup=0.2), datamodule=digits())
    expected = [1e-3 * warmup_cosine(step, steps=10, warmup=2) for step in range(10)]
    assert [rates[0] for rates in seen.rates] == pytest.approx(expected)


def test_needs_an_end_without_a_schedule(digits, trainer):
    with pytest.raises(ValueError, match="max_epochs or max_steps must be set"):
        trainer(max_epochs=-1).fit(Classification(**TINY), datamodule=digits())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(("how", "power"), [("norm", 2), ("value", math.inf)])
def test_gradients_of_a_fused_optimizer_are_clipped_in_any_precision(precision, how, power, digits, trainer):
    task = Classification(**TINY, optimizer=partial(SGD, lr=1.0, fused=True), schedule=partial(StepLR, step_size=1))
    clips = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": how}
    fitted = trainer(max_steps=1, limit_val_batches=0, precision=precision, **clips)
    fitted.fit(task, datamodule=digits())
    gradient = torch.cat([p.grad.flatten() for p in task.parameters()])
    assert gradient.norm(power) == pytest.approx(0.01, rel=1e-3)


def test_a_frozen_backbone_keeps_its_weights_and_statistics(digits, trainer):
    task = Classification(**TINY, attention=CBAM, at="stages", freeze_backbone=True)
    start = {}

    class Note(Callback):
        def on_train_start(self, trainer, pl_module):
            start.update({name: t.clone() for name, t in pl_module.model.state_dict().items()})

    trainer(Note()).fit(task, datamodule=digits())
    changed = {name for name, t in task.model.state_dict().items() if not torch.equal(t, start[name])}
    assert {name for name in changed if not name.startswith("visattn.")} == {"fc.weight", "fc.bias"}
    assert any(name.endswith("gate") for name in changed)
    task.train()
    assert not task.model.bn1.training
    assert insertions(task.model)[0].attention.training


def test_gates_are_logged(digits, trainer):
    run = trainer()
    task = Classification(**TINY, attention=CBAM)
    run.fit(task, datamodule=digits())
    gates = {name: value for name, value in run.callback_metrics.items() if name.startswith("gate/")}
    assert len(gates) == len(insertions(task.model)) == 4
    assert all(value != 0 for value in gates.values())


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_top5_only_where_there_are_more_classes():
    assert {*built().val_scores.keys()} == {"val/top1", "val/top5"}
    few = built(backbone_args={"num_classes": 5, "in_chans": 1})
    assert {*few.val_scores.keys()} == {"val/top1"}


def test_reports_every_class(digits, trainer, tmp_path, capsys):
    run, task, data = trainer(), Classification(**TINY), digits()
    run.fit(task, datamodule=data)
    run.test(task, datamodule=data, verbose=False)
    rows = list(csv.DictReader((tmp_path / "per_class.csv").read_text().splitlines()))
    assert [row["label"] for row in rows] == [str(k) for k in range(10)]
    assert [int(row["images"]) for row in rows] == [4] * 10
    recall = sum(float(row["recall"]) for row in rows) / 10
    assert recall == pytest.approx(run.callback_metrics["test/top1"].item(), abs=1e-3)
    assert "precision" in capsys.readouterr().out


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(digits, trainer, tmp_path):
    task = Classification(**TINY, attention=[partial(CBAM, reduction=4)], backbone_args={"drop_path_rate": 0.1})
    run = trainer()
    run.fit(task, datamodule=digits())
    return task.eval(), tmp_path


def test_every_form_of_a_checkpoint_gives_the_same_network(finished):
    task, folder = finished
    x = torch.randn(2, 1, 32, 32)
    forms = [
        Classification.load_from_checkpoint(folder / "checkpoints/last.ckpt", weights_only=True).eval(),
        visattn.load(folder / "checkpoints/last.ckpt"),
        visattn.load(folder / "model"),
    ]
    for form in forms:
        assert torch.equal(form(x), task(x))
        assert form.labels == task.labels
    assert forms[0].preprocess == forms[1].transform == forms[2].transform == task.preprocess
    assert insertions(forms[0].model)[0].attention.arguments["reduction"] == 4


def test_the_card_says_what_was_done(finished):
    card = (finished[1] / "model/card.md").read_text()
    assert "- Data: Images digits (80 train, 40 val)" in card
    assert "- Run: finished, at step 5, on 1 × cpu, 32-true" in card
    assert "- Weights: of epoch 0, step 5, val/top1 0." in card


@pytest.mark.parametrize(
    ("option", "path"), [("attention", "os.CBAM"), ("optimizer", "os.system"), ("schedule", "a.b.StepLR")]
)
def test_runs_nothing_that_a_checkpoint_names(finished, option, path):
    file = finished[1] / "checkpoints/last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["hyper_parameters"][option] = {"class_path": path, "init_args": {}}
    torch.save(checkpoint, file)
    with pytest.raises(
        ValueError, match=f"{option} '{path}' is not in .*: give the class to load_from_checkpoint as {option}="
    ):
        Classification.load_from_checkpoint(file)


def test_refuses_the_checkpoint_of_another_backbone_or_network(finished, digits, trainer):
    file = finished[1] / "checkpoints/last.ckpt"
    with pytest.raises(
        ValueError, match="the checkpoint holds backbone 'test_resnet', the model has 'test_efficientnet'"
    ):
        trainer().test(Classification("test_efficientnet"), datamodule=digits(), ckpt_path=file)
    with pytest.raises(
        ValueError, match=r"another network than this test_resnet: model.visattn.* is .* there and absent here"
    ):
        trainer().test(Classification(**TINY), datamodule=digits(), ckpt_path=file)


def test_refuses_data_with_other_labels(finished, digits, trainer):
    data = digits()
    data.setup()
    data.labels = ["zero", *data.labels[1:]]
    task = Classification(**TINY, attention=partial(CBAM, reduction=4), backbone_args={"drop_path_rate": 0.1})
    with pytest.raises(ValueError, match="other labels than the data: '0' where the data has 'zero'"):
        trainer().test(task, datamodule=data, ckpt_path=finished[1] / "checkpoints/last.ckpt")


def by_epochs():
    return {"schedule": partial(StepLR, step_size=1, gamma=0.5)}, []


def averaged():
    return {}, [EMAWeightAveraging(decay=0.9)]


@pytest.mark.parametrize(
    ("stop", "setting"),
    [
        (StopAt(1), lambda: ({}, [])),
        (StopAt(0, val_batch=1), averaged),
        pytest.param(StopAt(0, val_batch=1), by_epochs, marks=pytest.mark.slow),
        pytest.param(StopAt(1), by_epochs, marks=pytest.mark.slow),
        pytest.param(StopAt(1), averaged, marks=pytest.mark.slow),
    ],
    ids=[
        "epoch's end",
        "validation, averaged",
        "validation, by epochs",
        "epoch's end, by epochs",
        "epoch's end, averaged",
    ],
)
def test_resuming_is_as_if_nothing_had_happened(stop, setting, digits, trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")

    def run(folder, *more, ckpt_path=None):
        torch.manual_seed(3)
        options, callbacks = setting()
        seen, task = (
            Seen(),
            Classification(**TINY, attention=CBAM, backbone_args={"drop_path_rate": 0.2}, mixup=0.5, **options),
        )
        runner = trainer(seen, *more, *callbacks, max_epochs=2, default_root_dir=tmp_path / folder)
        with suppress(SystemExit):  # how Lightning ends after Ctrl-C
            runner.fit(task, datamodule=digits(), ckpt_path=ckpt_path)
        return seen, task

    whole, expected = run("whole")
    first, _ = run("parts", stop)
    name = "last" if stop.val_batch is None else "interrupted"
    second, task = run("parts", ckpt_path=tmp_path / f"parts/checkpoints/{name}.ckpt")
    assert len(second.losses) == 5
    assert first.losses + second.losses == whole.losses
    assert first.rates + second.rates == whole.rates
    for (key, a), b in zip(task.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert not (tmp_path / "parts/checkpoints/interrupted.ckpt").exists()


def test_ctrl_c_within_an_epoch_saves_the_state_and_says_where(digits, trainer, tmp_path, capsys):
    with pytest.raises(SystemExit):
        trainer(StopAt(1, batch=2), max_epochs=2).fit(Classification(**TINY), datamodule=digits())
    file = tmp_path / "checkpoints/interrupted.ckpt"
    said = capsys.readouterr().err
    assert "stopped at step 7 (epoch 1)" in said
    assert f"the last good checkpoint is {file}" in said
    assert torch.load(file, weights_only=True)["global_step"] == 7
    assert "interrupted in epoch 1" in (tmp_path / "model/card.md").read_text()
    seen = Seen()
    trainer(seen, max_epochs=2).fit(Classification(**TINY), datamodule=digits(), ckpt_path=file)
    assert len(seen.losses) == 3


def test_compiled_and_channels_last_are_the_same_network(digits, trainer, monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    compiled: list[nn.Module] = []
    losses = []
    for options in ({}, {"channels_last": True, "compile": True}):
        torch.manual_seed(0)
        seen = Seen()
        trainer(seen).fit(task := Classification(**TINY, attention=CBAM, **options), datamodule=digits())
        losses.append(seen.losses)
    assert compiled == [task.model]
    assert task.model.conv1[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_trains_in_bfloat16(digits, trainer):
    run = trainer(precision="bf16-mixed", max_epochs=1)
    run.fit(Classification(**TINY, attention=[CBAM, NonLocal], at=["blocks", "stages[-1]"]), datamodule=digits())
    assert run.callback_metrics["val/loss"].isfinite()


def test_every_attention_is_found_by_its_short_name():
    assert all(issubclass(getattr(visattn, name), Attention) for name in visattn.attention.__all__)


# --- networks made of a backbone --------------------------------------------------------------------------------------


def test_several_logits_have_a_loss_each():
    task = built(network=AttentionBranchNetwork, label_smoothing=0.1).train()
    images, targets = torch.randn(4, 1, 64, 64), torch.tensor([0, 3, 9, 2])
    for norm in task.model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()
    perception, attention = task.model(images)
    expected = task.loss(perception, targets) + task.loss(attention, targets)
    torch.testing.assert_close(task.training_loss((images, targets)), expected)
    task.eval()
    torch.testing.assert_close(task(images), perception)


@pytest.mark.parametrize(
    "network",
    [partial(AttentionBranchNetwork, kernel_size=3), partial(LearnToPayAttention, stages=2), RecurrentPoolNetwork],
    ids=["attention branch", "pay attention", "recurrent pool"],
)
def test_trains_a_network_made_of_the_backbone(network, digits, trainer, tmp_path):
    options = {"attention": CBAM, "at": "backbone.layer2", "mixup": 0.2, "backbone_args": {"drop_path_rate": 0.1}}
    task, seen = Classification(**TINY, network=network, **options), Seen()
    trainer(seen).fit(task, datamodule=digits())
    x = torch.randn(2, 1, 32, 32)
    task.eval()
    forms = [
        Classification.load_from_checkpoint(tmp_path / "checkpoints/last.ckpt", weights_only=True).eval(),
        visattn.load(tmp_path / "checkpoints/last.ckpt"),
        visattn.load(tmp_path / "model"),
    ]
    assert type(forms[2]) is type(task.model)
    assert len(seen.losses) == 5
    for form in forms:
        assert torch.equal(form(x), task(x))
        assert form.labels == task.labels


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze_backbone": True}, "freeze_backbone must be false with a network, which takes the backbone apart"),
        ({"network": partial(AttentionBranchNetwork, pretrained=True)}, "pretrained must be given beside the network"),
        ({"network": lambda name: None}, "network must be a class or functools.partial of one"),
    ],
)
def test_refuses_networks_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Classification(**TINY, **{"network": AttentionBranchNetwork} | options)


def test_many_labels_from_plain_loaders(trainer, tmp_path):
    images, targets = torch.randn(24, 1, 32, 32), torch.randint(0, 2, (24, 3)).float()
    batches = DataLoader(TensorDataset(images, targets), batch_size=8)
    task = Classification(
        **TINY,
        backbone_args={"num_classes": 3, "in_chans": 1},
        multi_label=True,
        class_weights=[1.0, 2.0, 3.0],
        mixup=0.2,
    )
    run = trainer(limit_val_batches=0)
    run.callbacks = [c for c in run.callbacks if not getattr(c, "monitor", None)]
    run.fit(task, batches)
    run.test(task, batches, verbose=False)
    assert {"test/mAP", "test/f1", "test/loss"} <= run.callback_metrics.keys()
    rows = list(csv.DictReader((tmp_path / "per_class.csv").read_text().splitlines()))
    assert [int(row["images"]) for row in rows] == targets.sum(0).int().tolist()
    probabilities = run.predict(task, batches)[0]
    torch.testing.assert_close(probabilities, task.eval()(images[:8]).sigmoid())


def test_numbers_next_to_nothing_are_nothing_while_it_trains(digits, trainer):
    tiny, seen = torch.tensor([1e-40]), []

    class Watch(pl.Callback):
        def on_train_batch_end(self, *_):
            seen.append(bool((tiny * 1.0).any()))

    trainer(Watch(), max_steps=2).fit(Classification("test_resnet"), datamodule=digits())
    assert seen == [False, False]
    assert bool((tiny * 1.0).any())


def test_a_network_that_cannot_make_its_maps_again_says_so():
    task = Classification(network=DigitClassifier, grad_checkpointing=True)
    with pytest.raises(ValueError, match="grad_checkpointing must be false for DigitClassifier, which cannot do it"):
        task.configure_model()


@pytest.mark.parametrize(("kind", "factor"), [(None, 1.0), ("root", 2.0), ("linear", 4.0)])
def test_learning_rates_grow_with_the_number_of_processes(kind, factor, monkeypatch):
    task = Classification(**BUILT, attention=CBAM, attention_lr_factor=3.0)
    task.configure_model()
    four = SimpleNamespace(world_size=4, estimated_stepping_batches=10)
    monkeypatch.setattr(type(task), "trainer", four)
    task.scale_lr = kind
    (optimizer,), _ = task.configure_optimizers()
    rates = sorted({group["initial_lr"] for group in optimizer.param_groups})
    assert rates == pytest.approx([0.001 * factor, 0.003 * factor])


def test_weighted_classes_have_the_weighted_mean_loss():
    task = Classification(**TINY, class_weights=[1.0, 2.0, 4.0], backbone_args={"num_classes": 3}, label_smoothing=0.1)
    task.configure_model()
    logits, targets = torch.randn(5, 3), torch.tensor([0, 1, 2, 2, 0])
    expected = F.cross_entropy(logits, targets, weight=torch.tensor([1.0, 2.0, 4.0]), label_smoothing=0.1)
    torch.testing.assert_close(task.loss(logits, targets), expected)
