"""Recurrent encoder-decoders with attention as Hugging Face models; importing it registers the Auto classes."""

from typing import TYPE_CHECKING

from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.pipelines import PIPELINE_REGISTRY

from .cache_rnn_seq2seq import RnnSeq2SeqCache
from .configuration_rnn_seq2seq import RnnSeq2SeqConfig
from .ensemble import RnnSeq2SeqEnsemble
from .int8 import RnnSeq2SeqInt8Config
from .modeling_rnn_seq2seq import RnnSeq2SeqForConditionalGeneration, RnnSeq2SeqModel
from .pipeline_rnn_seq2seq import TASK, RnnText2TextPipeline
from .presets import PRESETS, preset
from .tokenization_rnn_seq2seq import RnnSeq2SeqTokenizer
from .version import __version__

if TYPE_CHECKING:
    from .trainer import RnnSeq2SeqTrainer, RnnSeq2SeqTrainingArguments

AutoConfig.register("rnn_seq2seq", RnnSeq2SeqConfig, exist_ok=True)
AutoModel.register(RnnSeq2SeqConfig, RnnSeq2SeqModel, exist_ok=True)
AutoModelForSeq2SeqLM.register(RnnSeq2SeqConfig, RnnSeq2SeqForConditionalGeneration, exist_ok=True)
AutoTokenizer.register(RnnSeq2SeqConfig, RnnSeq2SeqTokenizer, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(TASK, RnnText2TextPipeline, pt_model=AutoModelForSeq2SeqLM, type="text")

# Saving and pushing then carry the code, so that a checkpoint loads where the package is not installed.
RnnSeq2SeqConfig.register_for_auto_class()
RnnSeq2SeqModel.register_for_auto_class("AutoModel")
RnnSeq2SeqForConditionalGeneration.register_for_auto_class("AutoModelForSeq2SeqLM")
RnnSeq2SeqTokenizer.register_for_auto_class()


def __getattr__(name: str) -> object:
    """The trainer, imported when it is asked for: serving a model needs neither accelerate nor datasets."""
    if name in ("RnnSeq2SeqTrainer", "RnnSeq2SeqTrainingArguments"):
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "PRESETS",
    "RnnSeq2SeqCache",
    "RnnSeq2SeqConfig",
    "RnnSeq2SeqEnsemble",
    "RnnSeq2SeqForConditionalGeneration",
    "RnnSeq2SeqInt8Config",
    "RnnSeq2SeqModel",
    "RnnSeq2SeqTokenizer",
    "RnnSeq2SeqTrainer",
    "RnnSeq2SeqTrainingArguments",
    "__version__",
    "preset",
]
