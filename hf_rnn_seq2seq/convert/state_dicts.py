"""Taking a checkpoint's weights, each once, and giving them this package's names."""

from collections.abc import Mapping

import torch

from .base import ConversionError

# The parameters of a recurrent layer, in torch as here.
PARTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class StateDict:
    """
    A checkpoint's weights in float32. Each has to be taken: `finish` raises for one that is left.

    Args:
        weights: by the toolkit's names.
        name: of the checkpoint, for errors.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], name: str):
        self.weights, self.name = weights, name
        self.left = set(weights)

    def __contains__(self, name: str) -> bool:
        return name in self.weights

    def take(self, name: str) -> torch.Tensor:
        if name not in self.weights:
            raise ConversionError(f"{self.name} has no weight {name!r}.")
        self.left.discard(name)
        return self.weights[name].float()

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.weights:
            raise ConversionError(f"{self.name} has no weight {name!r}.")
        return tuple(self.weights[name].shape)

    def layers(self, pattern: str) -> int:
        """How many weights there are whose names are `pattern` with 0, 1, ... in place of {}."""
        count = 0
        while pattern.format(count) in self.weights:
            count += 1
        return count

    def take_encoder(self, prefix: str, layers: int, bidirectional: bool) -> dict[str, torch.Tensor]:
        """A torch.nn.LSTM or GRU as the layers of an `rnn` encoder."""
        found = {}
        for layer in range(layers):
            for direction, suffix in (("forward", ""), ("backward", "_reverse"))[: 1 + bidirectional]:
                for part in PARTS:
                    ours = f"model.encoder.body.layers.{layer}.directions.{direction}_layer.{part}"
                    found[ours] = self.take(f"{prefix}.{part}_l{layer}{suffix}")
        return found

    def take_decoder(self, pattern: str, layers: int) -> dict[str, torch.Tensor]:
        """
        The layers of the decoder's stack.

        Args:
            pattern: their names, with {part} and {layer}.
        """
        return {
            f"model.decoder.wiring.stack.layers.{layer}.{part}": self.take(pattern.format(part=part, layer=layer))
            for layer in range(layers)
            for part in PARTS
        }

    def finish(self) -> None:
        if self.left:
            raise ConversionError(
                f"{self.name} has weights that this model has no place for: {', '.join(sorted(self.left))}."
            )
