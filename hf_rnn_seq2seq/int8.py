"""
Weights in eight bits, for decoding on a CPU: `from_pretrained(..., quantization_config=RnnSeq2SeqInt8Config())`.

A matrix W becomes whole numbers from -127 to 127 and a scale for each of its rows. Before a product, x is brought to
eight bits as well, with one scale for all of it as it comes (dynamic quantisation); the product itself is of whole
numbers. Embedding tables are kept in eight bits and read out in floating point. All else stays as it was: biases,
convolutions, normalisations, cells that are no kernels of torch's, and what `modules_to_not_convert` names.

As x shares a scale, a row's result depends, within the rounding, on the rows beside it.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from .recurrent_base import State

METHOD = "rnn_seq2seq_int8"

# Products with more results than this are oneDNN's where torch has it, up to a quarter faster there; fbgemm, which is
# torch's choice for all, is faster below.
ONEDNN_RESULTS = 2**20
# Steps of so many rows are made of two products and the update of float32, which has the faster tanh: a tenth faster
# than torch's kernel for an LSTM, as fast for a GRU.
KERNEL_ROWS = 64
PACKING = Lock()

# Linear layers whose weight is read without a call: v of additive attention.
NOT_CALLED = ("score_projection",)


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row of W as whole numbers, the largest 127 or -127, times a scale: [O, I] -> int8 [O, I], float32 [O]."""
    weight = weight.detach().to("cpu", torch.float32)
    if weight.numel() == 0:
        return weight.to(torch.int8), weight.new_ones(len(weight))
    # A row of zeros has any scale that is no denormal number.
    scale = weight.abs().amax(1).clamp(min=127 * torch.finfo(torch.float32).tiny) / 127
    return (weight / scale.unsqueeze(1)).round().clamp(-127, 127).to(torch.int8), scale


def engine_for(results: int) -> str:
    """Which of torch's engines for whole numbers makes a product of so many numbers."""
    own = torch.backends.quantized.engine
    if results <= ONEDNN_RESULTS or own != "x86" or "onednn" not in torch.backends.quantized.supported_engines:
        return own
    return "onednn"


@contextmanager
def quantized_engine(engine: str) -> Iterator[None]:
    """torch packs for the engine that is set, in all threads."""
    with PACKING:
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = engine
        try:
            yield
        finally:
            torch.backends.quantized.engine = before


class Int8Matrix(nn.Module):
    """
    A matrix in eight bits.

    Args:
        shape: [O, I].
        original: its values, if they are known already.
    """

    def __init__(self, shape: torch.Size, original: torch.Tensor | None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.int8), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.empty(shape[0], dtype=torch.float32), requires_grad=False)
        if original is not None:
            weight, scale = quantize_rows(original)
            self.weight, self.weight_scale = (nn.Parameter(one, requires_grad=False) for one in (weight, scale))

    def share(self, other: "Int8Matrix") -> None:
        """Have this matrix be the other one."""
        self.weight, self.weight_scale = other.weight, other.weight_scale


class Int8Embedding(Int8Matrix):
    """`nn.Embedding` with a table in eight bits; its vectors are float32."""

    def __init__(self, original: nn.Embedding, loaded: bool):
        super().__init__(original.weight.shape, original.weight if loaded else None)
        self.num_embeddings, self.embedding_dim = original.weight.shape
        self.padding_idx = original.padding_idx

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weight[ids] * self.weight_scale[ids].unsqueeze(-1)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


class Int8Linear(Int8Matrix):
    """
    W x + b with W in eight bits.

    Args:
        weight, bias: [O, I], [O].
        loaded: do they hold values already?
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, loaded: bool):
        super().__init__(weight.shape, weight if loaded else None)
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        # What each engine's kernel reads, and the tensors that it was made of.
        self.packed: dict[str, tuple[torch.ScriptObject, tuple[torch.Tensor | None, ...]]] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., I] -> [..., O], in x's type."""
        self.check(x)
        if x.numel() == 0:
            return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        results = x.numel() // self.in_features * self.out_features
        # Without VNNI pairs of products are added up in 16 bits, where x has one bit less. The operator's one overload
        # is named, as to look for it takes longer than a small product.
        product = torch.ops.quantized.linear_dynamic.default(
            x.to(torch.float32), self._pack(engine_for(results)), not torch.cpu._is_vnni_supported()
        )
        return product.to(x.dtype)

    def check(self, x: torch.Tensor) -> None:
        """
        Raises:
            RuntimeError: in training; for an input that is not on the CPU.
        """
        if self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "Weights in eight bits (`RnnSeq2SeqInt8Config`) are for decoding and can't be trained: call "
                "model.eval(), or load the model that was quantised without `quantization_config`."
            )
        if x.device.type != "cpu":
            raise RuntimeError(
                f"Weights in eight bits (`RnnSeq2SeqInt8Config`) are for a CPU, the input is on {x.device}."
            )

    def _pack(self, engine: str) -> torch.ScriptObject:
        """In the layout of the engine's kernel, made at its first call and when there are other weights."""
        source = (self.weight, self.weight_scale, self.bias)
        packed = self.packed.get(engine)
        if packed is None or any(one is not other for one, other in zip(packed[1], source, strict=True)):
            # Warnings are of quantised tensors, for whose kernel torch 2.13 has no other door.
            with warnings.catch_warnings(), quantized_engine(engine):
                warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")
                quantized = torch._make_per_channel_quantized_tensor(
                    self.weight.detach(),
                    self.weight_scale.detach().double(),
                    torch.zeros(self.out_features, dtype=torch.long),
                    0,
                )
                bias = None if self.bias is None else self.bias.detach().float()
                packed = self.packed[engine] = torch.ops.quantized.linear_prepack(quantized, bias), source
        return packed[0]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.packed = {}
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "packed": {}}  # copies pack for themselves

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Kernel(NamedTuple):
    """Operators that go through a sequence as one of torch's kernels does, with matrices of eight bits."""

    whole: Callable[..., tuple[torch.Tensor, ...]]  # of rows that are equally long
    packed: Callable[..., tuple[torch.Tensor, ...]]  # of a `PackedSequence`


