"""Save a model with what was inserted, and load it again, without running anything a file holds.

A checkpoint is a folder:

- ``config.json``: timm's own description of the backbone, and a ``visattn`` block with the rest;
- ``model.safetensors``: the backbone alone, so that plain timm loads the folder;
- ``visattn.safetensors``: what was inserted, or the whole network where it is no backbone;
- ``card.md``: what it is, for people.

A Lightning ``.ckpt`` loads alike if it holds what :func:`describe` gives as ``"visattn"``, and the weights as
``"model.…"``. Classes are looked up by name in ``visattn.attention.__all__``, in ``visattn.models.__all__``, in
``visattn.models.decoders.__all__`` and among the caller's; nothing is imported because a file names it. What a
network makes by calling a class, such as a decoder's attention, is ``{"makes": class, "arguments": …}`` there.
"""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from types import NoneType
from typing import Any, Literal

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models._hub import save_config_for_hf
from timm.models._pretrained import filter_pretrained_cfg
from torch import Tensor, nn

from visattn import attention, models
from visattn.attention.base import Attention
from visattn.data.features import digest
from visattn.data.transforms import Preprocess
from visattn.data.vocabulary import Vocabulary
from visattn.models import decoders
from visattn.surgery import Site, SurgeryError, attach, insertions, inside, remove
from visattn.version import __version__

FORMAT = 1
CONFIG, BACKBONE, INSERTED, CARD = "config.json", "model.safetensors", "visattn.safetensors", "card.md"
BLOCK: dict[str, Any] = {
    "only": (str, NoneType),
    "model": (dict, NoneType),
    "insertions": list,
    "task": (str, NoneType),
    "transform": (dict, NoneType),
    "labels": (list, NoneType),
    "versions": dict,
}
LATER: dict[str, Any] = {"vocabulary": (dict, NoneType)}
"""What checkpoints of before do not say."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; the message says in one line why."""


