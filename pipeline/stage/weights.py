"""The weights of one stage: flat buffers, and as many versions of them as micro-batches in flight still need.

    version 7   | conv1.weight | bn1.weight | ...        <- F8 ran with this one; B8 will go back through it
    version 8   | conv1.weight | bn1.weight | ...        <- newest: the next forward and the next update use it

A forward holds the newest version until its backward is over. An update writes in place when nobody holds the newest
version, and into a copy when somebody does (copy on write), so gpipe and 1f1b keep one version and pipedream
`stages - stage`, without being told. Gradients from an old version are applied to the newest (PipeDream, section 3.3).

There is one flat buffer per dtype, as a rule one. A frozen parameter (`requires_grad=False`) has no versions: it stays
where its module has it, and nobody writes to it.

Each version has its own leaf tensors; installing a version puts them where the modules look for their parameters.
autograd keeps the leaves of the version a forward ran with, and notices if their memory was written to since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Slot:
    """Where one parameter lies: its full name, the modules that look for it, and its place in its dtype's buffer."""

    name: str
    homes: tuple[tuple[nn.Module, str], ...]
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    size: int

    def view(self, flats: Mapping[torch.dtype, Tensor]) -> Tensor:
        """The parameter's own view of the buffer of its dtype (or of a part of a tensor), in its memory format."""
        flat = flats[self.dtype]
        return flat.as_strided(self.shape, self.stride, flat.storage_offset() + self.offset)


class Version:
    """One set of values of all parameters: a buffer per dtype, a leaf tensor per parameter, and who still needs it."""

    def __init__(self, flats: Mapping[torch.dtype, Tensor], slots: Sequence[Slot]) -> None:
        self.flats = dict(flats)
        self.leaves = [nn.Parameter(slot.view(self.flats)) for slot in slots]
        self.holders = 0


class Weights:
    """All trained parameters of a stage in flat buffers per version, with the newest one installed in the modules.

    Args:
        modules: (prefix, module) pairs; a parameter's full name is prefix + local name.
        exclude: full names of parameters that live elsewhere (borrowed ones).

    Attributes:
        newest: the version that forwards compute with and updates write to.
        versions: how many versions have been allocated; the most that were needed at one time.
        frozen: full name -> parameter, of those that are not trained.
        gradients: what has been accumulated per slot since the last update, None where nothing was.
    """

    def __init__(self, modules: Sequence[tuple[str, nn.Module]], *, exclude: frozenset[str] = frozenset()) -> None:
        self.slots = _lay_out(modules, exclude)
        self.frozen = {name: p for name, _, p in _named_parameters(modules, exclude) if not p.requires_grad}
        self.device = _device_of(modules)
        flats = {
            dtype: torch.zeros(size, dtype=dtype, device=self.device) for dtype, size in _sizes(self.slots).items()
        }
        with torch.no_grad():
            for slot in self.slots:
                module, name = slot.homes[0]
                slot.view(flats).copy_(module._parameters[name])  # type: ignore[arg-type]
        self._on_leaf: Callable[[int, nn.Parameter], object] | None = None
        self.newest = Version(flats, self.slots)
        self._free: list[Version] = []
        self.versions = 1
        self.gradients: list[Tensor | None] = [None] * len(self.slots)
        self._empty = True  # whether all gradients are None
        self._homes = [(home[0]._parameters, home[1], i) for i, slot in enumerate(self.slots) for home in slot.homes]
        self._install(self.newest)

    def on_new_leaf(self, hook: Callable[[int, nn.Parameter], object]) -> None:
        """Calls `hook(index, leaf)` for every leaf tensor there is and will be."""
        self._on_leaf = hook
        for version in (self.newest, *self._free):
            self._announce(version)

    def _announce(self, version: Version) -> None:
        if self._on_leaf is not None:
            for index, leaf in enumerate(version.leaves):
                self._on_leaf(index, leaf)

    def _install(self, version: Version) -> None:
        leaves = version.leaves
        for home, name, index in self._homes:
            home[name] = leaves[index]

    def hold(self) -> Version:
        """The newest version, kept as it is until `release`."""
        self.newest.holders += 1
        return self.newest

    def release(self, version: Version) -> None:
        """The micro-batch that held `version` has finished its backward."""
        version.holders -= 1
        if version.holders == 0 and version is not self.newest:
            self._free.append(version)

    @contextmanager
    def installed(self, version: Version) -> Iterator[None]:
        """Has the modules compute with `version` instead of the newest, for recomputation."""
        self._install(version)
        try:
            yield
        finally:
            self._install(self.newest)

    def lend_gradients(self, version: Version) -> None:
        """Before a backward through `version`: it adds to what other versions have accumulated."""
        if self._empty:
            return
        for leaf, gradient in zip(version.leaves, self.gradients, strict=True):
            leaf.grad = gradient

    def collect_gradients(self, version: Version) -> None:
        """After a backward through `version`: takes over what its leaves have accumulated."""
        gradients = self.gradients
        for index, leaf in enumerate(version.leaves):
            gradients[index] = leaf.grad
            leaf.grad = None
        self._empty = False

    def add_gradient(self, slot: int, gradient: Tensor) -> None:
        """Adds a gradient of parameter `slot` that was computed elsewhere."""
        present = self.gradients[slot]
        self.gradients[slot] = gradient if present is None else present.add_(gradient)
        self._empty = False

    def forget_gradients(self) -> None:
        """Starts the next update from nothing."""
        self.gradients[:] = [None] * len(self.slots)
        self._empty = True

    def make_writable(self) -> bool:
        """Makes sure that nobody holds the newest version, by a copy if need be; says whether it is another now."""
        if self.newest.holders == 0:
            return False
        version = self._spare()
        with torch.no_grad():
            for dtype, flat in version.flats.items():
                flat.copy_(self.newest.flats[dtype])
        self.newest = version
        self._install(version)
        return True

    def _spare(self) -> Version:
        if self._free:
            return self._free.pop()
        self.versions += 1
        version = Version({dtype: torch.empty_like(f) for dtype, f in self.newest.flats.items()}, self.slots)
        self._announce(version)
        return version

    def named(self) -> dict[str, Tensor]:
        """The newest values by full name; views, not copies."""
        return {slot.name: leaf.data for slot, leaf in zip(self.slots, self.newest.leaves, strict=True)}


