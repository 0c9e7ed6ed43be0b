"""What the beam searches of this package have in common."""

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.utils import GenerateBeamOutput

from .beam_options import BeamSearchOptions, as_list

NEVER = -1e9  # what transformers' loop adds to the score of what must not be chosen


class Search(GenerationMixin):
    """
    A search on transformers' loop, used as a view of the model (see `beam_search`).

    Searches override helpers of the loop, which passes their arguments by name; most go on as they came, so they are
    not spelt out again (hence `ignore[override]`).
    """

    def start_search(
        self, options: BeamSearchOptions, generation_config: GenerationConfig, device: torch.device
    ) -> None:
        """Called on the view, once, before the loop."""
        self._options = options
        self._eos_ids = torch.tensor(as_list(generation_config.eos_token_id), device=device, dtype=torch.long)

    def finish_search(self, output: GenerateBeamOutput | torch.LongTensor) -> GenerateBeamOutput | torch.LongTensor:
        """Called with what the loop has returned."""
        return output