# --- writing ----------------------------------------------------------------------------------------------------------


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    labels: Sequence[str] | None = None,
    transform: Preprocess | None = None,
    task: str | None = None,
    vocabulary: Vocabulary | None = None,
    model_args: Mapping[str, Any] | None = None,
    only: Literal["inserted"] | None = None,
    backbone: bool = True,
    half: bool = False,
    card: str | None = None,
) -> Path:
    """Write a model with what was inserted into it to a folder.

    The folder appears when all of it is written: a save that is interrupted, or finds the disk full, leaves what was
    there before. Other files in the folder of an earlier checkpoint stay. Of several processes, call it in one.

    Args:
        model: A timm backbone; a network that records its ``arguments``, such as an attention module alone; or any
            other network, which is loaded by ``into=``. A compiled or distributed model is saved as what it wraps.
        folder: Where to: a new or empty folder, or that of an earlier checkpoint, which is replaced.
        labels: Names of the classes, in the order of the logits; left out, those the model was loaded with.
        transform: What makes its input of an image; left out, that the model was loaded with, else timm's.
        task: What it was trained for, such as ``"classification"``.
        vocabulary: What the numbers stand for that it says as words; left out, that the model was loaded with.
        model_args: Arguments of ``timm.create_model`` that timm does not remember, such as ``drop_path_rate``.
        only: ``"inserted"`` leaves the backbone out: kilobytes, to be loaded by ``into=``.
        backbone: Whether the weights of its backbone are written with a network that has one. Where they stayed as
            they were, the checkpoint can do without: it names them, and :func:`load` finds them again.
        half: Whether weights are written in half precision. They are loaded in single precision again.
        card: What the card should say beside what is known: data, command, metrics; Markdown.

    Returns:
        The folder.

    Raises:
        CheckpointError: If the model could not be built again from what would be written, or the folder cannot be
            written. What was there before is untouched.

    Example:
        >>> import tempfile, timm, visattn
        >>> model = visattn.insert(timm.create_model("resnet18"), visattn.CBAM)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = load(save(model, f"{folder}/mine"))
        >>> again.transform.input_size
        (3, 224, 224)
    """
    if only not in (None, "inserted"):
        raise ValueError(f'only must be "inserted" or None, got {only!r}')
    folder, model = Path(folder), _unwrapped(model)
    known: Any = {"labels": labels, "transform": transform, "task": task, "vocabulary": vocabulary}
    config = describe(model, **known, model_args=model_args, only=only)
    block = config["visattn"]
    state, ours = _separate(model.state_dict()), _ours(model)
    if not backbone:
        part: Any = getattr(model, "backbone", None)
        cfg = getattr(part, "pretrained_cfg", None)
        if block["model"] is None or cfg is None or insertions(part):
            raise CheckpointError("backbone must be true, but for a network that has one of timm as it was trained")
        if (count := part.num_classes) not in (0, cfg["num_classes"]):
            raise CheckpointError(f"backbone must be true where its classifier is new, of {count} classes")
        tagged = f"{cfg['architecture']}.{cfg['tag']}" if cfg.get("tag") else cfg["architecture"]
        block["backbone"] = {"name": tagged, "digest": digest(part.state_dict())}
        state = {name: tensor for name, tensor in state.items() if not name.startswith("backbone.")}
    if half:
        block["half"] = True
        state = {name: t.half() if t.is_floating_point() else t for name, t in state.items()}
    if block["model"]:
        weights = {INSERTED: state}
    else:
        weights = {INSERTED: {name: t for name, t in state.items() if name.startswith(ours)}}
    if not (only or block["model"]):
        weights[BACKBONE] = {name: t for name, t in state.items() if not name.startswith(ours)}
    try:
        with _replacing(folder.resolve()) as new:
            (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            (new / CARD).write_text(_card(model, config, folder, card), encoding="utf-8", errors="replace")
            for name, tensors in weights.items():
                save_file(tensors, new / name, metadata={"format": "pt"})
                shutil.copymode(new / CONFIG, new / name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be written, what was there is untouched: {error}") from error
    return folder


def describe(
    model: nn.Module,
    *,
    labels: Sequence[str] | None = None,
    transform: Preprocess | None = None,
    task: str | None = None,
    vocabulary: Vocabulary | None = None,
    model_args: Mapping[str, Any] | None = None,
    only: Literal["inserted"] | None = None,
) -> dict[str, Any]:
    """Say in plain values how a model is built again: the content of ``config.json``. Arguments as in :func:`save`.

    What it says is tried, on the meta device, and compared with the model.

    Raises:
        CheckpointError: If the model could not be built again from it.
    """
    model = _unwrapped(model)
    architecture = _architecture(model)
    if model_args and not architecture:
        raise CheckpointError(f"model_args are for a backbone that timm builds, got one for {type(model).__name__}")
    about: dict[str, Any] = {"labels": labels, "transform": transform, "task": task, "vocabulary": vocabulary}
    for name, kind in {"labels": list, "transform": Preprocess, "task": str, "vocabulary": Vocabulary}.items():
        if about[name] is None and isinstance(getattr(model, name, None), kind):
            about[name] = getattr(model, name)  # what it was loaded with
    if about["transform"] is None and architecture:
        with suppress(ValueError):  # neither grey nor RGB
            about["transform"] = Preprocess.of(model)
    classes = getattr(model, "num_classes", 0)
    if about["labels"] is not None and classes and len(about["labels"]) != classes:
        raise CheckpointError(f"labels must name each of the {classes} classes, got {len(about['labels'])}")

    words = about["vocabulary"]
    if words is not None and len(words) != (size := _words(model)):
        raise CheckpointError(f"vocabulary must have the words of the model, {size}, got {len(words):,}")

    config: dict[str, Any] = {}
    if architecture:
        config = {"architecture": architecture} if only else _of_timm(model, model_args or {}, about["transform"])
    built = not architecture and isinstance(getattr(model, "arguments", None), dict)
    config["visattn"] = {
        "format": FORMAT,
        "only": only,
        "model": _entry(model, "the model") if built else None,
        "inside": inside(model),
        "insertions": [
            _entry(i.attention, i.site.name) | {"gate": i.gate is not None, "site": asdict(i.site)}
            for i in insertions(model)
        ],
        "task": about["task"],
        "transform": asdict(about["transform"]) if about["transform"] else None,
        "labels": None if about["labels"] is None else [str(label) for label in about["labels"]],
        "vocabulary": None if words is None else words.state,
        "versions": _versions(),
    }
    config = json.loads(json.dumps(config))
    with torch.random.fork_rng(devices=[]):
        _compare(model, config, architecture)
    return config


def _compare(model: nn.Module, config: dict[str, Any], architecture: str | None) -> None:
    """Build again what ``config`` describes, and see that it is the model."""
    here, block = insertions(model), config["visattn"]
    classes = [type(model), *(type(i.attention) for i in here)]
    made = [_inserted(entry, classes) for entry in block["insertions"]]
    for inserted, (again, site, _) in zip(here, made, strict=True):
        if difference := _difference(inserted.attention.state_dict(), again.state_dict()):
            name = f"{type(again).__name__} at {site.name}"
            raise CheckpointError(f"{name} built again from its arguments is another module: {difference}")
    if block["only"] or not (architecture or block["model"]):
        return  # the caller builds the backbone
    backbone = _build(config, classes, "meta" if architecture else "cpu")
    for again, site, gated in made:
        attach(_part(backbone, config), again, site, gated=gated)
    if difference := _difference(model.state_dict(), backbone.state_dict()):
        advice = 'model_args, or save(…, only="inserted") and load(…, into=model)' if architecture else "arguments"
        raise CheckpointError(
            f"{architecture or type(model).__name__} built again is another network: {difference}; "
            f"give what it was built with as {advice}"
        )


def _of_timm(model: nn.Module, model_args: Mapping[str, Any], transform: Preprocess | None) -> dict[str, Any]:
    """What timm writes about its model, with the preprocessing it was trained with."""
    _plain(dict(model_args), "model_args")
    if not hasattr(model, "num_classes"):  # features_only, which timm does not export
        cfg = filter_pretrained_cfg(model.pretrained_cfg, remove_source=True)
        args = _plain({**getattr(model, "_model_args", {}), **model_args}, "model_args")
        return {"architecture": cfg.pop("architecture"), "model_args": args, "pretrained_cfg": cfg}
    fields = asdict(transform) | {"test_input_size": None, "test_crop_pct": None} if transform else {}
    with TemporaryDirectory() as folder:
        file = Path(folder, CONFIG)
        try:
            save_config_for_hf(model, str(file), model_config={"pretrained_cfg": fields}, model_args=dict(model_args))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"timm cannot describe this backbone: {error}") from error
        return json.loads(file.read_text())


def _entry(module: nn.Module, where: str) -> dict[str, Any]:
    cls, arguments = type(module), getattr(module, "arguments", {})
    own = _own().get(cls.__name__) is cls
    name = cls.__name__ if own else f"{cls.__module__}.{cls.__qualname__}"
    what = f"of {cls.__name__} at {where}"
    return {"class": name, "arguments": {key: _plain(a, f"argument {key} {what}") for key, a in arguments.items()}}


def _plain(value: Any, what: str) -> Any:
    """The same value as JSON holds it."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(part, what) for part in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(part, what) for key, part in value.items()}
    make = value if isinstance(value, partial) else partial(value) if isinstance(value, type) else None
    if make and not make.args and isinstance(make.func, type) and _own().get(make.func.__name__) is make.func:
        return {"makes": make.func.__name__, "arguments": _plain(make.keywords, what)}
    raise CheckpointError(
        f"{what} must be text, a number, True, False, None, a class of visattn or a partial of one, or a list or "
        f"dictionary of these to be saved, got a {type(value).__name__}"
    )


def _separate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor contiguous, with memory of its own, as safetensors wants them."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        separate[name] = tensor
    return separate


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Give a new folder to write to, and put it in the place of ``folder`` when all is written."""
    new, previous = folder.with_name(f".{folder.name}.partial"), _previous(folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, not a folder")
    if folder.is_dir() and any(folder.iterdir()) and not _is_checkpoint(folder):
        raise CheckpointError(f"{folder} holds files but no checkpoint of visattn: save to a folder of its own")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        if folder.is_dir():  # what others put beside the checkpoint stays
            shutil.copytree(folder, new, symlinks=True, dirs_exist_ok=True, copy_function=_link)
            for name in (CONFIG, BACKBONE, INSERTED, CARD):
                (new / name).unlink(missing_ok=True)
        yield new
        for file in new.iterdir():
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        if folder.exists():
            shutil.rmtree(previous, ignore_errors=True)
            folder.replace(previous)
        new.replace(folder)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        if previous.exists() and not folder.exists():
            previous.replace(folder)
        shutil.rmtree(new, ignore_errors=True)


def _previous(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.previous")


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _is_checkpoint(folder: Path) -> bool:
    try:
        return "visattn" in json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _card(model: nn.Module, config: dict[str, Any], folder: Path, said: str | None) -> str:
    block, ours = config["visattn"], _ours(model)
    inside = sum(p.numel() for name, p in model.named_parameters() if name.startswith(ours))
    outside = sum(p.numel() for p in model.parameters()) - inside
    name = config.get("architecture") or type(model).__name__
    entries: dict[str, list[str]] = {}
    for entry in block["insertions"]:
        arguments = {key: value for key, value in entry["arguments"].items() if key != "channels"}
        what = f"{entry['class']}({_shown(arguments)}){', gated' if entry['gate'] else ''}"
        entries.setdefault(what, []).append(entry["site"]["name"])
    inserted = dict.fromkeys(what.partition("(")[0].rpartition(".")[2] for what in entries)

    lines = [f"# {name} with {', '.join(inserted)}" if inserted else f"# {name}", ""]
    lines += [said.strip(), ""] if said else []
    lines.append(f"- Network: {name}, {outside:,} parameters{' (not in this folder)' if block['only'] else ''}")
    made = _shown({key: value for key, value in (block["model"] or {}).get("arguments", {}).items() if _makes(value)})
    lines += [f"- Made with: {made}"] if made else []
    lines += [f"- Inserted: {what} at {', '.join(where)}" for what, where in entries.items()]
    lines += [f"- Inserted parameters: {inside:,}"] if entries else []
    lines += [f"- Task: {block['task']}"] if block["task"] else []
    if labels := block["labels"]:
        lines.append(f"- Labels: {len(labels)}: {', '.join(labels[:20])}{', …' if len(labels) > 20 else ''}")
    if left := block.get("backbone"):
        lines.append(f"- Backbone: {left['name']}, whose weights are not in here; their digest: {left['digest']}")
    if block["vocabulary"]:
        lines.append(f"- Vocabulary: {len(Vocabulary.load(block['vocabulary'])):,} words")
    if block["transform"]:
        lines.append("- Input: " + ", ".join(f"{key} {value}" for key, value in block["transform"].items()))
    lines.append("- Written by: " + ", ".join(f"{key} {version}" for key, version in block["versions"].items()))

    whole = "pretrained_cfg" in config
    named = [entry["class"] for entry in (block["model"], *block["insertions"]) if entry]
    foreign = dict.fromkeys(path.rpartition(".")[2] for path in named if "." in path)
    options = ("" if whole or block["model"] else ", into=model") + (
        f", classes=[{', '.join(foreign)}]" if foreign else ""
    )
    lines += ["", "```python", "import visattn", "", f'model = visattn.load("{folder.name}"{options})', "```"]
    if whole:
        lines += ["", f'Without what was inserted: `timm.create_model("local-dir:{folder.name}", pretrained=True)`.']
    return "\n".join(lines) + "\n"


def _makes(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"makes", "arguments"}


def _shown(arguments: Mapping[str, Any]) -> str:
    """Arguments as one would write them."""

    def text(value: Any) -> str:
        return f"{value['makes']}({_shown(value['arguments'])})" if _makes(value) else repr(value)

    return ", ".join(f"{key}={text(value)}" for key, value in arguments.items())


def _versions() -> dict[str, str]:
    return {"visattn": __version__, "torch": str(torch.__version__), "timm": timm.__version__}


# --- reading ----------------------------------------------------------------------------------------------------------


def load(
    path: str | Path,
    *,
    into: nn.Module | None = None,
    backbone: str | None = None,
    classes: Sequence[type[nn.Module]] = (),
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Load a model with what was inserted into it. Nothing that the file holds or names is run or imported.

    Args:
        path: A folder written by :func:`save`, or a Lightning ``.ckpt`` of a task of visattn.
        into: A model without insertions, to put the insertions and the weights into, in place; it stays on its device.
            For a backbone that timm does not build, and for a checkpoint of the inserted modules alone.
        backbone: Where the trained weights of the backbone are, such as ``local-dir:FOLDER``, for a checkpoint that
            only names them; left out, ``into`` must have them, and without it timm looks for them by that name.
        classes: Classes of the caller's own that the checkpoint names.
        device: Where the model goes.

    Returns:
        The model, in eval mode, with ``.transform`` (what makes its input of an image), ``.labels``, ``.task`` and
        ``.vocabulary`` (what the numbers stand for that it says as words), each None where the checkpoint does not say.

    Raises:
        CheckpointError: If there is no whole checkpoint, it needs ``into`` or ``classes``, or it is of another model.
    """
    path = Path(path)
    try:
        config, state = _read(path)
        with torch.random.fork_rng(devices=[]):
            model = _build(config, classes) if into is None else _receiving(into, config)
            about = _about(config["visattn"], _words(model))
            state |= _backbone(config, backbone, model, built=into is None)
            _restore(model, config, state, classes, cast=into is None)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error.__cause__
    if into is None:
        model.to(device)
    for name, value in about.items():
        if value is not None or not hasattr(model, name):
            setattr(model, name, value)
    return model.eval()


def description(path: str | Path) -> dict[str, Any]:
    """Return what a checkpoint says of its model, but for the weights: its ``visattn`` block.

    Raises:
        CheckpointError: If there is none.
    """
    path = Path(path)
    try:
        config = _checked(_read_json(path / CONFIG)) if path.is_dir() else _read(path)[0]
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error.__cause__
    return config["visattn"]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a checkpoint says, and its weights by their names in the model."""
    if path.is_dir():
        config = _checked(_read_json(path / CONFIG))
        block = config["visattn"]
        names = [INSERTED] if block["only"] or block["model"] else [BACKBONE, INSERTED]
        state = {name: tensor for file in names for name, tensor in _read_tensors(path / file).items()}
        if block.get("half"):
            state = {name: t.float() if t.is_floating_point() else t for name, t in state.items()}
        return config, state
    if not path.is_file():
        previous = _previous(path.resolve())
        hint = f"; a save was interrupted, what was there before is in {previous}" if previous.is_dir() else ""
        raise CheckpointError(f"there is no checkpoint{hint}")
    content = _read_lightning(path)
    if not (isinstance(content, dict) and "visattn" in content and isinstance(content.get("state_dict"), dict)):
        raise CheckpointError("it is no Lightning checkpoint of a task of visattn")
    state = {}
    for key, tensor in content["state_dict"].items():
        if key.startswith("model."):
            state[key.removeprefix("model.").removeprefix("_orig_mod.")] = tensor
    return _checked(content["visattn"]), state


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file.name} is missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file.name} cannot be read: {error}") from error


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file.name} is missing") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file.name} is corrupt or truncated: {error}") from error


