import copy
import errno
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn

import visattn
from visattn import checkpoint
from visattn.attention import CBAM, AdditiveAttention, Attention, NonLocal, SqueezeExcitation
from visattn.checkpoint import CheckpointError, describe, load, save
from visattn.data.transforms import Preprocess
from visattn.data.vocabulary import Words
from visattn.models import (
    AttentionBranchNetwork,
    Captioner,
    LearnToPayAttention,
    QuestionAnswerer,
    RecurrentPoolNetwork,
)
from visattn.models.decoders import ShowAttendAndTell
from visattn.surgery import Site, attach, insert, insertions, remove

FILES = {"config.json", "model.safetensors", "visattn.safetensors", "card.md"}


class Scale(Attention):
    """A caller's own module."""

    neutral = 1.0

    def __init__(self, channels: int, *, factors: tuple[float, ...] = (1.0,), how=None):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(factors).prod() * torch.ones(channels, 1, 1))

    def attend(self, x):
        return self.scale

    def read(self, x, *, weights):
        return x * weights


class Double(Attention):
    """Takes the place of a convolution."""

    replaces = "convolution"

    def __init__(self, channels: int, *, out_channels: int, stride: int):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(out_channels, channels, 3, 3))
        self.stride = stride

    def forward(self, x):
        return torch.nn.functional.conv2d(x, 2 * self.kernel, stride=self.stride, padding=1)


