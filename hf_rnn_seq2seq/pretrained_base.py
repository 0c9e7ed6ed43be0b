"""What makes the models transformers' own: first weights, saving, resizing of vocabularies."""

import os
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .configuration_rnn_seq2seq import RnnSeq2SeqConfig


class RnnSeq2SeqPreTrainedModel(PreTrainedModel):
    """What both models share: initial weights and what transformers may do with them."""

    config: RnnSeq2SeqConfig
    config_class = RnnSeq2SeqConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _is_stateful = True  # a state can't take tokens back: generate() refuses assisted and prompt-lookup decoding
    # A decoder step reads weights of many modules without calling them, so a device holds a side as a whole.
    _no_split_modules = ["RnnSeq2SeqEncoder", "RnnSeq2SeqDecoder"]  # noqa: RUF012  transformers' class attribute
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        ids = torch.tensor([[2, 1, 2], [1, 2, self.config.pad_token_id or 0]], device=self.device)
        return {"input_ids": ids, "attention_mask": ids != (self.config.pad_token_id or 0), "decoder_input_ids": ids}

    def save_pretrained(  # type: ignore[override]  # its many arguments pass through
        self, save_directory: str | os.PathLike[str], **kwargs: Any
    ) -> None:
        """As everywhere in transformers; where the code travels along, every Auto class finds its part of it."""
        if self._auto_class is not None:
            self.config.auto_map = {
                "AutoConfig": "configuration_rnn_seq2seq.RnnSeq2SeqConfig",
                "AutoModel": "modeling_rnn_seq2seq.RnnSeq2SeqModel",
                "AutoModelForSeq2SeqLM": "modeling_rnn_seq2seq.RnnSeq2SeqForConditionalGeneration",
            }
        if self.can_generate():
            # Loading, transformers drops what it does not know (`BeamSearchOptions`) from what is marked like this.
            self.generation_config._from_model_config = False
        super().save_pretrained(save_directory, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        reset = getattr(module, "reset_weights", None)  # our own modules know theirs
        if reset is not None:
            reset()
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[module.padding_idx])

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """
        Resizes what `config.vocab_size` counts, as `len(tokenizer)` does: the one vocabulary, or the target's of two
        (its embeddings and the output layer), and returns its embeddings. `resize_source_token_embeddings` is for the
        other side.
        """
        if self.config.shared_vocabulary:
            return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        decoder = self.get_decoder()
        old = decoder.get_input_embeddings()
        new = self._get_resized_embeddings(old, new_num_tokens, pad_to_multiple_of, mean_resizing)
        new.requires_grad_(old.weight.requires_grad)
        decoder.set_input_embeddings(new)
        old_output = self.get_output_embeddings()
        if old_output is not None:  # the model without a head has none
            output = self._get_resized_lm_head(old_output, new.num_embeddings, mean_resizing=mean_resizing)
            output.requires_grad_(old_output.weight.requires_grad)
            self.set_output_embeddings(output)
        self.config.vocab_size = new.num_embeddings
        self.tie_weights()
        return new

    def resize_source_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """Resizes the source embeddings and `config.source_vocab_size` of a model with two vocabularies."""
        if self.config.shared_vocabulary:
            raise ValueError("This model has one vocabulary for both sides: use `resize_token_embeddings`.")
        old = self.get_encoder().get_input_embeddings()
        new = self._get_resized_embeddings(old, new_num_tokens, pad_to_multiple_of, mean_resizing)
        new.requires_grad_(old.weight.requires_grad)
        self.set_input_embeddings(new)
        self.config.source_vocab_size = new.num_embeddings
        return new