def _read_lightning(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"refused, it asks for {asked[1]}, and a checkpoint must not run code"
        else:
            reason = "it is no file of torch.save, or corrupt"
        raise CheckpointError(reason) from error
    except (OSError, EOFError, RuntimeError, ValueError) as error:
        raise CheckpointError("it is no file of torch.save, or corrupt or truncated") from error


def _checked(config: Any) -> dict[str, Any]:
    block = config.get("visattn") if isinstance(config, dict) else None
    if not isinstance(block, dict):
        raise CheckpointError("it has no visattn block; a plain timm folder is for timm.create_model('local-dir:…')")
    if block.get("format") != FORMAT:
        raise CheckpointError(f"its format is {block.get('format')!r}, this version of visattn reads {FORMAT}")
    block |= {name: None for name in LATER if name not in block}
    for name, kind in (BLOCK | LATER).items():
        if name not in block or not isinstance(block[name], kind):
            raise CheckpointError(f"its visattn block has no {name}, or a wrong one: {block.get(name)!r}")
    return config


def _about(block: dict[str, Any], words: int | None) -> dict[str, Any]:
    """What is said of a model of so many words beside how it is built."""
    fields = block["transform"]
    try:
        transform = None if fields is None else Preprocess(**{key: _given(value) for key, value in fields.items()})
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"its transform is described wrongly: {_line(error)}") from error
    try:
        vocabulary = None if block["vocabulary"] is None else Vocabulary.load(block["vocabulary"], words)
    except (ImportError, TypeError, ValueError) as error:
        raise CheckpointError(f"its vocabulary cannot be read: {_line(error)}") from error
    return {"transform": transform, "labels": block["labels"], "task": block["task"], "vocabulary": vocabulary}