def awake(model: nn.Module) -> nn.Module:
    """Nothing inserted is the identity, and no weight is what a constructor makes it."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.rand_like(p))
        for inserted in insertions(model):
            if inserted.gate is not None:
                inserted.gate.fill_(0.7)
    return model.eval()


@pytest.fixture
def model() -> nn.Module:
    model = insert(timm.create_model("test_resnet", num_classes=5), partial(CBAM, reduction=8))
    return awake(insert(model, NonLocal, at="layer3.*"))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64)


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def edit(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def lightning(model: nn.Module, file: Path, **more) -> Path:
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    content = {"state_dict": weights | {"loss.weight": torch.ones(5)}, "visattn": describe(model), **more}
    torch.save(content, file)
    return file


# --- there and back ---------------------------------------------------------------------------------------------------


def test_a_folder_gives_the_model_back(model, x, tmp_path):
    transform = Preprocess((3, 64, 64), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 0.9)
    folder = save(model, tmp_path / "a" / "b", labels=list("vwxyz"), transform=transform, task="classification")
    assert set(files(folder)) == FILES
    assert [p.name for p in folder.parent.iterdir()] == ["b"]
    again = load(folder)
    assert torch.equal(again(x), model(x))
    assert not again.training
    assert (again.labels, again.transform, again.task) == (list("vwxyz"), transform, "classification")
    assert [i.site for i in insertions(again)] == [i.site for i in insertions(model)]
    assert [i.gate is None for i in insertions(again)] == [i.gate is None for i in insertions(model)]


def test_what_was_loaded_is_copied_and_saved_with_all_that_is_known_of_it(model, x, tmp_path):
    first = load(save(model, tmp_path / "first", labels=list("vwxyz"), task="classification"))
    assert first.transform == Preprocess.of(model)
    assert first.state_dict().keys() == model.state_dict().keys()
    second = load(save(copy.deepcopy(first), tmp_path / "second"))
    assert torch.equal(second(x), model(x))
    assert (second.labels, second.transform, second.task) == (first.labels, first.transform, first.task)
    assert files(tmp_path / "first")["config.json"] == files(tmp_path / "second")["config.json"]


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("test_resnet", {"in_chans": 1, "num_classes": 7, "global_pool": "max"}),
        ("test_resnet", {"num_classes": 0}),
        ("test_vit", {"img_size": (96, 64), "class_token": False, "global_pool": "avg"}),
        ("test_efficientnet", {"num_classes": 3, "drop_path_rate": 0.1}),
        ("test_convnext", {"in_chans": 4}),
    ],
)
def test_plain_timm_loads_the_folder_as_the_backbone_alone(name, args, tmp_path):
    model = awake(insert(timm.create_model(name, **args), SqueezeExcitation, at="stages"))
    x = torch.randn(2, args.get("in_chans", 3), *args.get("img_size", (64, 64)))
    folder = save(model, tmp_path / "it", model_args={"drop_path_rate": 0.1} if "drop_path_rate" in args else None)
    output = model(x)
    assert torch.equal(load(folder)(x), output)
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    backbone = remove(model)
    assert plain.state_dict().keys() == backbone.state_dict().keys()
    assert torch.equal(plain(x), backbone(x))
    assert not torch.equal(plain(x), output)


def test_timm_reads_the_preprocessing_that_was_saved(model, tmp_path):
    transform = Preprocess((3, 48, 48), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 0.9)
    save(model, tmp_path / "it", transform=transform)
    assert Preprocess.of(timm.create_model(f"local-dir:{tmp_path / 'it'}")) == transform


def test_a_changed_head_is_saved_as_it_is(x, tmp_path):
    model = timm.create_model("test_resnet", num_classes=5)
    model.reset_classifier(3)
    assert torch.equal(load(save(awake(model), tmp_path / "it"))(x), model(x))


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit"])
def test_a_features_only_model(name, tmp_path):
    model = timm.create_model(name, features_only=True, out_indices=(0, 1), in_chans=1)
    model = awake(insert(model, SqueezeExcitation, at="stages"))
    x = torch.randn(2, 1, 160, 160)
    again = load(save(model, tmp_path / "it"))
    for mine, its in zip(again(x), model(x), strict=True):
        assert torch.equal(mine, its)
    assert again.transform.input_size == (1, 160, 160)


def test_a_backbone_with_nothing_inserted(x, tmp_path):
    model = awake(timm.create_model("test_resnet"))
    again = load(save(model, tmp_path / "it"))
    assert torch.equal(again(x), model(x))
    assert (again.labels, again.task, insertions(again)) == (None, None, [])


def test_a_network_that_records_its_arguments(tmp_path):
    module, x = awake(CBAM(64, reduction=4)), torch.randn(2, 64, 5, 7)
    folder = save(module, tmp_path / "it", task="weighing")
    assert set(files(folder)) == FILES - {"model.safetensors"}
    again = load(folder)
    assert torch.equal(again(x), module(x))
    assert (again.task, again.transform) == ("weighing", None)


def test_a_network_that_was_told_what_to_make_its_parts_of(tmp_path):
    decoder = partial(ShowAttendAndTell, hidden=8, embedding=8, attention=partial(AdditiveAttention, width=4))
    captioner = Captioner(9, backbone="resnet10t", decoder=decoder, width=16).eval()
    images, words = torch.randn(2, 3, 64, 64), torch.randint(9, (2, 3, 4))
    save(captioner, tmp_path / "captioner", task="captioning")
    again = load(tmp_path / "captioner")
    assert torch.equal(again(images, words), captioner(images, words))
    card = (tmp_path / "captioner" / "card.md").read_text()
    assert "decoder=ShowAttendAndTell(hidden=8, embedding=8, attention=AdditiveAttention(width=4))" in card
    config = tmp_path / "captioner" / "config.json"
    config.write_text(config.read_text().replace("AdditiveAttention", "os.system"))
    with pytest.raises(CheckpointError, match=r"it names the class os.system, unknown here"):
        load(tmp_path / "captioner")


@pytest.fixture
def trained(tmp_path):
    """A folder with a backbone, its batch norms not as they start."""
    torch.manual_seed(0)
    backbone = timm.create_model("mobilenetv2_050", pad_type="same")
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    backbone.pretrained_cfg["tag"] = "of_my_own"
    visattn.save(backbone, tmp_path / "trained", model_args={"pad_type": "same"})
    return f"local-dir:{tmp_path / 'trained'}"


def test_a_network_on_a_trained_backbone_does_without_its_weights(trained, tmp_path):
    network = visattn.models.Captioner(9, backbone=trained, pretrained=True, width=8).eval()
    small = visattn.save(network, tmp_path / "small", backbone=False, half=True)
    whole = visattn.save(network, tmp_path / "whole")
    sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in (small, whole)]
    held = sum(p.numel() for name, p in network.named_parameters() if not name.startswith("backbone."))
    assert sizes[0] < 2.2 * held + 10_000 < sizes[1]
    assert "mobilenetv2_050.of_my_own, whose weights are not in here" in (small / "card.md").read_text()
    later = visattn.save(visattn.load(whole), tmp_path / "later", backbone=False)
    assert "mobilenetv2_050.of_my_own, whose weights are not in here" in (later / "card.md").read_text()

    images, words = torch.randn(2, 3, 64, 64), torch.randint(9, (2, 1, 3))
    again = visattn.load(small, backbone=trained)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    torch.testing.assert_close(again.features(images), network.features(images))
    torch.testing.assert_close(again(images, words), network(images, words), rtol=1e-2, atol=1e-2)
    shutil.move(tmp_path / "trained", tmp_path / "gone")  # a whole one does without the folder
    torch.testing.assert_close(visattn.load(whole)(images, words), network(images, words))

    with pytest.raises(CheckpointError, match="small: it does not hold the weights of its backbone, mob"):
        visattn.load(small, backbone=trained)
    with pytest.raises(CheckpointError, match="it has the weights of its backbone itself: backbone must be"):
        visattn.load(whole, backbone=trained)
    other = visattn.save(timm.create_model("mobilenetv2_050"), tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"backbone must be mobilenetv2_050.* as it was trained with it"):
        visattn.load(small, backbone=f"local-dir:{other}")


def test_a_network_that_has_the_backbone_takes_the_rest_from_a_checkpoint_that_names_it(trained, tmp_path):
    options = {"backbone": trained, "pretrained": True, "width": 8}
    network, into = Captioner(9, **options).eval(), Captioner(9, **options).eval()
    small = save(network, tmp_path / "small", backbone=False)
    other = Captioner(9, **options | {"pretrained": False}).eval()
    shutil.move(tmp_path / "trained", tmp_path / "gone")  # nothing is looked up
    images, words = torch.randn(2, 3, 64, 64), torch.randint(9, (2, 1, 3))
    assert load(small, into=into) is into
    assert torch.equal(into(images, words), network(images, words))

    before = copy.deepcopy(other.state_dict())
    for stranger in (other, timm.create_model("test_resnet")):
        message = r"small: into must have mobilenetv2_050\.of_my_own as it was trained with it, its backbone is another"
        with pytest.raises(CheckpointError, match=message):
            load(small, into=stranger)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    load(small, into=other, backbone=f"local-dir:{tmp_path / 'gone'}")  # told where its weights are
    assert torch.equal(other(images, words), network(images, words))


def test_a_checkpoint_says_what_it_is_without_its_weights(trained, tmp_path):
    network = Captioner(9, backbone=trained, pretrained=True, width=8)
    folder = save(network, tmp_path / "small", backbone=False)
    (folder / "visattn.safetensors").unlink()
    assert "backbone" in checkpoint.description(folder)
    assert "backbone" not in checkpoint.description(save(network, tmp_path / "whole"))
    assert checkpoint.description(tmp_path / "whole")["model"]["arguments"]["width"] == 8
    with pytest.raises(CheckpointError, match="nowhere: there is no checkpoint"):
        checkpoint.description(tmp_path / "nowhere")


@pytest.mark.slow
def test_the_captioner_in_checkpoints_is_what_a_training_on_its_encoder_can_start_from(shared):
    encoder = f"local-dir:{shared / 'weights' / 'mobilenetv2_100'}"
    start = Path(__file__).parents[1] / "checkpoints" / "captioner"
    whole = load(start, backbone=encoder)
    decoder = partial(ShowAttendAndTell, attention=partial(AdditiveAttention, width=256), gate="vector", embedding=256)
    options = {"decoder": partial(decoder, first="begin", tied=True), "width": 384, "unknown": 1}
    into = Captioner(len(whole.vocabulary), backbone=encoder, pretrained=True, **options)
    assert load(start, into=into) is into
    weights = into.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in whole.state_dict().items())


def test_only_a_backbone_as_timm_has_it_is_left_out(model, tmp_path):
    with pytest.raises(CheckpointError, match="backbone must be true, but for a network that has one"):
        visattn.save(model, tmp_path / "mine", backbone=False)
    captioner = visattn.models.Captioner(9, backbone="resnet10t")
    visattn.insert(captioner.backbone, visattn.SimAM)
    with pytest.raises(CheckpointError, match="backbone must be true, but for a network that has one"):
        visattn.save(captioner, tmp_path / "mine", backbone=False)
    branch = AttentionBranchNetwork("test_resnet", num_classes=7)
    with pytest.raises(CheckpointError, match="backbone must be true where its classifier is new, of 7 classes"):
        visattn.save(branch, tmp_path / "mine", backbone=False)


@pytest.mark.parametrize("network", [AttentionBranchNetwork, LearnToPayAttention, RecurrentPoolNetwork])
def test_a_classifier_finds_what_it_has_of_the_backbone_it_names(tmp_path, network):
    visattn.save(timm.create_model("test_resnet"), tmp_path / "trained")
    trained = f"local-dir:{tmp_path / 'trained'}"
    options = {} if network is AttentionBranchNetwork else {"num_classes": 3}
    model = network(trained, pretrained=True, **options).eval()
    small = visattn.save(model, tmp_path / "small", backbone=False)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(visattn.load(small, backbone=trained)(images), model(images))


def test_a_part_that_nobody_can_make_again_is_refused(tmp_path):
    captioner = Captioner(9, backbone="resnet10t", decoder=lambda words, features: ShowAttendAndTell(words, features))
    with pytest.raises(CheckpointError, match=r"argument decoder of Captioner .* must be text, a number, .* a class"):
        save(captioner, tmp_path / "captioner", task="captioning")


def test_a_callers_own_class_comes_from_the_caller(x, tmp_path):
    model = awake(insert(timm.create_model("test_resnet"), partial(Scale, factors=(2.0, 3.0)), at="stages", gate=None))
    folder = save(model, tmp_path / "it")
    assert torch.equal(load(folder, classes=[Scale])(x), model(x))
    with pytest.raises(
        CheckpointError, match=r"it names the class \S*test_checkpoint\.Scale, unknown here: pass classes=\[Scale\]"
    ):
        load(folder)
    assert "classes=[Scale]" in (folder / "card.md").read_text()


def test_what_takes_the_place_of_a_convolution(x, tmp_path):
    model = timm.create_model("test_resnet")
    site = Site("layer2.0.conv2", 48, 8, 8, 8, "nchw", side="instead")
    convolution = model.layer2[0].conv2
    made = Double(convolution.in_channels, out_channels=convolution.out_channels, stride=convolution.stride[0])
    attach(model, made, site, gated=False)
    awake(model)
    folder = save(model, tmp_path / "it")
    assert torch.equal(load(folder, classes=[Double])(x), model(x))
    bare = timm.create_model("test_resnet")
    bare.load_state_dict(model.state_dict(), strict=False)
    save(model, folder, only="inserted")
    assert torch.equal(load(folder, into=bare, classes=[Double])(x), model(x))


def test_a_backbone_that_timm_does_not_build(x, tmp_path):
    model = awake(insert(torchvision.models.squeezenet1_1(), CBAM, at=["features.6", "features.12"]))
    folder = save(model, tmp_path / "it", transform=Preprocess((3, 64, 64), (0.5,) * 3, (0.5,) * 3))
    into = torchvision.models.squeezenet1_1()
    again = load(folder, into=into)
    assert again is into
    assert torch.equal(again(x), model(x))
    assert again.transform.input_size == (3, 64, 64)
    with pytest.raises(CheckpointError, match=r"build it yourself, load\(path, into=model\)"):
        load(folder)
    assert "into=model" in (folder / "card.md").read_text()


def test_the_inserted_modules_alone_take_kilobytes(model, x, tmp_path):
    folder = save(model, tmp_path / "it", only="inserted")
    assert set(files(folder)) == FILES - {"model.safetensors"}
    backbone = remove(copy.deepcopy(model))
    before = backbone(x)
    again = load(folder, into=backbone)
    assert torch.equal(again(x), model(x))
    assert not torch.equal(again(x), before)
    with pytest.raises(CheckpointError, match=r"holds the inserted modules alone: pass the backbone, load\(path, into"):
        load(folder)
    with pytest.raises(CheckpointError, match=r"into has something inserted already: visattn\.remove it first"):
        load(folder, into=again)
    with pytest.raises(CheckpointError, match="it was inserted into test_resnet, into is test_vit"):
        load(folder, into=timm.create_model("test_vit"))


def test_a_lightning_checkpoint(model, x, tmp_path):
    again = load(lightning(model, tmp_path / "last.ckpt", hyper_parameters={"lr": 0.1}, epoch=3))
    assert torch.equal(again(x), model(x))
    assert again.transform == Preprocess.of(model)


def test_a_lightning_checkpoint_of_a_compiled_model(model, x, tmp_path):
    weights = {f"model._orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": weights, "visattn": describe(torch.compile(model))}, tmp_path / "last.ckpt")
    assert torch.equal(load(tmp_path / "last.ckpt")(x), model(x))


def test_wrapped_models_are_saved_as_what_they_wrap(model, x, tmp_path):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for wrapped in (torch.compile(model), nn.parallel.DistributedDataParallel(model), nn.DataParallel(model)):
            assert torch.equal(load(save(wrapped, tmp_path / "it"))(x), model(x))
    finally:
        torch.distributed.destroy_process_group()


def test_shared_and_channels_last_weights(model, x, tmp_path):
    model.layer1[0].bn1.weight = model.layer1[0].bn2.weight
    model = model.to(memory_format=torch.channels_last)
    again = load(save(model, tmp_path / "it"))
    torch.testing.assert_close(again(x), model(x))
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_precision_is_kept(model, tmp_path):
    model = model.bfloat16()
    model.layer4.float()
    again = load(save(model, tmp_path / "it"))
    assert {n: t.dtype for n, t in again.state_dict().items()} == {n: t.dtype for n, t in model.state_dict().items()}
    assert again.layer4[0].conv1.weight.dtype == torch.float32
    assert again.layer3[0].conv1.weight.dtype == torch.bfloat16


def test_neither_saving_nor_loading_disturbs_random_numbers(model, tmp_path):
    before = torch.get_rng_state()
    load(save(model, tmp_path / "it"))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_given_model_keeps_its_device_and_precision(model, tmp_path):
    save(model, tmp_path / "it", only="inserted")
    again = load(tmp_path / "it", into=remove(copy.deepcopy(model)).bfloat16())
    assert {t.dtype for t in again.parameters()} == {torch.bfloat16}


def test_the_card_says_what_it_is(model, tmp_path):
    folder = save(model, tmp_path / "it", labels=list("vwxyz"), task="classification", card="Top-1: 97 % on digits.")
    card = (folder / "card.md").read_text()
    assert card.startswith("# test_resnet with CBAM, NonLocal\n\nTop-1: 97 % on digits.\n\n- Network: test_resnet, ")
    inside = sum(p.numel() for p in model.visattn.parameters())
    for said in (
        f"{sum(p.numel() for p in model.parameters()) - inside:,} parameters\n",
        f"- Inserted parameters: {inside:,}\n",
        "- Inserted: CBAM(reduction=8), gated at layer1.0",
        "- Inserted: NonLocal() at layer3.0",
        "- Labels: 5: v, w, x, y, z\n",
        "- Task: classification\n",
        f"timm {timm.__version__}",
        'visattn.load("it")',
        'timm.create_model("local-dir:it", pretrained=True)',
    ):
        assert said in card


# --- nothing is lost --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("there", [True, False])
def test_a_save_that_fails_half_way_leaves_what_was_there(how, there, model, tmp_path, monkeypatch):
    folder, write = tmp_path / "it", checkpoint.save_file
    if there:
        save(model, folder, card="the first")
    before = files(folder) if there else None
    written = []

    def fail(tensors, file, metadata):
        if written:
            file.write_bytes(b"half")
            raise how
        write(tensors, file, metadata=metadata)
        written.append(file)

    monkeypatch.setattr(checkpoint, "save_file", fail)
    message = "it cannot be written, what was there is untouched: .*No space left"
    with pytest.raises(
        CheckpointError if isinstance(how, OSError) else KeyboardInterrupt,
        match=message if isinstance(how, OSError) else None,
    ):
        save(awake(model), folder)
    assert written
    assert [p.name for p in tmp_path.iterdir()] == (["it"] if there else [])
    assert before == (files(folder) if there else None)


def test_a_swap_that_fails_puts_the_previous_checkpoint_back(model, tmp_path, monkeypatch):
    folder, replace = save(model, tmp_path / "it"), Path.replace
    before = files(folder)

    def fail(self, target):
        if self.name == ".it.partial":
            raise OSError(errno.EIO, "Input/output error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(CheckpointError, match="cannot be written, what was there is untouched"):
        save(awake(model), folder)
    assert files(folder) == before
    assert [p.name for p in tmp_path.iterdir()] == ["it"]


def test_a_process_killed_within_the_swap_leaves_the_previous_checkpoint_and_says_where(model, x, tmp_path):
    folder = save(model, tmp_path / "it")
    folder.rename(tmp_path / ".it.previous")
    (tmp_path / ".it.partial").mkdir()
    with pytest.raises(CheckpointError, match=r"a save was interrupted, what was there before is in \S+\.it\.previous"):
        load(folder)
    assert torch.equal(load(tmp_path / ".it.previous")(x), model(x))
    save(model, folder)
    assert [p.name for p in tmp_path.iterdir()] == ["it"]


def test_what_others_put_beside_a_checkpoint_stays(model, tmp_path):
    folder = save(model, tmp_path / "it")
    (folder / "metrics.json").write_text("{}")
    (folder / "deep").mkdir()
    (folder / "deep" / "card.md").write_text("theirs")
    (folder / "link").symlink_to("deep")
    save(model, folder, only="inserted")
    assert {p.name for p in folder.iterdir()} == FILES - {"model.safetensors"} | {
        "metrics.json",
        "deep",
        "link",
    }
    assert (folder / "link").is_symlink()
    assert (folder / "deep" / "card.md").read_text() == "theirs"


def test_a_folder_of_something_else_is_not_touched(model, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"jpg")
    with pytest.raises(CheckpointError, match="holds files but no checkpoint of visattn: save to a folder of its own"):
        save(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"photo\.jpg is a file, not a folder"):
        save(model, tmp_path / "photo.jpg")
    assert files(tmp_path) == {"photo.jpg": b"jpg"}


# --- what cannot be saved ---------------------------------------------------------------------------------------------


def test_refuses_what_is_no_plain_value(tmp_path):
    model = insert(timm.create_model("test_resnet"), partial(Scale, how=nn.ReLU()), at="layer1", gate=None)
    with pytest.raises(CheckpointError, match=r"argument how of Scale at layer1 must be text, a number, .* got a ReLU"):
        save(model, tmp_path / "it")
    assert not (tmp_path / "it").exists()


def test_refuses_an_attention_that_was_changed_after_it_was_built(model, tmp_path):
    insertions(model)[0].attention.register_buffer("extra", torch.zeros(1))
    with pytest.raises(CheckpointError, match=r"CBAM at layer1\.0\S* built again .* another module: extra is missing"):
        save(model, tmp_path / "it")


def test_refuses_a_backbone_that_was_changed_after_timm_built_it(model, tmp_path):
    model.fc = nn.Sequential(nn.Linear(model.num_features, 9), nn.Linear(9, 5))
    message = (
        r"test_resnet built again is another network: fc\.0\.weight is missing, .* and \d+ more; give .* model_args"
    )
    with pytest.raises(CheckpointError, match=message):
        save(model, tmp_path / "it")
    assert not (tmp_path / "it").exists()
    save(model, tmp_path / "it", only="inserted")
    assert load(tmp_path / "it", into=timm.create_model("test_resnet")).labels is None


def test_model_args_say_what_timm_does_not_remember(x, tmp_path):
    model = awake(timm.create_model("test_resnet", stem_width=8, act_layer=nn.SiLU))
    with pytest.raises(CheckpointError, match="act_layer"):
        save(model, tmp_path / "it")
    del model._model_args
    with pytest.raises(CheckpointError, match=r"built again is another network: .*; give .* model_args"):
        save(model, tmp_path / "it")
    save(model, tmp_path / "it", model_args={"stem_width": 8, "act_layer": "silu"})
    assert torch.equal(load(tmp_path / "it")(x), model(x))
    with pytest.raises(CheckpointError, match="in_chans=1 disagrees with the current model"):
        save(model, tmp_path / "it", model_args={"stem_width": 8, "in_chans": 1})
    with pytest.raises(CheckpointError, match=r"model_args must be text, a number, .* got a type"):
        save(model, tmp_path / "it", model_args={"act_layer": nn.SiLU})
    with pytest.raises(CheckpointError, match="model_args are for a backbone that timm builds, got one for CBAM"):
        save(CBAM(16), tmp_path / "it", model_args={"stem_width": 8})


def test_refuses_labels_that_are_not_one_a_class(model, tmp_path):
    with pytest.raises(CheckpointError, match="labels must name each of the 5 classes, got 2"):
        save(model, tmp_path / "it", labels=["cat", "dog"])


def test_refuses_an_unknown_part(model, tmp_path, unchecked):
    with pytest.raises(ValueError, match="only must be \"inserted\" or None, got 'backbone'"):
        save(model, tmp_path / "it", only="backbone")


# --- what cannot be loaded --------------------------------------------------------------------------------------------


def change(*keys, to):
    def apply(config):
        for key in keys[:-1]:
            config = config[key]
        if to is None:
            del config[keys[-1]]
        else:
            config[keys[-1]] = to

    return apply


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (change("visattn", to=None), "no visattn block"),
        (change("visattn", "format", to=2), "its format is 2, this version of visattn reads 1"),
        (change("visattn", "labels", to=None), "its visattn block has no labels, or a wrong one: None"),
        (change("visattn", "insertions", to={}), "its visattn block has no insertions, or a wrong one: {}"),
        (change("visattn", "insertions", 0, "arguments", to=None), "a module is described wrongly: {'class': 'CBAM'"),
        (
            change("visattn", "transform", "std", to=[0.0, 0.0, 0.0]),
            "its transform is described wrongly: std must be positive",
        ),
        (change("visattn", "insertions", 0, "site", "depth", to=3), "the site of CBAM is described wrongly: .*depth"),
        (change("visattn", "insertions", 0, "site", "name", to="layer9"), "no module is named 'layer9' in ResNet"),
        (
            change("visattn", "insertions", 0, "class", to="Attend"),
            r"names the class Attend, unknown here: pass classes=\[Attend\]",
        ),
        (change("visattn", "insertions", 0, "class", to="os.system"), r"names the class os\.system, unknown here"),
        (
            change("visattn", "insertions", 0, "class", to="torch.nn.Linear"),
            r"names the class torch\.nn\.Linear, unknown",
        ),
        (
            change("visattn", "insertions", 0, "arguments", "reductoin", to=3),
            r"CBAM\(.*reductoin=3\) cannot be built: TypeError",
        ),
        (
            change("visattn", "insertions", 0, "arguments", "channels", to=40),
            r"ResNet: visattn\.\S+ is \(4, 32\S*\), expected \(5, 40",
        ),
        (change("architecture", to=None), r"build it yourself, load\(path, into=model\)"),
        (change("architecture", to="resnet_of_mine"), r"timm \S+ has no model 'resnet_of_mine'"),
        (change("architecture", to="local-dir:elsewhere"), "has no model 'local-dir:elsewhere'"),
        (change("architecture", to="test_resnet2"), "has no model 'test_resnet2'"),
        (change("architecture", to="test_vit"), r"no module is named 'layer1\.0\S+' in VisionTransformer"),
        (
            change("model_args", "num_classes", to=6),
            r"ResNet: fc\.weight is \(5, \d+\), expected \(6, \d+\)",
        ),
        (change("pretrained_cfg", to=None), "timm cannot build test_resnet: KeyError: 'pretrained_cfg'"),
        (change("model_args", "depth", to=3), "timm cannot build test_resnet: TypeError: .*depth"),
        (change("model_args", "pretrained", to=True), "timm cannot build test_resnet: TypeError: .*pretrained"),
        (change("model_args", "checkpoint_path", to="elsewhere.pth"), "model_args must not name a checkpoint_path"),
    ],
)
def test_a_description_that_is_wrong_is_said_in_one_line(broken, message, model, tmp_path):
    edit(save(model, tmp_path / "it"), broken)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path / "it")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'it'}: ")


@pytest.mark.parametrize("kind", ["captioner", "answerer"])
def test_a_vocabulary_of_more_or_fewer_words_than_the_model_has_is_refused(kind, tmp_path):
    words = Words([f"word {k}" for k in range(9)])  # and one that ends, and one that is not known

    def make() -> nn.Module:
        if kind == "captioner":
            return Captioner(11, backbone="resnet10t", width=8)
        return QuestionAnswerer(11, 3, backbone="resnet10t", hidden=8, embedding=8)

    folder, into = save(make(), tmp_path / "it", vocabulary=words), make()
    assert load(folder).vocabulary == words
    edit(folder, change("visattn", "vocabulary", to=Words(["a", "dog"]).state))
    before = copy.deepcopy(into.state_dict())
    for options in ({}, {"into": into}):
        with pytest.raises(CheckpointError, match="vocabulary must have the 11 words of the model, got 4"):
            load(folder, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in into.state_dict().items())


@pytest.mark.parametrize("name", sorted(FILES - {"card.md"}))
def test_a_missing_or_truncated_file_is_named(name, model, tmp_path):
    file = save(model, tmp_path / "it") / name
    whole = file.read_bytes()
    for part in (0, 5, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:part] if name != "config.json" else whole[: max(part - 2, 0)])
        with pytest.raises(CheckpointError, match=f"{name} (is corrupt or truncated|cannot be read)"):
            load(file.parent)
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load(file.parent)


def test_a_place_with_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: there is no checkpoint"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load(tmp_path)


def test_a_model_of_another_kind_is_left_as_it_was(model, x, tmp_path):
    folder = save(model, tmp_path / "it")
    for other in (timm.create_model("test_resnet", num_classes=6), timm.create_model("test_vit")):
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(
            CheckpointError, match=r"its weights are of another model than ResNet: fc|no module is named"
        ):
            load(folder, into=other)
        assert insertions(other) == []
        assert other.state_dict().keys() == before.keys()
        assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in before.items())


def test_weights_of_another_checkpoint_are_not_mixed_in(model, tmp_path):
    folder = save(model, tmp_path / "it")
    other = save(insert(timm.create_model("test_resnet", num_classes=5), CBAM, at="layer1"), tmp_path / "other")
    shutil.copy(other / "visattn.safetensors", folder)
    with pytest.raises(CheckpointError, match=r"its weights are of another model than ResNet: visattn\.\S+ is missing"):
        load(folder)


class Evil:
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("where", ["state_dict", "visattn", "hyper_parameters", "callbacks"])
def test_a_strangers_checkpoint_runs_nothing(where, model, tmp_path):
    content = {"state_dict": {}, "visattn": describe(model)} | {where: Evil(tmp_path / "owned")}
    torch.save(content, tmp_path / "evil.ckpt")
    with pytest.raises(CheckpointError, match=r"refused, it asks for getattr, and a checkpoint must not run code"):
        load(tmp_path / "evil.ckpt")
    assert not (tmp_path / "owned").exists()
    torch.load(tmp_path / "evil.ckpt", weights_only=False)
    assert (tmp_path / "owned").exists()  # so the file was evil indeed


def test_a_lightning_checkpoint_that_is_none(model, tmp_path):
    file = lightning(model, tmp_path / "last.ckpt")
    whole = file.read_bytes()
    for part in (b"", whole[: len(whole) // 2], b"not a checkpoint"):
        file.write_bytes(part)
        with pytest.raises(CheckpointError, match=r"last\.ckpt: it is no file of torch\.save, or corrupt"):
            load(file)
    torch.save({"state_dict": model.state_dict()}, file)
    with pytest.raises(CheckpointError, match="it is no Lightning checkpoint of a task of visattn"):
        load(file)


SHIPPED = sorted(folder.parent for folder in Path(__file__).parents[1].glob("checkpoints/*/config.json"))
WHOLE = [each for each in SHIPPED if each.name != "captioner"]  # tested where its encoder is: test_caption.py
CLASSIFIERS = [each for each in WHOLE if each.name != "draw"]


@pytest.mark.parametrize("folder", WHOLE, ids=lambda folder: folder.name)
def test_what_is_shipped_is_small_and_in_the_index(folder):
    assert f"[{folder.name}]({folder.name}/card.md)" in (folder.parent / "README.md").read_text("utf-8")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 5e6
    assert f'visattn.load("checkpoints/{folder.name}")' in (folder / "card.md").read_text("utf-8")


@pytest.mark.parametrize("folder", CLASSIFIERS, ids=lambda folder: folder.name)
def test_what_is_shipped_tells_images_apart(folder):
    model = load(folder)
    x = torch.rand(2, *model.transform.input_size)
    assert model(x).shape == (2, len(model.labels))
    assert not torch.equal(model(x)[0], model(x)[1])


def test_what_is_shipped_draws():
    model = load(Path(__file__).parents[1] / "checkpoints/draw")
    torch.manual_seed(0)
    drawn = model.generate(64).canvas.sigmoid()
    assert drawn.shape == (64, *model.transform.input_size)
    assert 0.08 < drawn.mean() < 0.18  # of MNIST's pixels, 13 % are on
    assert ((drawn < 0.1) | (drawn > 0.9)).float().mean() > 0.8
    assert drawn.std(0).max() > 0.3  # not always the same


def test_the_public_names():
    assert (visattn.save, visattn.load) == (save, load)
