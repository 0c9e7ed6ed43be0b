"""Configuration of a recurrent encoder-decoder: one field an axis, checked when it is built and when it is saved."""

import difflib
from dataclasses import fields
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

CellType = Literal["lstm", "gru", "rnn_tanh", "rnn_relu"]
EncoderType = Literal["rnn"]
BridgeType = Literal["zeros", "last", "mean", "linear"]
AttentionType = Literal["none", "dot", "scaled_dot", "general", "additive", "normed_additive"]
WiringType = Literal["output_only", "input_feeding", "bahdanau"]
HeadType = Literal["linear"]

# Probabilities that are no part of the weights' shape or meaning: they may change from one training to the next.
REGULARIZATION = (
    "dropout",
    "embedding_dropout",
    "output_dropout",
    "attention_dropout",
    "recurrent_dropout",
    "zoneout",
)


@strict
class RnnSeq2SeqConfig(PreTrainedConfig):
    r"""
    Configuration of [`RnnSeq2SeqModel`] and [`RnnSeq2SeqForConditionalGeneration`].

    Args:
        vocab_size (`int`, defaults to 32000):
            Size of the target vocabulary V; with one shared vocabulary, of the only one.
        source_vocab_size (`int`, *optional*):
            Size of the source vocabulary when it differs from the target's. `None` means one vocabulary, with one
            embedding table for both sides; a number, even one equal to `vocab_size`, means two tables.
        embedding_size (`int`, defaults to 256):
            Width of the embeddings of the source side and, unless `decoder_embedding_size` is given, of the target.
        decoder_embedding_size (`int`, *optional*):
            Width E of the target embeddings when it differs (two vocabularies only).
        hidden_size (`int`, defaults to 512):
            Width H of the decoder's layers.
        encoder_hidden_size (`int`, *optional*):
            Width of the encoder's layers *in each direction*. Defaults to `hidden_size // 2` for a bidirectional and
            `hidden_size` for a unidirectional encoder, so that the encoder's output is as wide as the decoder.
        encoder_layers (`int`, defaults to 1), decoder_layers (`int`, defaults to 1):
            Number of recurrent layers.
        cell_type (`str`, defaults to `"lstm"`):
            `lstm` (Hochreiter & Schmidhuber 1997), `gru` (Cho et al. 2014), `rnn_tanh` (Elman 1990), `rnn_relu`
            (Le et al. 2015).
        decoder_cell_type (`str`, *optional*):
            The decoder's cell where it differs.
        encoder_type (`str`, defaults to `"rnn"`):
            Encoder body.
        bidirectional (`bool`, defaults to `True`):
            Whether every encoder layer reads the source in both directions.
        encoder_residual (`bool`, defaults to `False`), decoder_residual (`bool`, defaults to `False`):
            Adds a layer's input to its output, from the second layer on (Wu et al. 2016, eq. 5-6).
        bridge_type (`str`, defaults to `"linear"`):
            How the decoder's first state is made: `zeros`; `last`, the encoder's final states layer by layer
            (Sutskever et al. 2014); `mean`, an affine map and tanh of the mean memory (Sennrich et al. 2017);
            `linear`, an affine map and tanh of the top layer's final state (Bahdanau et al. 2015).
        attention_type (`str`, defaults to `"additive"`):
            `none`, `dot` and `general` (Luong et al. 2015), `scaled_dot` (Vaswani et al. 2017), `additive` (Bahdanau
            et al. 2015), `normed_additive` (additive with a normalised score vector; Salimans & Kingma 2016).
        attention_hidden_size (`int`, *optional*):
            Width A of additive attention's hidden layer; defaults to `hidden_size`.
        wiring_type (`str`, defaults to `"input_feeding"`):
            Who feeds whom in a decoder step: `output_only` (attention after the recurrence, nothing fed back),
            `input_feeding` (Luong et al. 2015, section 3.3), `bahdanau` (attention by the previous state).
        head_type (`str`, defaults to `"linear"`):
            From the decoder's features to logits.
        dropout (`float`, defaults to 0.2):
            Between recurrent layers (Zaremba et al. 2014); none after the last layer.
        embedding_dropout (`float`, defaults to 0.2), output_dropout (`float`, defaults to 0.2):
            On the embeddings of both sides; on the features before the head.
        attention_dropout (`float`, defaults to 0.0):
            On the attention weights.
        recurrent_dropout (`float`, defaults to 0.0):
            On the recurrent input, one mask a sequence (Gal & Ghahramani 2016). Takes a loop over time steps.
        zoneout (`float`, defaults to 0.0):
            Probability that a unit keeps its old state for a step (Krueger et al. 2017). Takes a loop over time steps.
        initializer_range (`float`, defaults to 0.1):
            Standard deviation of the embeddings at the start. Matrices start as Xavier-uniform, recurrent matrices
            orthogonal, biases zero, an LSTM's forget gate at one (Jozefowicz et al. 2015).
        tie_word_embeddings (`bool`, defaults to `False`):
            Whether the output layer is the target embedding (Press & Wolf 2017), behind a projection where the
            widths differ.

    Example:

    ```python
    >>> from hf_rnn_seq2seq import RnnSeq2SeqConfig, RnnSeq2SeqForConditionalGeneration

    >>> config = RnnSeq2SeqConfig(vocab_size=100, hidden_size=64, embedding_size=32, attention_type="dot")
    >>> model = RnnSeq2SeqForConditionalGeneration(config)
    ```
    """

    model_type = "rnn_seq2seq"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  transformers declares it as a plain class attribute
    attribute_map = {"num_hidden_layers": "decoder_layers"}  # noqa: RUF012  the same

    vocab_size: int = 32000
    source_vocab_size: int | None = None
    embedding_size: int = 256
    decoder_embedding_size: int | None = None
    hidden_size: int = 512
    encoder_hidden_size: int | None = None
    encoder_layers: int = 1
    decoder_layers: int = 1
    cell_type: CellType = "lstm"
    decoder_cell_type: CellType | None = None
    encoder_type: EncoderType = "rnn"
    bidirectional: bool = True
    encoder_residual: bool = False
    decoder_residual: bool = False
    bridge_type: BridgeType = "linear"
    attention_type: AttentionType = "additive"
    attention_hidden_size: int | None = None
    wiring_type: WiringType = "input_feeding"
    head_type: HeadType = "linear"
    dropout: float | int = 0.2
    embedding_dropout: float | int = 0.2
    output_dropout: float | int = 0.2
    attention_dropout: float | int = 0.0
    recurrent_dropout: float | int = 0.0
    zoneout: float | int = 0.0
    initializer_range: float | int = 0.1
    tie_word_embeddings: bool = False
    use_cache: bool = True
    is_encoder_decoder: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    decoder_start_token_id: int | None = 1

    def __post_init__(self, **kwargs: Any) -> None:
        names = [field.name for field in fields(self)]
        for name in kwargs:
            # A misspelt field would otherwise be stored as a new attribute and change nothing.
            near = [match for match in difflib.get_close_matches(name, names, n=1, cutoff=0.85) if match != name]
            if near and not name.startswith("_") and not hasattr(type(self), name):
                raise ValueError(f"RnnSeq2SeqConfig has no field `{name}`; did you mean `{near[0]}`?")
        super().__post_init__(**kwargs)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> "RnnSeq2SeqConfig":
        """This configuration. The inherited method would rename `decoder_*` fields onto others of the same ending."""
        return self

    # What the fields amount to once their defaults are filled in: what modeling code reads, never the optional fields.

    @property
    def shared_vocabulary(self) -> bool:
        return self.source_vocab_size is None

    @property
    def source_size(self) -> int:
        """Number of source ids."""
        return self.vocab_size if self.source_vocab_size is None else self.source_vocab_size

    @property
    def target_embedding_size(self) -> int:
        return self.embedding_size if self.decoder_embedding_size is None else self.decoder_embedding_size

    @property
    def encoder_direction_size(self) -> int:
        """Width of one direction of an encoder layer."""
        if self.encoder_hidden_size is not None:
            return self.encoder_hidden_size
        return self.hidden_size // 2 if self.bidirectional else self.hidden_size

    @property
    def memory_size(self) -> int:
        """Width M of the encoder's output."""
        return self.encoder_direction_size * (2 if self.bidirectional else 1)

    @property
    def decoder_cell(self) -> CellType:
        return self.cell_type if self.decoder_cell_type is None else self.decoder_cell_type

    @property
    def attention_size(self) -> int:
        return self.hidden_size if self.attention_hidden_size is None else self.attention_hidden_size

    # Cross-field checks; `@strict` runs every `validate_*` method at construction and at save.

    def validate_sizes(self) -> None:
        for name in (
            "vocab_size",
            "source_vocab_size",
            "embedding_size",
            "decoder_embedding_size",
            "hidden_size",
            "encoder_hidden_size",
            "encoder_layers",
            "decoder_layers",
            "attention_hidden_size",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.bidirectional and self.encoder_hidden_size is None and self.hidden_size % 2:
            raise ValueError(
                f"`hidden_size` must be even for a bidirectional encoder of half the width, got {self.hidden_size}; "
                "or give `encoder_hidden_size`, the width of one direction."
            )
        if self.shared_vocabulary and self.target_embedding_size != self.embedding_size:
            raise ValueError(
                f"`decoder_embedding_size`={self.decoder_embedding_size} differs from `embedding_size`="
                f"{self.embedding_size}, but one shared vocabulary has one embedding table: give `source_vocab_size`."
            )

    def validate_probabilities(self) -> None:
        for name in REGULARIZATION:
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"`{name}` must lie in [0, 1), got {value}.")
        if self.initializer_range < 0:
            raise ValueError(f"`initializer_range` must not be negative, got {self.initializer_range}.")

    def validate_attention(self) -> None:
        if self.attention_type in ("dot", "scaled_dot") and self.memory_size != self.hidden_size:
            raise ValueError(
                f"`attention_type`={self.attention_type!r} needs an encoder output as wide as the decoder: "
                f"{self.memory_size} (`encoder_hidden_size` x directions) != {self.hidden_size} (`hidden_size`); "
                "use 'general', or make them equal."
            )
        if self.attention_hidden_size is not None and self.attention_type not in ("additive", "normed_additive"):
            raise ValueError(
                f"`attention_hidden_size` is additive attention's hidden layer; `attention_type`="
                f"{self.attention_type!r} has none: leave it out."
            )
        if self.attention_type == "none" and self.attention_dropout > 0:
            raise ValueError("`attention_dropout` must be 0 with `attention_type`='none'.")

    def validate_token_ids(self) -> None:
        smaller = min(self.vocab_size, self.source_size)
        for name, bound in (
            ("pad_token_id", smaller),
            ("bos_token_id", self.vocab_size),
            ("decoder_start_token_id", self.vocab_size),
            ("eos_token_id", self.vocab_size),
        ):
            value = getattr(self, name)
            for one in value if isinstance(value, list) else [value]:
                if one is not None and not 0 <= one < bound:
                    raise ValueError(f"`{name}`={one} lies outside the vocabulary of {bound} ids.")


__all__ = ["RnnSeq2SeqConfig"]