def _receiving(into: nn.Module, config: dict[str, Any]) -> nn.Module:
    """A model of the caller's, if it can be loaded into."""
    if insertions(into):
        raise CheckpointError("into has something inserted already: visattn.remove it first")
    only = config["visattn"]["only"] is not None
    if only and (_architecture(into) or "") not in ("", config.get("architecture")):
        raise CheckpointError(f"it was inserted into {config.get('architecture')}, into is {_architecture(into)}")
    return into


def _restore(
    model: nn.Module, config: dict[str, Any], state: dict[str, Tensor], classes: Sequence[type[nn.Module]], cast: bool
) -> None:
    """Put into a bare model what was inserted, and all weights, in their precision or in that of the model."""
    only = config["visattn"]["only"] is not None
    made = [_inserted(entry, classes) for entry in config["visattn"]["insertions"]]
    try:
        for inserted, site, gated in made:
            attach(_part(model, config), inserted, site, gated=gated)
        ours = _ours(model)
        expected = {n: t for n, t in model.state_dict().items() if n.startswith(ours) or not only}
        if difference := _difference(expected, state):
            raise CheckpointError(f"its weights are of another model than {type(model).__name__}: {difference}")
    except (CheckpointError, SurgeryError) as error:
        remove(model)
        raise CheckpointError(str(error)) from error
    if cast:
        _cast(model, state)
    model.load_state_dict(state, strict=not only)


