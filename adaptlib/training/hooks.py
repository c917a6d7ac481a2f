"""Hooks on the modules of a model, for as long as they are wanted."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]


@contextmanager
def hooked(modules: Mapping[str, nn.Module], hook: Callable[[str], Hook]) -> Iterator[None]:
    """Within it, the output of each module goes through the hook that `hook` makes for its name."""
    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