def _device_of(modules: Sequence[tuple[str, nn.Module]]) -> torch.device:
    for _, module in modules:
        for parameter in module.parameters():
            return parameter.device
    return torch.device("cpu")


def _named_parameters(
    modules: Sequence[tuple[str, nn.Module]], exclude: frozenset[str]
) -> Iterator[tuple[str, tuple[nn.Module, str], nn.Parameter]]:
    """(full name, home, parameter) in the order of the modules; one with two homes comes twice."""
    for prefix, module in modules:
        for path, child in module.named_modules():
            for local, parameter in child._parameters.items():
                name = f"{prefix}{path}.{local}" if path else f"{prefix}{local}"
                if parameter is not None and name not in exclude:
                    yield name, (child, local), parameter


def _lay_out(modules: Sequence[tuple[str, nn.Module]], exclude: frozenset[str]) -> tuple[Slot, ...]:
    """One slot per distinct trained parameter, in the order of the modules; one with two homes gets one slot."""
    homes: dict[int, list[tuple[nn.Module, str]]] = {}
    first: dict[int, tuple[str, nn.Parameter]] = {}
    for name, home, parameter in _named_parameters(modules, exclude):
        if parameter.requires_grad:
            homes.setdefault(id(parameter), []).append(home)
            first.setdefault(id(parameter), (name, parameter))
    slots: list[Slot] = []
    ends: dict[torch.dtype, int] = {}
    for key, (name, parameter) in first.items():
        size, dtype, offset = parameter.numel(), parameter.dtype, ends.get(parameter.dtype, 0)
        slots.append(Slot(name, tuple(homes[key]), parameter.shape, _dense_stride(parameter), dtype, offset, size))
        ends[dtype] = _padded(offset + size)
    return tuple(slots)


def _sizes(slots: Sequence[Slot]) -> dict[torch.dtype, int]:
    """Entries in the buffer of each dtype."""
    sizes: dict[torch.dtype, int] = {}
    for slot in slots:
        sizes[slot.dtype] = _padded(slot.offset + slot.size)
    return sizes


def _padded(offset: int) -> int:
    """`offset` rounded up, so that every parameter starts on a boundary vector units and GPUs like (64 bytes)."""
    return -(-offset // 16) * 16


def _dense_stride(parameter: Tensor) -> tuple[int, ...]:
    """The strides of a dense copy that keeps `channels_last` where the parameter has it."""
    return torch.empty_like(parameter, memory_format=torch.preserve_format).stride()