def _backbone(config: dict[str, Any], name: str | None, model: nn.Module, *, built: bool) -> dict[str, Tensor]:
    """The weights of a backbone that a checkpoint only names, by their names in the model."""
    block = config["visattn"]
    known = block.get("backbone")
    if known is None:
        if name is not None:
            raise CheckpointError(f"it has the weights of its backbone itself: backbone must be left out, got {name!r}")
        return {}
    if not built and name is None:
        own = {key: t for key, t in model.state_dict().items() if key.startswith("backbone.")}
        if digest({key.removeprefix("backbone."): t for key, t in own.items()}) != known["digest"]:
            raise CheckpointError(f"into must have {known['name']} as it was trained with it, its backbone is another")
        return own
    part: Any = getattr(model, "backbone", None)
    options = dict(block["model"]["arguments"].get("backbone_args") or {}, num_classes=getattr(part, "num_classes", 0))
    try:
        trained = timm.create_model(name or known["name"], pretrained=True, **options).state_dict()
    except Exception as error:  # whatever a hub, a folder or timm itself says
        raise CheckpointError(
            f"it does not hold the weights of its backbone, {known['name']}, and these cannot be had ({_line(error)}): "
            'give where they are, load(…, backbone="local-dir:FOLDER")'
        ) from error
    names = set(trained if part is None else part.state_dict())  # a network may take a part of it
    state = {key: tensor for key, tensor in trained.items() if key in names}
    if digest(state) != known["digest"]:
        raise CheckpointError(f"backbone must be {known['name']} as it was trained with it, got other weights")
    return {f"backbone.{key}": tensor for key, tensor in state.items()}