KERNELS = {
    torch.lstm: Kernel(torch.ops.aten.quantized_lstm.input, torch.ops.aten.quantized_lstm.data),
    torch.gru: Kernel(torch.ops.aten.quantized_gru.input, torch.ops.aten.quantized_gru.data),
}


class Int8Cell:
    """
    What a `KernelLayer` with weights in eight bits does otherwise: its products; and a sequence or a step, where torch
    has a kernel for them.

    `quantize_cell` puts this class before the layer's own.
    """

    product_ih: Int8Linear
    product_hh: Int8Linear
    num_states: int
    zoneout: float
    fused: Callable[..., tuple[torch.Tensor, ...]]
    sums = False  # its products stay two

    # What the kernel reads, and what it was made of.
    matrices: tuple[torch.ScriptObject | None, tuple[torch.ScriptObject, ...]] = (None, ())

    def _cast(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.to(torch.float32) for tensor in tensors]

    def project(self, x: torch.Tensor) -> torch.Tensor:
        return self.product_ih(x)

    def cell(self, x: torch.Tensor, state: State, noise: State) -> State:
        return self.update(x, self.product_hh(self.drop(state[0], noise)), state)  # type: ignore[attr-defined]

    def step(self, x: torch.Tensor, state: State, noise: State = ()) -> State:
        if self.zoneout > 0 or noise or self._kernel(x) is None or x.size(0) >= KERNEL_ROWS:
            return super().step(x, state, noise)  # type: ignore[misc]
        return self._forward_at_once(x.unsqueeze(1), state, None)[1]

    def _forward_at_once(self, x: torch.Tensor, state: State, mask: torch.Tensor | None) -> tuple[torch.Tensor, State]:
        kernel = self._kernel(x)
        if kernel is None:
            return self._forward_by_steps(x, state, mask)  # type: ignore[attr-defined]
        self.product_ih.check(x)
        x, *state_list = self._cast(x, *state)
        first = [value.unsqueeze(0) for value in state_list]  # [1, B, H] each
        # Matrices, biases, layers, dropout, training, both directions.
        arguments = (first if self.num_states > 1 else first[0], [self._matrices()], True, 1, 0.0, False, False)
        if mask is not None and not mask.all():
            return self._forward_packed(kernel, x, arguments, mask)
        outputs, *last = kernel.whole(x, *arguments, True)  # batch first
        return outputs, tuple(value.squeeze(0) for value in last)

    def _forward_packed(
        self, kernel: Kernel, x: torch.Tensor, arguments: tuple[Any, ...], mask: torch.Tensor
    ) -> tuple[torch.Tensor, State]:
        """Of rows of several lengths: tokens moved to the left, and rows in the order of their lengths."""
        places = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True).unsqueeze(2)  # [B, T, 1]
        lengths = mask.sum(1)
        packed = pack_padded_sequence(x.gather(1, places.expand_as(x)), lengths.clamp(min=1), True, False)
        data, *last = kernel.packed(packed.data, packed.batch_sizes, *arguments)
        outputs, _ = pad_packed_sequence(packed._replace(data=data), True, total_length=x.size(1))
        outputs = torch.zeros_like(outputs).scatter(1, places.expand_as(outputs), outputs)
        empty = (lengths == 0).unsqueeze(1)
        final = (value.squeeze(0)[packed.unsorted_indices] for value in last)
        return outputs.masked_fill(~mask.unsqueeze(2), 0), tuple(value.masked_fill(empty, 0) for value in final)

    def _kernel(self, x: torch.Tensor) -> Kernel | None:
        return None if x.numel() == 0 or torch.compiler.is_compiling() else KERNELS.get(type(self).fused)

    def _matrices(self) -> torch.ScriptObject:
        engine = torch.backends.quantized.engine
        packed = tuple(product._pack(engine) for product in (self.product_ih, self.product_hh))
        made, source = self.matrices
        if made is None or any(one is not other for one, other in zip(packed, source, strict=True)):
            made = torch.ops.quantized.make_quantized_cell_params_dynamic(
                *packed, self.product_ih.bias, self.product_hh.bias, not torch.cpu._is_vnni_supported()
            )
            self.matrices = made, packed
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "matrices": (None, ())}  # type: ignore[dict-item]  # copies make their own


