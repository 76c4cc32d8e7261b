"""Put attention into any backbone, find the places for it, and take it out again.

The places are found by one forward of a copy of the backbone on the meta device: no weight is read, nothing is
computed. Every module is watched (what it returns, how often it is called), and so is every addition of two maps of
one shape: that is where a residual branch ends.

What is inserted lives in one ``nn.ModuleDict`` on the root of the model, ``model.visattn``, and is called by hooks at
the sites. So no parameter of the backbone changes its name: pretrained weights load before or after.
"""

import copy
import difflib
import functools
import inspect
import itertools
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from visattn.attention.base import Attention

log = logging.getLogger("visattn")

BATCH = 3  # images in the forward that looks for the places; no backbone has a stage, grid or head count of 3 in front


class SurgeryError(ValueError):
    """Attention cannot be put there; the message lists what is there."""


@dataclass(frozen=True)
class Site:
    """A place in a backbone through which a feature map goes.

    Args:
        name: Name of the module there, as in ``model.named_modules()``.
        channels: Channels of the feature map.
        height: Height of the feature map in positions, at the input size that was looked at.
        width: Its width.
        stride: Pixels of the image a position stands for, along one axis.
        layout: ``"nchw"``, ``"nhwc"`` or ``"tokens"`` (b, prefix + height · width, c).
        prefix: Tokens before those of the map, such as a class token.
        output: Which element, where the module returns a list or a tuple.
        side: Whether the map is what the module returns or what it is given; ``"instead"``: a module that replaces
            takes what is given there.
        axes: Whether a pool there leaves height and width as axes of one.
    """

    name: str
    channels: int
    height: int
    width: int
    stride: int
    layout: Literal["nchw", "nhwc", "tokens"]
    prefix: int = 0
    output: int | None = None
    side: Literal["output", "input", "instead"] = "output"
    axes: bool = False

    def to_map(self, x: Tensor) -> Tensor:
        """View what flows through the site as (b, c, h, w)."""
        if self.layout == "nchw":
            return x
        if self.layout == "nhwc":
            return x.permute(0, 3, 1, 2)
        return x[:, self.prefix :].unflatten(1, self._grid(x.shape[1] - self.prefix)).permute(0, 3, 1, 2)

    def from_map(self, y: Tensor, x: Tensor) -> Tensor:
        """Turn (b, c, h, w) back into the layout of ``x``, with the prefix tokens of ``x``."""
        if self.layout == "nchw":
            return y
        y = y.permute(0, 2, 3, 1)
        if self.layout == "nhwc":
            return y
        y = y.flatten(1, 2)
        return torch.cat([x[:, : self.prefix], y], 1) if self.prefix else y

    def _grid(self, n: int) -> tuple[int, int]:
        if n == self.height * self.width:
            return self.height, self.width
        height = round((n * self.height / self.width) ** 0.5)  # another input size of the same shape
        if height * (n // max(height, 1)) != n:
            raise ValueError(
                f"{n} tokens at {self.name} fit no map shaped like {self.height}×{self.width}; "
                f"insert with input_size set to the size you use"
            )
        return height, n // height


class Inserted(nn.Module):
    """An attention module at a site, with a gate that may hold it back.

    With a gate the map is ``x + gate * (attention(x) - x)``. Where the attention has neutral weights, the gate is
    folded into the weights instead, so that the map is touched once.
    """

    attention: Attention
    gate: nn.Parameter | None

    def __init__(self, attention: Attention, site: Site, *, gated: bool):
        super().__init__()
        self.site = site
        self.original: tuple[nn.Module, ...] = ()  # the module that was replaced, kept out of the state_dict
        if site.side == "instead":
            self.__dict__["attention"] = attention  # registered at the site itself
        else:
            self.attention = attention
        self.gate = nn.Parameter(torch.zeros(1)) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.attention(x)
        gate, neutral = self.gate.to(x.dtype), self.attention.neutral
        if neutral is None:
            return torch.lerp(x, self.attention(x).to(x.dtype), gate)
        weights = self.attention.attend(x)
        if isinstance(weights, Tensor):
            softened: Any = neutral + gate * (weights - neutral)
        else:
            softened = type(weights)(*(neutral + gate * (w - neutral) for w in weights))
        return self.attention.read(x, weights=softened)

    def on(self, x: Any) -> Any:
        """Apply to what flows through the site, in its own layout, alone or within a list or tuple."""
        index = self.site.output
        if index is not None:
            parts = list(x)
            parts[index] = self._on_tensor(parts[index])
            return type(x)(parts) if type(x) in (list, tuple) else type(x)(*parts)
        return self._on_tensor(x)

    def _on_tensor(self, x: Tensor) -> Tensor:
        return self.site.from_map(self(self.site.to_map(x)), x)


class _Insertions(nn.ModuleDict):
    """What is inserted, on the root of a model; passes by where the root calls its children one after the other."""

    def forward(self, x: Any) -> Any:
        return x


class _OutputHook:
    """Calls an inserted module on what its site returns; an object rather than a closure, so that it pickles."""

    def __init__(self, inserted: Inserted):
        self.inserted = inserted

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self.inserted.on(output)


class _InputHook(_OutputHook):
    """Calls an inserted module on what its site is given."""

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> Any:
        return (self.inserted.on(args[0]), *args[1:])


class _MapHook(_OutputHook):
    """Gives a module that stands in place of another its map as (b, c, h, w)."""

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> Any:
        return (self.inserted.site.to_map(args[0]),)


class _AxesHook(_OutputHook):
    """Gives the vectors of a pool the axes that those of the pool before had."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return output[:, None, None] if self.inserted.site.layout == "nhwc" else output[:, :, None, None]


# --- the four verbs ---------------------------------------------------------------------------------------------------


def sites(
    model: nn.Module, at: str | Sequence[str] = "stages", *, input_size: int | Sequence[int] | None = None
) -> list[Site]:
    """Find the places in a backbone through which a feature map goes.

    Args:
        model: A timm model, or any other network (by glob, or by the places that are found by watching it).
        at: One of the places below, with a slice (``"blocks[2::2]"``) and within a stage (``"stages[2].blocks"``) if
            wanted, or a glob on module names in which ``*`` does not cross a dot and ``**`` does; or several of these.
            ``"stages"``: timm's feature levels without the stem. ``"blocks"``: the output of every residual block.
            ``"residual"``: inside a block, the end of the branch before the addition. ``"inner"``: after the 3×3 of a
            bottleneck. ``"expanded"``: after the depthwise convolution of an inverted residual. ``"head"``: the last
            feature map. ``"input"``: the image. ``"pool"`` and ``"convolutions"``: the global pool and the spatial
            convolutions of the blocks, for modules that replace them.
            A backbone without the place gets the next coarser one, and a log line says so.
        input_size: Pixels, as n, (h, w) or (c, h, w); left out, the size the model was made for.

    Raises:
        SurgeryError: If nothing is there, or not a feature map that is made once in a forward and read afterwards.

    Example:
        >>> import timm
        >>> [site.channels for site in sites(timm.create_model("resnet18"), "stages")]
        [64, 128, 256, 512]
    """
    return _resolve(_watch(model, input_size), at)


def insert(
    model: nn.Module,
    make: Callable[..., Attention],
    *,
    at: str | Sequence[str] | None = None,
    gate: Literal["identity"] | None = "identity",
    input_size: int | Sequence[int] | None = None,
) -> nn.Module:
    """Put attention into a backbone, in place.

    Args:
        model: The backbone.
        make: An attention class, or ``functools.partial`` of one; called with the channels of each site. Its keywords
            ``size``, ``out_channels``, ``stride``, ``groups`` and ``dilation``, where it has them and they are not set,
            come from the site.
        at: Where, in the grammar of :func:`sites`; left out, where the module's paper puts it.
        gate: ``"identity"`` leaves the output of the model unchanged, bit for bit: a gate that starts at zero is added
            where the module is not the identity already. None puts the module there as in its paper. A module in the
            place of a convolution or a pool has no gate, and changes the output; one that can adopt the kernel of the
            convolution does so, unless None.
        input_size: As in :func:`sites`.

    Returns:
        The model itself.

    Raises:
        SurgeryError: If there is no such place, or the module has none of its own and ``at`` is left out.
        ValueError: If ``gate`` is neither ``"identity"`` nor None.

    Example:
        >>> import timm, visattn
        >>> model = insert(timm.create_model("resnet18"), visattn.CBAM, at="layer3.*")
        >>> sorted(model.visattn)
        ['layer3__0__CBAM', 'layer3__1__CBAM']
    """
    if gate not in ("identity", None):
        raise ValueError(f'gate must be "identity" or None, got {gate!r}')
    if not callable(make) or isinstance(make, nn.Module):
        raise TypeError(f"make must be an attention class or functools.partial of one, got a {type(make).__name__}")
    cls = _class_made_by(make)
    if at is None:
        if cls is None:
            raise SurgeryError(f"at must be given, since {make!r} does not say which attention class it makes")
        if cls.place is None:
            raise SurgeryError(f"at must be given: {cls.__name__} has no place in a backbone, it is used inside models")
        at = cls.place
    found = _resolve(_watch(model, input_size), at)
    if any(site.layout == "tokens" for site in found) and any(type(m).__name__ == "Unroll" for m in model.modules()):
        log.warning("%s keeps its tokens in the order of mask units, not row by row", type(model).__name__)
    made = [(_make_for(make, cls, model, site), site) for site in found]
    for attention, site in made:
        if gate == "identity" and site.side == "instead" and hasattr(attention, "adopt"):
            attention.adopt(model.get_submodule(site.name))  # type: ignore[operator]
        gated = gate == "identity" and not attention.identity_at_init and site.side != "instead"
        attach(model, attention, site, gated=gated)
    return model


def remove(model: nn.Module) -> nn.Module:
    """Take out everything that was inserted, in place; what is left is the backbone, untouched.

    Example:
        >>> import timm, visattn
        >>> model = timm.create_model("resnet18")
        >>> keys = set(model.state_dict())
        >>> set(remove(insert(model, visattn.CBAM)).state_dict()) == keys
        True
    """
    root = _root(model)
    here = insertions(root)
    for module in root.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [k for k, h in hooks.items() if isinstance(h, _OutputHook) and h.inserted in here]:
                del hooks[key]
    for inserted in reversed(here):
        if inserted.original:
            like = next((p for p in root.parameters() if p.is_floating_point()), None)
            original = inserted.original[0] if like is None else inserted.original[0].to(like.device, like.dtype)
            root.set_submodule(inserted.site.name, original.train(inserted.attention.training))
    if here:
        del root.visattn
    return model


def insertions(model: nn.Module) -> list[Inserted]:
    """What is inserted in a model, compiled or wrapped as it may be, in the order of insertion."""
    held = _root(model)._modules.get("visattn")
    return list(held.values()) if isinstance(held, _Insertions) else []  # type: ignore[arg-type]


def inside(model: nn.Module) -> str:
    """Name the part of a model, such as its backbone, on which what is inserted lives; empty: the model itself."""
    return next((n for n, m in model.named_modules() if isinstance(m._modules.get("visattn"), _Insertions)), "")


def _root(model: nn.Module) -> nn.Module:
    """The module on which what is inserted lives: the model itself, or what it wraps."""
    return model.get_submodule(inside(model))


def attach(model: nn.Module, attention: Attention, site: Site, *, gated: bool) -> Inserted:
    """Put a module at a known site, without looking for it: what a checkpoint does.

    Raises:
        SurgeryError: If the model is compiled already, has no module of that name, or the site is for another kind.
    """
    _refuse_compiled(model)
    try:
        module = model.get_submodule(site.name)
    except AttributeError as error:
        raise SurgeryError(f"no module is named {site.name!r} in {type(model).__name__}") from error
    name = type(attention).__name__
    if site.side == "instead":
        _refuse_another_kind(type(attention), module, site)
    elif attention.replaces == "pool":
        raise SurgeryError(f'{name} takes the place of a pool: at must be "pool", got a site at {site.name}')
    inserted = Inserted(attention, site, gated=gated)
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    for part in (attention, inserted):
        part.train(model.training)
        if like is not None:
            part.to(like.device, like.dtype)
    if site.side == "instead":
        inserted.original = (module,)
        model.set_submodule(site.name, attention)
        if hasattr(module, "pool_type"):  # timm asks for it when its classifier is reset
            attention.__dict__["pool_type"] = module.pool_type
    held = model._modules.get("visattn")
    if not isinstance(held, _Insertions):
        held = model.visattn = _Insertions()
    held[_key(held, f"{site.name.replace('.', '__')}__{name}")] = inserted
    restore(model)
    return inserted


def _kind(module: nn.Module) -> Literal["convolution", "pool"]:
    """What is replaced where a module at an ``"instead"`` site is."""
    return "convolution" if isinstance(module, nn.Conv2d) else "pool"


def _refuse_another_kind(cls: type[Attention], module: nn.Module, site: Site) -> None:
    kind = module.replaces if isinstance(module, Attention) else _kind(module)
    if cls.replaces != kind:
        raise SurgeryError(f"{cls.__name__} does not take the place of a {kind}, as at {site.name}")


def _refuse_compiled(model: nn.Module) -> None:
    if hasattr(model, "_orig_mod") or any(m._compiled_call_impl is not None for m in model.modules()):
        raise SurgeryError("model is compiled already: insert first, then torch.compile")


def restore(model: nn.Module) -> nn.Module:
    """Put back what a converter lost, in place.

    Converters such as those to synchronised batch norm build some modules anew, and what hung on them is gone; timm's
    ``reset_classifier`` makes a new pool. Call this after one; it does nothing where nothing is missing.
    """
    for inserted in insertions(model):
        _hook(model, inserted)
    return model


def _hook(model: nn.Module, inserted: Inserted) -> None:
    site = inserted.site
    try:
        module = model.get_submodule(site.name)
    except AttributeError as error:
        raise SurgeryError(f"no module is named {site.name!r} in {type(model).__name__} any more") from error
    if site.side == "instead":
        if not isinstance(module, Attention):
            inserted.original = (module,)
            model.set_submodule(site.name, inserted.attention)
        if site.layout != "nchw":
            _hang(
                inserted.attention._forward_pre_hooks, inserted.attention.register_forward_pre_hook, _MapHook(inserted)
            )
        if site.axes:
            _hang(inserted.attention._forward_hooks, inserted.attention.register_forward_hook, _AxesHook(inserted))
    elif site.side == "input":
        _hang(module._forward_pre_hooks, module.register_forward_pre_hook, _InputHook(inserted))
    else:
        module = _carrier(module)
        _hang(module._forward_hooks, module.register_forward_hook, _OutputHook(inserted))


def _hang(hooks: dict[int, Any], register: Callable[[Any], Any], hook: _OutputHook) -> None:
    """Register a hook if it is not there yet, before the hooks of others."""
    if any(isinstance(other, _OutputHook) and other.inserted is hook.inserted for other in hooks.values()):
        return
    register(hook)
    ours = {key: other for key, other in hooks.items() if isinstance(other, _OutputHook)}
    others = {key: other for key, other in hooks.items() if key not in ours}
    hooks.clear()
    hooks.update({**ours, **others})  # so that timm's own hooks (features_only) see what we return


def _carrier(module: nn.Module) -> nn.Module:
    # A plain Sequential returns what its last child returns, and is iterated over instead of called by some models and
    # under gradient checkpointing: its hook would never fire.
    while type(module) is nn.Sequential and len(module):
        module = module[-1]
    return module


def _key(taken: nn.ModuleDict, name: str) -> str:
    key, count = name, 1
    while key in taken:
        count += 1
        key = f"{name}__{count}"
    return key


def _class_made_by(make: Callable[..., Attention]) -> type[Attention] | None:
    candidates: list[Any] = [make]
    while isinstance(candidates[-1], functools.partial):
        candidates += [*candidates[-1].args, candidates[-1].func]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Attention)), None)


def _make_for(make: Callable[..., Attention], cls: type[Attention] | None, model: nn.Module, site: Site) -> Attention:
    known: dict[str, Any] = {"size": (site.height, site.width)}
    module = model.get_submodule(site.name)
    if site.side == "instead" and isinstance(module, nn.Conv2d):
        known |= {"out_channels": module.out_channels, "stride": module.stride[0], "groups": module.groups}
        known["dilation"] = module.dilation[0]
    elif site.side == "instead":
        known["out_channels"] = site.channels
    given: dict[str, Any] = {}
    if cls is not None:
        if site.side == "instead":
            _refuse_another_kind(cls, module, site)
        named = inspect.signature(cls).parameters
        bound = make.keywords if isinstance(make, functools.partial) else {}
        unset = {"stride": 1}  # and None for all others: what a command line binds where nothing is given
        given = {n: value for n, value in known.items() if n in named and bound.get(n, unset.get(n)) == unset.get(n)}
        if "out_channels" not in named and known.get("out_channels", site.channels) != site.channels:
            change = f"{site.channels} channels to {known['out_channels']}"
            raise SurgeryError(f"{cls.__name__} keeps the number of channels, {site.name} goes from {change}")
        if "stride" not in named and known.get("stride", 1) != 1:
            raise SurgeryError(f"{cls.__name__} keeps the size of the map, {site.name} has stride {known['stride']}")
    attention = make(site.channels, **given)
    if not isinstance(attention, Attention):
        raise TypeError(f"make must return an Attention, got {type(attention).__name__}")
    return attention


# --- watching a forward -----------------------------------------------------------------------------------------------


@dataclass
class _Call:
    """One call of one module."""

    name: str
    module: nn.Module
    start: int  # index of the first operation inside
    given: list[tuple[Tensor, list["_Call"]]]  # the tensors it was given, with the calls that had returned each
    stack: tuple["_Call", ...]  # the calls it was made in
    end: int = -1  # index of the first operation after it
    returned: Any = None


@dataclass
class _Addition:
    """An addition of two maps of one shape: the end of a residual branch."""

    inside: _Call
    branch: list[_Call]  # the calls that returned the branch's end, innermost first
    end: Tensor


@dataclass
class _Operation:
    read: list[int]
    written: list[int]
    needed: bool = False


@dataclass
class _Watched:
    """What was seen in one forward."""

    model: nn.Module
    image: Tensor
    calls: list[_Call] = field(default_factory=list)  # in the order in which they ended
    count: Counter[str] = field(default_factory=Counter)
    additions: list[_Addition] = field(default_factory=list)
    operations: list[_Operation] = field(default_factory=list)
    outputs: set[int] = field(default_factory=set)
    alive: list[Any] = field(default_factory=list)  # keeps every tensor, so that no id is used twice


def _watch(model: nn.Module, input_size: int | Sequence[int] | None) -> _Watched:
    _refuse_compiled(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for size in (candidates := _input_sizes(model, input_size)):
        shell = remove(_meta_copy(model)).eval()
        image = torch.empty((BATCH, *size), device="meta", dtype=dtype)
        watcher = _Watcher(shell, image)
        try:
            with torch.no_grad(), watcher:
                output = shell(image)
        except Exception as error:
            if size != candidates[-1]:
                continue
            reason = (str(error).splitlines() or [""])[0]
            raise SurgeryError(
                f"{type(model).__name__} does not run on an image of {'×'.join(map(str, size))}, set by "
                f"input_size=(c, h, w): {type(error).__name__}: {reason}"
            ) from error
        return watcher.finish(output)
    raise AssertionError("there is always a size to try")


def _meta_copy(model: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    for module in model.modules():
        for t in _tensors(list(vars(module).values())):
            if not t.is_leaf:  # a cache, which cannot be copied
                memo[id(t)] = torch.empty_like(t, device="meta")
    shell = copy.deepcopy(model, memo)
    for module in shell.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, FunctionType)]:
                del hooks[key]  # a function is not copied: it would hand meta tensors to whoever hung it there
    return shell


def _input_sizes(model: nn.Module, given: int | Sequence[int] | None) -> list[tuple[int, int, int]]:
    """The sizes (c, h, w) to try, most likely first."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    declared = tuple(config.get("input_size") or (3, 224, 224))
    size: Any = next(
        (m.img_size for m in model.modules() if isinstance(getattr(m, "img_size", None), tuple)), declared[1:]
    )
    if given is not None:
        numbers = _tuple(given)
        numbers = numbers * 2 if len(numbers) == 1 else numbers
        if len(numbers) not in (2, 3) or min(numbers) < 1:
            raise ValueError(f"input_size must be n, (h, w) or (c, h, w) in pixels, got {given!r}")
        if len(numbers) == 3:
            return [numbers]
        size = numbers
    height, width = size
    first = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), declared[0])
    return [(channels, height, width) for channels in dict.fromkeys((first, declared[0]))]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