def _part(model: nn.Module, config: dict[str, Any]) -> nn.Module:
    """The part of a model in which things were inserted."""
    name = config["visattn"].get("inside", "")
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise CheckpointError(f"things were inserted in {name}, which {type(model).__name__} does not have") from error


def _build(config: dict[str, Any], classes: Sequence[type[nn.Module]], device: str = "cpu") -> nn.Module:
    """The network without what was inserted, its weights to be loaded."""
    if config["visattn"]["only"]:
        raise CheckpointError("it holds the inserted modules alone: pass the backbone, load(path, into=model)")
    if config["visattn"]["model"]:
        return _make(config["visattn"]["model"], classes)
    architecture = config.get("architecture")
    if architecture is None:
        raise CheckpointError("timm does not build its backbone: build it yourself, load(path, into=model)")
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise CheckpointError(f"timm {timm.__version__} has no model {architecture!r}")
    try:
        cfg = dict(config["pretrained_cfg"], architecture=architecture)
        if "num_classes" in config:
            cfg["num_classes"] = config["num_classes"]
        args = {"checkpoint_path": None, **config.get("model_args", {})}
        if args["checkpoint_path"] is not None:
            raise CheckpointError("model_args must not name a checkpoint_path")
        with torch.device(device):
            return timm.create_model(architecture, pretrained=False, pretrained_cfg=cfg, **args)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a model's constructor raises on arguments it does not take
        raise CheckpointError(f"timm cannot build {architecture}: {type(error).__name__}: {_line(error)}") from error