def quantize_cell(layer: nn.Module, loaded: bool) -> None:
    """A `KernelLayer`, in place."""
    for side in ("ih", "hh"):
        product = Int8Linear(getattr(layer, f"weight_{side}"), getattr(layer, f"bias_{side}"), loaded)
        delattr(layer, f"weight_{side}")
        delattr(layer, f"bias_{side}")
        setattr(layer, f"product_{side}", product)
    own = type(layer)
    layer.__class__ = type(f"Int8{own.__name__}", (Int8Cell, own), {"__module__": own.__module__})


def is_kernel_layer(module: nn.Module) -> bool:
    """By what it has: its class may come from another copy of this code."""
    return all(hasattr(module, name) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "update"))


def quantize(model: nn.Module, skipped: list[str], loaded: bool) -> None:
    """
    Every linear layer, embedding and kernel layer of a model, in place.

    Args:
        model: the model.
        skipped: what to leave alone: names of modules, or the ends of such names.
        loaded: are the weights there? Else there is only room for them.
    """
    shared: dict[int, Int8Matrix] = {}  # by the original's identity: tied weights stay tied
    originals = []  # kept alive, for their identities
    for name, module in list(model.named_modules()):
        if any(name == end or name.endswith(f".{end}") for end in (*skipped, *NOT_CALLED)):
            continue
        if is_kernel_layer(module):
            quantize_cell(module, loaded)
        new: Int8Matrix | None = None
        if isinstance(module, nn.Linear):
            new = Int8Linear(module.weight, module.bias, loaded)
        elif isinstance(module, nn.Embedding):
            new = Int8Embedding(module, loaded)
        if new is None:
            continue
        originals.append(module.weight)
        if id(module.weight) in shared:
            new.share(shared[id(module.weight)])
        shared.setdefault(id(module.weight), new)
        model.set_submodule(name, new.train(module.training))
    model.requires_grad_(False)


class RnnSeq2SeqInt8Config(QuantizationConfigMixin):
    """
    For `from_pretrained(..., quantization_config=...)`: weights in eight bits, for decoding on a CPU. What
    `save_pretrained` then writes loads without this argument.

    Args:
        modules_to_not_convert: names of modules to leave in floating point, or ends of names, as `head.output`.
    """

    def __init__(self, modules_to_not_convert: list[str] | None = None, **kwargs: Any):
        unknown = [name for name in kwargs if name != "quant_method"]
        if unknown:
            raise ValueError(f"RnnSeq2SeqInt8Config has `modules_to_not_convert` alone, not {', '.join(unknown)}.")
        if isinstance(modules_to_not_convert, str):
            raise ValueError(f"`modules_to_not_convert` must be a list of names, got {modules_to_not_convert!r}.")
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers' own have an enumeration
        self.modules_to_not_convert = modules_to_not_convert


class RnnSeq2SeqInt8Quantizer(HfQuantizer):
    """What `from_pretrained` does for a `RnnSeq2SeqInt8Config`."""

    quantization_config: RnnSeq2SeqInt8Config

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        devices = device_map.values() if isinstance(device_map, dict) else [device_map]
        elsewhere = [str(device) for device in devices if device is not None and torch.device(device).type != "cpu"]
        if elsewhere:
            raise ValueError(f"`RnnSeq2SeqInt8Config` is for a CPU: `device_map` must not name {elsewhere[0]!r}.")
        if torch.backends.quantized.engine == "none":
            raise ImportError("`RnnSeq2SeqInt8Config`: this build of torch has no kernels for eight bits.")

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        skipped = self.quantization_config.modules_to_not_convert or []
        names = [name for name, _ in model.named_modules()]
        for one in skipped:
            if not any(name == one or name.endswith(f".{one}") for name in names):
                raise ValueError(f"`modules_to_not_convert`: the model has no module {one!r}.")
        if self.pre_quantized:
            quantize(model, skipped, loaded=False)
            self._tie_scales(model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if not self.pre_quantized:
            quantize(model, self.quantization_config.modules_to_not_convert or [], loaded=True)
            self._tie_scales(model)

    @staticmethod
    def _tie_scales(model: PreTrainedModel) -> None:
        """Where weights are tied, so are their scales."""
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        tied = {f"{one}_scale": f"{other}_scale" for one, other in model.all_tied_weights_keys.items()}
        model.all_tied_weights_keys |= {one: other for one, other in tied.items() if {one, other} <= names}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def register() -> None:
    """Make `RnnSeq2SeqInt8Config` known to `from_pretrained`. (A checkpoint's own copy of this code comes second.)"""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, RnnSeq2SeqInt8Config)
    AUTO_QUANTIZER_MAPPING.setdefault(METHOD, RnnSeq2SeqInt8Quantizer)
