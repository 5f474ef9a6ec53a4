"""A GPU that is pretended: tensors of the CPU that say they are on `cuda:0`, and mix with no others.

`with pretended():` finds without a GPU what would end on one with "Expected all tensors to be on the
same device". Numbers and precision are the CPU's, and nothing is compiled.
"""

from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
import torch.utils.checkpoint
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
ANY = "any"  # made within an operation, on its device
aten = torch.ops.aten
COPIES = {aten.copy_, aten._to_copy, aten.set_}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
STRICT = {aten.cat, aten.stack, aten.index_select, aten.gather, aten.scatter, aten.embedding}


def tensors_in(tree) -> list[Tensor]:
    """The tensors among arguments or results."""
    if isinstance(tree, Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree
    return (
        [x for y in parts for x in tensors_in(y)] if isinstance(tree, dict | list | tuple) else []
    )


def named(args, kwargs) -> torch.device | None:
    """The device that is named among arguments."""
    for x in (*args, *(kwargs or {}).values()):
        if isinstance(x, str | torch.device) and str(x).split(":")[0] in ("cpu", "cuda", "meta"):
            return GPU if torch.device(x).type == "cuda" else torch.device(x)
    return None


def refuse(what: str) -> None:
    """Raise what CUDA raises."""
    raise RuntimeError(f"Expected all tensors to be on the same device: {what}")


class Operations(TorchDispatchMode):
    """Below autograd: each operation has its tensors on one device, and leaves its results there."""

    def __init__(self):
        super().__init__()
        self.places = {}  # by storage, so that views share it; what is not here is on the CPU
        self.inside, self.limit = False, 10_000

    def of(self, x: Tensor):
        """The device of a tensor, or ANY."""
        ordinary = x.device.type == "cpu" and x.layout == torch.strided
        return self.places.get(x.untyped_storage()._cdata, (0, CPU))[1] if ordinary else x.device

    def put(self, x: Tensor, place) -> None:
        """Say where a tensor is."""
        if x.device.type == "cpu" and x.layout == torch.strided:
            storage = x.untyped_storage()
            self.places[storage._cdata] = StorageWeakRef(storage), place
            if len(self.places) > self.limit:
                self.places = {k: v for k, v in self.places.items() if not v[0].expired()}
                self.limit = max(10_000, 2 * len(self.places))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Check the arguments, compute, and place the results."""
        with torch._C.DisableTorchFunction():
            name, given = func.overloadpacket, tensors_in((args, kwargs or {}))
            where = [self.of(x) for x in given]
            if name not in COPIES and GPU in where and CPU in where:
                self.require_same(name, args, given, where)
            results = func(*args, **kwargs or {})
            place = ANY if ANY in where or (not where and self.inside) else CPU
            place = where[0] if name in COPIES else GPU if GPU in where else place
            if place == CPU:
                return results
            old = {x.untyped_storage()._cdata for x in given if x.layout == torch.strided}
            for x in tensors_in(results):
                if x.layout == torch.strided and x.untyped_storage()._cdata not in old:
                    self.put(x, place)
            return results

    def require_same(self, name, args, given, where) -> None:
        """CUDA takes from the CPU single numbers, and the indices of `x[i]`."""
        if name in INDEXING:
            given = tensors_in((args[0], args[2:]))
            where = [self.of(x) for x in given]
        alone = [w == CPU and (x.ndim or name in STRICT) for x, w in zip(given, where, strict=True)]
        changed = where[0] == CPU and (name in INDEXING or str(name).endswith("_"))
        if changed or (GPU in where and any(alone)):
            refuse(f"{name} of {[(*x.shape, str(w)) for x, w in zip(given, where, strict=True)]}")


class Calls(TorchFunctionMode):
    """Above: what names a device, or asks for it."""

    def __init__(self, operations: Operations):
        super().__init__()
        self.operations = operations

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Answer with the pretended device, or call with the real one and place what comes out."""
        where = self.operations.of(args[0]) if args and isinstance(args[0], Tensor) else CPU
        here = GPU if where == ANY else where
        if func in (torch.device, torch._C._nn._parse_to):
            return func(*args, **kwargs or {})
        if func == Tensor.device.__get__:
            return here
        if func == Tensor.is_cuda.__get__:
            return here == GPU
        if func in (Tensor.numpy, Tensor.__array__) and here == GPU:
            refuse("NumPy reads a tensor of the GPU")
        given, wanted = tensors_in((args, kwargs)), named(args, kwargs)
        if wanted == GPU:
            args = [CPU if named([x], None) else x for x in args]
            kwargs = {k: CPU if named([x], None) else x for k, x in (kwargs or {}).items()}
        if func in (torch.tensor, torch.as_tensor, Tensor.__deepcopy__):
            wanted = wanted or here
        elif func is Tensor.to:
            wanted = self.operations.of(given[1]) if len(given) > 1 else wanted or here
        elif func in (Tensor.cpu, Tensor.cuda):
            wanted, func = CPU if func is Tensor.cpu else GPU, lambda x, *args, **kwargs: x
        if (kwargs or {}).get("generator") and (wanted or here) == GPU:
            refuse("a generator of the CPU draws for the GPU")
        before, self.operations.inside = self.operations.inside, bool(given)
        try:
            return self.settle(func(*args, **kwargs or {}), given, wanted)
        finally:
            self.operations.inside = before

    def settle(self, results, given: list[Tensor], wanted):
        """Results where they were asked for; a tensor that is elsewhere is copied."""
        if wanted and isinstance(results, Tensor):
            if self.operations.of(results) != wanted and any(results is x for x in given):
                results = results.clone()
            self.operations.put(results, wanted)
        elif any(self.operations.of(x) == GPU for x in given):
            for x in tensors_in(results):
                if self.operations.of(x) == ANY:
                    self.operations.put(x, GPU)
        return results


@contextmanager
def pretended():
    """What runs within believes that there is a GPU."""
    operations = Operations()
    calls, engine = Calls(operations), torch.autograd._engine_run_backward

    def run_backward(*args, **kwargs):  # it may call Python: the forward of a checkpoint
        with calls:
            return engine(*args, **kwargs)

    event = mock.Mock(return_value=mock.Mock(elapsed_time=lambda other: 1.0))
    AcceleratorState._reset_state(reset_partial_state=True)
    with ExitStack() as stack:
        for owner, name, new in (
            (torch, "compile", lambda f=None, **options: f or (lambda g: g)),
            (torch.autograd, "_engine_run_backward", run_backward),
            (torch.cuda, "synchronize", mock.Mock()),
            (torch.cuda, "set_device", mock.Mock()),
            (torch.cuda, "Event", event),
            (PartialState, "default_device", GPU),
        ):
            stack.enter_context(mock.patch.object(owner, name, new))
        # A checkpoint asks for devices in the backward pass as in the forward, where calls are not seen.
        checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
        stack.enter_context(mock.patch.dict(checks, default=lambda x: (x.shape, x.dtype)))
        stack.enter_context(calls)
        stack.enter_context(operations)
        yield
    AcceleratorState._reset_state(reset_partial_state=True)
