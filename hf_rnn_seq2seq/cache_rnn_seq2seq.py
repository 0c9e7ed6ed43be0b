"""The decoder's recurrent state: a value, `DecoderState`, and the transformers `Cache` that carries it on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from .attention import Alignment, PreparedMemory
from .recurrent_layers import State


@dataclass(frozen=True)
class DecoderState:
    """
    All that a decoder step hands to the next. Every tensor has the batch first, so one `map` moves, repeats, selects
    and reorders everything.

    Args:
        layers: state of each recurrent layer, bottom first; tensors [B, H].
        feed: what the wiring feeds back beside the recurrent state, e.g. the attentional vector; tensors [B, F].
        alignment: what attention carries on.
        noise: dropout masks that hold for the whole sequence, one tuple a layer; empty outside training.
    """

    layers: tuple[State, ...]
    feed: tuple[torch.Tensor, ...] = ()
    alignment: Alignment = ()
    noise: tuple[State, ...] = ()

    def map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> "DecoderState":
        """The same state with `fn` applied to every tensor."""
        return DecoderState(
            layers=tuple(tuple(fn(tensor) for tensor in layer) for layer in self.layers),
            feed=tuple(fn(tensor) for tensor in self.feed),
            alignment=tuple(fn(tensor) for tensor in self.alignment),
            noise=tuple(tuple(fn(tensor) for tensor in layer) for layer in self.noise),
        )

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor, in `map`'s order."""
        found: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            found.append(tensor)
            return tensor

        self.map(keep)
        return found

    def replace_tensors(self, tensors: list[torch.Tensor]) -> "DecoderState":
        """The same structure with other tensors, in `map`'s order."""
        values = iter(tensors)
        return self.map(lambda _: next(values))

    def where(self, condition: torch.Tensor, other: "DecoderState") -> "DecoderState":
        """
        Row by row, this state where `condition` [B] holds, else `other`. A past that has grown, [B, P, ...], is made
        as long in `other` by zeros at its end: a row that stands still gets an empty, masked place.
        """

        def choose(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
            if old.shape != new.shape:
                grown = new.size(1) - old.size(1)
                old = torch.cat((old, old.new_zeros(old.size(0), grown, *old.shape[2:])), dim=1)
            return torch.where(condition.view(-1, *[1] * (new.dim() - 1)), new, old)

        pairs = zip(self.tensors(), other.tensors(), strict=True)
        return self.replace_tensors([choose(new, old) for new, old in pairs])


class RecurrentStateLayer(CacheLayerMixin):
    """The one layer of [`RnnSeq2SeqCache`]: the whole decoder's state after the tokens seen so far."""

    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: DecoderState | None = None
        self.seen_tokens = 0
        self.device: torch.device | None = None  # where `prefetch` brings back what was offloaded

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.update(key_states, value_states)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError("A recurrent decoder has no keys and values; its cache holds a `DecoderState`.")

    def get_seq_length(self) -> int:
        return self.seen_tokens

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen_tokens + query_length, 0

    def map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.state is not None:
            self.state = self.state.map(fn)

    def reset(self) -> None:
        self.state, self.seen_tokens = None, 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.map(lambda tensor: tensor[indices.to(tensor.device)])

    def offload(self) -> None:
        if self.state is not None:
            self.device = self.state.tensors()[0].device
            self.map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.device is not None:
            self.map(lambda tensor: tensor.to(self.device, non_blocking=True))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise NotImplementedError(
                "A recurrent state can't be rolled back, so this cache can't be cropped; assisted and speculative "
                "decoding need a model that can."
            )


class RnnSeq2SeqCache(Cache):
    """
    `past_key_values` of the recurrent models: constant in size however long the output grows.

    Args:
        state: a first state, or `None` for an empty cache.
        seen_tokens: how many target tokens led to it.

    Beside the state it remembers the attention keys of the encoder output they were made from, so that a source is
    projected once, not once a token.
    """

    def __init__(self, state: DecoderState | None = None, seen_tokens: int = 0):
        self.layer = RecurrentStateLayer()
        self.layer.state, self.layer.seen_tokens = state, seen_tokens
        super().__init__(layers=[self.layer])
        self._memory: torch.Tensor | None = None
        self._prepared: PreparedMemory | None = None

    @property
    def state(self) -> DecoderState | None:
        return self.layer.state

    @property
    def prepared_memory(self) -> PreparedMemory | None:
        """What `prepared` has made last."""
        return self._prepared

    def advance(self, state: DecoderState, tokens: int) -> None:
        """Replaces the state by the one after `tokens` more tokens."""
        self.layer.state = state
        self.layer.seen_tokens += tokens

    def prepared(self, memory: torch.Tensor, prepare: Callable[[], PreparedMemory]) -> PreparedMemory:
        """`prepare()` for this encoder output, called again only when another one is handed in."""
        if self._prepared is None or self._memory is not memory:
            self._memory, self._prepared = memory, prepare()
        return self._prepared

    def reset(self) -> None:
        super().reset()
        self._memory = self._prepared = None

    @property
    def batch_size(self) -> int:
        return -1 if self.state is None else self.state.tensors()[0].size(0)

    @property
    def is_initialized(self) -> bool:
        return self.state is not None