def _inserted(entry: Any, classes: Sequence[type[nn.Module]]) -> tuple[Attention, Site, bool]:
    module = _make(entry, classes)
    try:
        site, gated = Site(**entry["site"]), bool(entry["gate"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"the site of {type(module).__name__} is described wrongly: {_line(error)}") from error
    if not isinstance(module, Attention):
        raise CheckpointError(f"{type(module).__name__} is no Attention")
    return module, site, gated


def _make(entry: Any, classes: Sequence[type[nn.Module]]) -> nn.Module:
    """Build what an entry of the description names, if it is known here."""
    try:
        path, arguments = str(entry["class"]), {key: _given(value) for key, value in entry["arguments"].items()}
    except CheckpointError:
        raise
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"a module is described wrongly: {entry!r}") from error
    package, _, name = path.rpartition(".")
    cls = {c.__name__: c for c in classes}.get(name) if package else _own().get(name)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise CheckpointError(f"it names the class {path}, unknown here: pass classes=[{name}]")
    try:
        return cls(**arguments)
    except Exception as error:  # whatever its constructor raises
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise CheckpointError(f"{name}({given}) cannot be built: {type(error).__name__}: {_line(error)}") from error


def _own() -> dict[str, Any]:
    """The classes that a checkpoint may name as they are."""
    return {name: getattr(package, name) for package in (attention, models, decoders) for name in package.__all__}


def _given(value: Any) -> Any:
    """An argument as it was: JSON's lists as tuples, which is what modules take, and what makes a module."""
    if isinstance(value, list):
        return tuple(_given(part) for part in value)
    if not isinstance(value, dict):
        return value
    if not _makes(value):
        return {key: _given(part) for key, part in value.items()}
    cls = _own().get(str(value["makes"]))
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise CheckpointError(f"it names the class {value['makes']}, unknown here")
    return partial(cls, **_given(value["arguments"]))


def _cast(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give the model the precision of the weights; buffers that are not saved follow the most."""
    kinds = Counter(t.dtype for t in state.values() if t.is_floating_point())
    if kinds:
        model.to(kinds.most_common(1)[0][0])
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in state:
            tensor.data = tensor.data.to(state[name].dtype)


def _difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """The first names and shapes in which two sets of weights differ, in one line; empty where they agree."""
    lines = [f"{name} is missing" for name in expected if name not in found]
    lines += [f"{name} is not expected" for name in found if name not in expected]
    shapes = {name: (tuple(t.shape), tuple(found[name].shape)) for name, t in expected.items() if name in found}
    lines += [f"{name} is {there}, expected {here}" for name, (here, there) in shapes.items() if here != there]
    return ", ".join(lines[:3]) + (f" and {len(lines) - 3} more" if len(lines) > 3 else "")


def _words(model: Any) -> Any:
    """How many words a model knows, if it knows words."""
    return getattr(getattr(model, "decoder", getattr(model, "question", None)), "vocabulary", None)


def _architecture(model: nn.Module) -> str | None:
    """The name under which timm builds the model, if it does."""
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    return name if name and timm.is_model(name) else None


def _ours(model: nn.Module) -> tuple[str, ...]:
    """How the names of the inserted weights start."""
    replaced = (f"{i.site.name}." for i in insertions(model) if i.site.side == "instead")
    part = f"{name}." if (name := inside(model)) else ""
    return tuple(f"{part}{each}" for each in ("visattn.", *replaced))


def _unwrapped(model: Any) -> nn.Module:
    while hasattr(model, "_orig_mod") or isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