class _Watcher(TorchDispatchMode):
    """Hooks on every module and an eye on every operation, for one forward."""

    def __init__(self, shell: nn.Module, image: Tensor):
        super().__init__()
        self.seen = _Watched(shell, image)
        self.stack: list[_Call] = []
        self.returned_by: dict[int, list[_Call]] = {}  # id of a tensor → the calls that returned it as it is now
        self.work: dict[int, int] = {}  # id of a tensor → length of the longest chain of operations behind it
        for name, module in shell.named_modules():
            module.register_forward_pre_hook(functools.partial(self._enter, name), with_kwargs=True)
            module.register_forward_hook(self._leave)

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = [(t, list(self.returned_by.get(id(t), []))) for t in _tensors([args, kwargs])]
        self.stack.append(_Call(name, module, len(self.seen.operations), given, tuple(self.stack)))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        call = self.stack.pop()
        call.end, call.returned = len(self.seen.operations), output
        self.seen.calls.append(call)
        self.seen.count[call.name] += 1
        for tensor in _tensors(output):
            self.returned_by.setdefault(id(tensor), []).append(call)
            self.seen.alive.append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = list(_tensors([args, kwargs or {}]))
        if func._schema.name in ("aten::add", "aten::add_") and len(read) == 2 and self.stack:
            self._addition(*read)
        output = func(*args, **(kwargs or {}))
        written = list(_tensors(output))
        work = 1 + max((self.work.get(id(t), 0) for t in read), default=0)
        changed = func._schema.is_mutable
        for tensor in written:
            self.work[id(tensor)] = work
            if changed:
                self.returned_by.pop(id(tensor), None)
        self.seen.alive += [*read, *written]
        self.seen.operations.append(_Operation([id(t) for t in read], [id(t) for t in written]))
        return output

    def _addition(self, a: Tensor, b: Tensor) -> None:
        if (
            a.shape != b.shape
            or a.ndim < 3
            or a.shape[0] != BATCH
            or not (self.work.get(id(a)) and self.work.get(id(b)))
        ):
            return
        branch = a if self.work[id(a)] > self.work[id(b)] else b
        self.seen.additions.append(_Addition(self.stack[-1], list(self.returned_by.get(id(branch), [])), branch))

    def finish(self, output: Any) -> _Watched:
        seen = self.seen
        seen.outputs = {id(t) for t in _tensors(output)}
        needed = set(seen.outputs)
        for operation in reversed(seen.operations):
            operation.needed = not needed.isdisjoint(operation.written)
            if operation.needed:
                needed.update(operation.read)
        return seen


# --- finding the places -----------------------------------------------------------------------------------------------

_COARSER = {"inner": "residual", "expanded": "residual", "residual": "blocks", "blocks": "stages"}
_TERM = re.compile(r"(?P<place>[a-z]+)(?:\[(?P<slice>[-\d:]+)\])?")


def _resolve(seen: _Watched, at: str | Sequence[str]) -> list[Site]:
    terms = list(_tuple(at))
    if not terms or not all(isinstance(term, str) for term in terms):
        raise ValueError(f"at must be a string or several of them, got {at!r}")
    places = _Places(seen)
    found = {site: None for term in terms for site in places.find(term)}
    order = {call.name: index for index, call in enumerate(seen.calls)}
    return sorted(found, key=lambda site: order[site.name])


@dataclass(frozen=True)
class _Place:
    """A site, and the call that was seen there."""

    site: Site
    call: _Call

    @property
    def tensor(self) -> Any:
        returned = self.call.returned
        return returned if self.site.output is None else returned[self.site.output]


class _Places:
    """The grammar of ``at``, over what was seen in one forward."""

    def __init__(self, seen: _Watched):
        self.seen = seen
        self.once = {call.name: call for call in seen.calls if seen.count[call.name] == 1 and call.name}
        self.order = {id(call): index for index, call in enumerate(seen.calls)}

    def find(self, term: str) -> list[Site]:
        parts = [_TERM.fullmatch(part) for part in term.split(".")]
        names = [part["place"] for part in parts if part]
        known = ("stages", "blocks", "residual", "inner", "expanded", "head", "input", "pool", "convolutions")
        if len(names) == len(parts) and set(names) <= set(known):
            if len(parts) > 2 or (len(parts) == 2 and names[0] != "stages"):
                raise SurgeryError(f'at={term!r}: only "stages" may have a place inside, such as "stages[2].blocks"')
            found = self._sliced(self._place(names[0]), parts[0]["slice"], names[0])  # type: ignore[index]
            if len(parts) == 2:
                found = self._inside(found, names[1], parts[1]["slice"], term)  # type: ignore[index]
            if not found:
                raise SurgeryError(f"at={term!r} leaves no site in {self._kind}: {self._what_is_there()}")
            return [p.site for p in found]
        return self._glob(term)

    def _inside(self, stages: list[_Place], name: str, text: str | None, term: str) -> list[_Place]:
        """The places of one name that are passed within some stages."""
        before = {id(level): self._order(last) for last, level in itertools.pairwise(self.levels)}
        spans = [(before.get(id(stage), -1), self._order(stage)) for stage in stages]
        found = [p for p in self._place(name) if any(low < self._order(p) <= high for low, high in spans)]
        found = self._sliced(found, text, term)
        if not found and name in _COARSER:
            log.warning("%s has no place %r; using the stage instead", self._kind, term)
        return found or stages

    @property
    def _kind(self) -> str:
        return type(self.seen.model).__name__

    def _order(self, place: _Place) -> int:
        return self.order[id(place.call)]

    def _sliced(self, found: list[_Place], text: str | None, term: str) -> list[_Place]:
        if text is None:
            return found
        try:
            numbers = [int(n) if n else None for n in text.split(":")]
            if len(numbers) > 1:
                return found[slice(*numbers)]
            return [found[numbers[0]]]  # type: ignore[index]
        except (IndexError, ValueError, TypeError):
            raise SurgeryError(f"at: there are {len(found)} {term}, so [{text}] is out of range") from None

    def _place(self, name: str) -> list[_Place]:
        found = getattr(self, f"_{name}")()
        if found:
            return found
        if name in _COARSER:
            log.warning("%s has no place %r; using %r instead", self._kind, name, _COARSER[name])
            return self._place(_COARSER[name])
        raise SurgeryError(f"{self._kind} has no place {name!r}: {self._what_is_there()}")

    def _what_is_there(self) -> str:
        counts = {
            name: len(getattr(self, f"_{name}")()) for name in ("stages", "blocks", "residual", "inner", "expanded")
        }
        top = [name for name, _ in self.seen.model.named_children()]
        places = ", ".join(f"{n} {name}" for name, n in counts.items() if n)
        return f"{places}{'; ' if places else ''}modules {', '.join(top[:12])}"

    def _glob(self, pattern: str) -> list[Site]:
        regex = re.compile(
            "".join(
                {"**": ".*", "*": r"[^.]*", "?": r"[^.]"}.get(p, re.escape(p))
                for p in re.split(r"(\*\*|\*|\?)", pattern)
            )
        )
        names = [name for name, _ in self.seen.model.named_modules() if name]
        matched = [name for name in names if regex.fullmatch(name)]
        if not matched:
            close = difflib.get_close_matches(pattern, names, n=3)
            hint = f" (close: {', '.join(close)})" if close else ""
            raise SurgeryError(f"at={pattern!r} matches no module{hint}; there are {self._what_is_there()}")
        found = [self._usable_by_name(name) for name in matched]
        bad = [f"{name} {reason}" for name, reason in zip(matched, found, strict=True) if isinstance(reason, str)]
        if bad:
            more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
            raise SurgeryError(f"at={pattern!r}: {'; '.join(bad[:4])}{more}; there are {self._what_is_there()}")
        return [place.site for place in found if not isinstance(place, str)]

    # --- what a call returned, as a site

    def _usable_by_name(self, name: str) -> "_Place | str":
        count = self.seen.count[name]
        if count == 0:
            children = [child for child, _ in self.seen.model.get_submodule(name).named_children()]
            return "is not called in a forward" + (f"; its last child is {name}.{children[-1]}" if children else "")
        if count > 1:
            return f"is called {count} times in a forward"
        return self._usable(self.once[name])

    def _usable(self, call: _Call, channels: int | None = None, stride: int | None = None) -> "_Place | str":
        """The place of a call's feature map, or why there is none."""
        if not call.name:
            return "is the model itself"
        if self.seen.count[call.name] != 1:
            return f"is called {self.seen.count[call.name]} times in a forward"
        carrier = _carrier(call.module)
        if carrier is not call.module and sum(m is carrier for m in self._called_modules) != 1:
            return "ends in a module that is called more than once"
        several = isinstance(call.returned, (list, tuple))
        elements = list(call.returned) if several else [call.returned]
        reason = "returns no tensor"
        for index, tensor in enumerate(elements):
            if not isinstance(tensor, Tensor):
                continue
            read = self._layout(tensor)
            if read is None:
                reason = f"returns no feature map, but {tuple(tensor.shape[1:])} an image"
                continue
            site = Site(call.name, *read, output=index if several else None)
            if (channels, stride) not in ((None, None), (site.channels, site.stride)):
                reason = f"returns {site.channels} channels at stride {site.stride}"
                continue
            if not self._is_read(tensor, call.end):
                reason = "returns what nobody reads"
                continue
            return _Place(site, call)
        return reason

    @functools.cached_property
    def _called_modules(self) -> list[nn.Module]:
        return [call.module for call in self.seen.calls]

    @functools.cached_property
    def _reads(self) -> dict[int, int]:
        """The id of each tensor that matters → the last operation that read it."""
        last: dict[int, int] = {}
        for index, operation in enumerate(self.seen.operations):
            if operation.needed:
                last.update(dict.fromkeys(operation.read, index))
        return last

    def _is_read(self, tensor: Tensor, after: int) -> bool:
        return id(tensor) in self.seen.outputs or self._reads.get(id(tensor), -1) >= after

    def _layout(self, tensor: Tensor) -> tuple[int, int, int, int, Any, int] | None:
        """Channels, height, width, stride, layout and prefix of a feature map; None if it is none."""
        height, width = self.seen.image.shape[2:]

        def shaped_like_the_image(h: int, w: int) -> bool:
            close = abs(h - w * height / width) < 1 or abs(w - h * width / height) < 1  # rounded along either axis
            return h <= height and w <= width and close

        if not tensor.is_floating_point() or tensor.shape[:1] != (BATCH,) or 0 in tensor.shape:
            return None
        if tensor.ndim == 4:
            _, a, b, c = tensor.shape
            first, last = shaped_like_the_image(b, c), shaped_like_the_image(a, b)
            if first and last and not (a == b == c and self._declared_format == "NHWC"):
                last = a == 1  # (1, 1, c) reads both ways only where it is no map of one channel
                first = not last
            if first:
                return a, b, c, max(round(height / b), 1), "nchw", 0
            if last:
                return c, a, b, max(round(height / a), 1), "nhwc", 0
        if tensor.ndim == 3:
            _, n, c = tensor.shape
            for prefix in dict.fromkeys((getattr(self._named_tokens, "num_prefix_tokens", 0), 0, 1, 2, 5)):
                h = round(((n - prefix) * height / width) ** 0.5) if n > prefix else 0
                if (
                    h
                    and h * ((n - prefix) // h) == n - prefix
                    and shaped_like_the_image(h, (n - prefix) // h)
                    and h > 1
                ):
                    return c, h, (n - prefix) // h, max(round(height / h), 1), "tokens", prefix
        return None

    @functools.cached_property
    def _declared_format(self) -> str:
        return str(getattr(self.seen.model, "output_fmt", "NCHW")).split(".")[-1]

    @functools.cached_property
    def _named_tokens(self) -> nn.Module | None:
        return next(
            (m for m in self.seen.model.modules() if isinstance(getattr(m, "num_prefix_tokens", None), int)), None
        )

    def _last_usable(self, calls: list[_Call]) -> _Place | None:
        """Of the calls that returned one tensor, the last before a path is dropped; a norm only if need be."""
        places = [p for p in (self._usable(call) for call in calls) if isinstance(p, _Place)]
        kept = [p for p in places if "drop" not in type(p.call.module).__name__.lower()] or places
        sturdy = [p for p in kept if not isinstance(p.call.module, nn.modules.batchnorm._NormBase)]
        return next(reversed(sturdy or kept), None)

    # --- the places

    @functools.cached_property
    def _residual_additions(self) -> list[_Addition]:
        """Those of feature maps, from which a module returns as much as is added."""
        return [
            a
            for a in self.seen.additions
            if a.inside.name
            and self._layout(a.end)
            and any(t.numel() == a.end.numel() for t in _tensors(a.inside.returned))
        ]

    @functools.cached_property
    def _units(self) -> list[_Call]:
        """The modules in which a residual addition is made: residual blocks, and others of their classes."""
        made = {a.inside.name: a.inside for a in self._residual_additions}
        for name in sorted(made, key=lambda name: name.count(".")):
            if name not in made:
                continue
            within = [other for other in made if other.startswith(f"{name}.")]
            outermost = [o for o in within if not any(o.startswith(f"{other}.") for other in within)]
            held = sum(_size(made[o].module) for o in outermost)
            if within and 2 * held >= _size(made[name].module):  # a stage with an addition of its own
                del made[name]
            else:
                for other in within:
                    del made[other]
        classes = {type(call.module) for call in made.values()}
        units = [
            call
            for call in self.seen.calls
            if call.name in made
            or (
                type(call.module) in classes
                and not any(call.name.startswith(f"{name}.") or name.startswith(f"{call.name}.") for name in made)
            )
        ]
        return units

    def _blocks(self) -> list[_Place]:
        return [p for p in map(self._usable, self._units) if isinstance(p, _Place)]

    @functools.cached_property
    def levels(self) -> list[_Place]:
        """The feature levels that timm declares, else the last block of each stride; without the stem."""
        info = getattr(self.seen.model, "feature_info", None) or []
        found: dict[Site, _Place] = {}
        for level in getattr(info, "info", info):
            place = self._level(level.get("module") or "", level["num_chs"], level["reduction"])
            if place:
                found[place.site] = place
        levels = sorted(found.values(), key=self._order)
        if not levels:
            last = {p.site.stride: p for p in self._blocks()}
            return sorted(last.values(), key=self._order)
        first = self._units or [c for c in self.seen.calls if isinstance(c.module, (nn.Conv2d, nn.Linear))][1:]
        start = min((call.start for call in first), default=0)
        after = [p for p in levels if p.call.end > start and not p.site.name.startswith("stem")]
        return after or levels

    def _level(self, name: str, channels: int, stride: int) -> _Place | None:
        """By its name, if that is a module of the declared size; else by that size; else by its name alone."""
        names = [n for n in self.once if n in (name, name.replace(".", "_"))]
        names = names or [n for n in self.once if name and n.endswith(f".{name}")]
        named = [self.once[n] for n in names] if len(names) == 1 else []
        wanted = channels, stride
        for calls, size in ((named, wanted), (self._units, wanted), (self.seen.calls, wanted), (named, (None, None))):
            places = [p for p in (self._usable(call, *size) for call in calls) if isinstance(p, _Place)]
            if places:
                return places[-1] if calls is named else self._outermost(places[-1])
        return None

    def _outermost(self, place: _Place) -> _Place:
        """The outermost module that returns the very tensor of a place."""
        for outer in place.call.stack:
            found = self._usable(outer)
            if isinstance(found, _Place) and found.tensor is place.tensor:
                return found
        return place

    def _stages(self) -> list[_Place]:
        return self.levels

    def _residual(self) -> list[_Place]:
        units = {unit.name for unit in self._units}
        ends = [
            self._last_usable([call for call in a.branch if call.name.startswith(f"{a.inside.name}.")])
            for a in self._residual_additions
            if any(a.inside.name == unit or a.inside.name.startswith(f"{unit}.") for unit in units)
        ]
        return list({p.site.name: p for p in ends if p}.values())

    def _convolutions_in(self, unit: _Call) -> list[tuple[_Call, nn.Conv2d]]:
        return [(c, c.module) for c in self.seen.calls if unit in c.stack and isinstance(c.module, nn.Conv2d)]

    def _before_pointwise(self, spatial: Callable[[nn.Conv2d, _Call], bool]) -> list[_Place]:
        """In each block, what the 1×1 convolution after the last such spatial convolution is given."""
        found = []
        for unit in self._units:
            convolutions = self._convolutions_in(unit)
            last = max((i for i, (_, c) in enumerate(convolutions) if spatial(c, unit)), default=len(convolutions))
            for following, convolution in convolutions[last + 1 :]:
                place = self._last_usable([c for c in following.given[0][1] if unit in c.stack])
                size = convolutions[last][0].returned.shape[2:]
                if convolution.kernel_size == (1, 1) and place and (place.site.height, place.site.width) == size:
                    found.append(place)
                    break
        return found

    def _inner(self) -> list[_Place]:
        return self._before_pointwise(lambda convolution, unit: max(convolution.kernel_size) > 1)

    def _expanded(self) -> list[_Place]:
        def is_expanded_depthwise(convolution: nn.Conv2d, unit: _Call) -> bool:
            place = self._usable(unit)
            narrow = place.site.channels if isinstance(place, _Place) else convolution.in_channels
            return convolution.groups == convolution.in_channels > narrow and max(convolution.kernel_size) > 1

        return self._before_pointwise(is_expanded_depthwise)

    def _head(self) -> list[_Place]:
        """The last feature map before the pool and the classifier."""
        last = self.levels[-1] if self.levels else None
        if last and id(last.tensor) in self.seen.outputs:
            return [last]
        config = getattr(self.seen.model, "default_cfg", None) or {}
        classifiers = (*_tuple(config.get("classifier") or ()), "head", "classifier", "fc")
        end = min((pool.call.start for pool in self._pool()), default=len(self.seen.operations))
        places = [p for p in map(self._usable, self.seen.calls) if isinstance(p, _Place) and p.call.end <= end]
        places = [p for p in places if p.site.name.split(".")[0] not in classifiers]
        if last:
            size = last.site.height, last.site.width
            places = [p for p in places if (p.site.height, p.site.width) == size]
        return places[-1:] or ([last] if last else [])

    def _input(self) -> list[_Place]:
        image = self.seen.image
        takers = [c for c in self.once.values() if c.given and c.given[0][0] is image]
        if not takers:
            return []
        first = min(takers, key=lambda call: (call.start, len(call.stack)))
        _, channels, height, width = image.shape
        return [_Place(Site(first.name, channels, height, width, 1, "nchw", side="input"), first)]

    def _pool(self) -> list[_Place]:
        found = []
        for call in self.seen.calls:
            named = "pool" in (call.name.rpartition(".")[2] + type(call.module).__name__).lower()
            if not (named and call.name and call.given and isinstance(call.returned, Tensor)):
                continue
            before, after = self._layout(call.given[0][0]), call.returned.shape
            if before and self.seen.count[call.name] == 1 and (len(after) == 2 or after[2:].numel() == 1):
                axes = len(after) == 4
                found.append(_Place(Site(call.name, *before, side="instead", axes=axes), call))
        outer = [p for p in found if not any(p.site.name.startswith(f"{o.site.name}.") for o in found)]
        return outer[-1:]

    def _convolutions(self) -> list[_Place]:
        found = []
        for unit in self._units:
            for call, convolution in self._convolutions_in(unit):
                before = self._layout(call.given[0][0]) if call.given else None
                if before and max(convolution.kernel_size) > 1 and self.seen.count[call.name] == 1:
                    found.append(_Place(Site(call.name, *before, side="instead"), call))
        return found


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
