# ruff: noqa: E402  modules that OpenNMT-py misses have to be there before it is imported
"""Jobs of benchmark.py for OpenNMT-py 3, run by the Python of an environment that has it."""

import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import torch

for missing in ("fasttext", "spacy"):  # for filters of data that nothing here uses
    sys.modules.setdefault(missing, types.ModuleType(missing))
torch.load.__kwdefaults__["weights_only"] = False  # OpenNMT-py's own checkpoints hold an argparse.Namespace

import onmt.opts
from onmt.bin import translate
from onmt.inference_engine import InferenceEnginePY
from onmt.inputters.inputter import dict_to_vocabs
from onmt.model_builder import build_base_model
from onmt.utils.loss import LossCompute
from onmt.utils.optimizers import Optimizer
from onmt.utils.parse import ArgumentParser
from serve import Batch, padded, serve, timed_updates

UNK, PAD, START, END = 0, 1, 2, 3
ATTENTIONS = {"additive": "mlp", "general": "general", "dot": "dot"}
models: dict[str, Any] = {}


def make(name: str, source_vocab: int, target_vocab: int, attention: str, hidden: int, embedding: int) -> int:
    """A model with input feeding, and what OpenNMT-py trains it with."""
    flags = (
        f"-data none -src_vocab none -encoder_type brnn -decoder_type rnn -rnn_type LSTM -input_feed 1 -dropout 0.2 "
        f"-global_attention {ATTENTIONS[attention]} -hidden_size {hidden} -word_vec_size {embedding} -enc_layers 1 "
        "-dec_layers 1 -optim adam -learning_rate 0.001 -max_grad_norm 0"
    )
    parser = ArgumentParser()
    onmt.opts.train_opts(parser)
    options, _ = parser.parse_known_args(flags.split())
    ArgumentParser.update_model_opts(options)
    words = ["<unk>", "<blank>", "<s>", "</s>"]
    vocabs = dict_to_vocabs(
        {
            "src": words + [f"s{i}" for i in range(source_vocab - 4)],
            "tgt": words + [f"t{i}" for i in range(target_vocab - 4)],
            "data_task": "seq2seq",
            "decoder_start_token": "<s>",
        }
    )
    model = build_base_model(options, vocabs).train()
    loss = LossCompute.from_opts(options, model, vocabs["tgt"])
    models[name] = (model, loss, Optimizer.from_opt(model, options))
    return sum(parameter.numel() for parameter in model.parameters())


def train(name: str, batches: list[Batch], precision: str) -> float:
    model, compute_loss, optimizer = models[name]

    def update(batch: Batch) -> None:
        lengths = torch.tensor([len(row) for row in batch["source"]])
        source = padded(batch["source"], PAD).unsqueeze(-1)
        target = padded([[START, *row, END] for row in batch["target"]], PAD).unsqueeze(-1)
        optimizer.zero_grad(set_to_none=True)
        features, attentions = model(source, target, lengths, bptt=False, with_align=False)
        sums, _ = compute_loss({"src": source, "srclen": lengths, "tgt": target}, features, attentions)
        optimizer.backward(sums / sum(len(row) + 1 for row in batch["target"]))
        optimizer.step()

    return timed_updates(update, batches, precision)


def load(name: str, checkpoint: str) -> None:
    models[name] = checkpoint


def decode(name: str, sentences: list[str], batch_size: int, beams: int, max_length: int = 60) -> dict[str, Any]:
    key = (name, batch_size, beams)
    folder = Path(tempfile.gettempdir())
    if key not in models:
        flags = f"-model {models[name]} -src unused -output {folder / 'opennmt.out'} -beam_size {beams} -gpu -1 " + (
            f"-batch_size {batch_size} -batch_type sents -max_length {max_length} -max_length_ratio 100"
            + (" -random_sampling_topk 1" if beams == 1 else "")
        )
        options = translate._get_parser().parse_args(flags.split())
        ArgumentParser.validate_translate_opts(options)
        ArgumentParser._get_all_transform_translate(options)
        ArgumentParser._validate_transforms_opts(options)
        ArgumentParser.validate_translate_opts_dynamic(options)
        models[key] = InferenceEnginePY(options)
    start = time.perf_counter()
    _, predictions = models[key].infer_list(sentences)
    # As ours leaves it out.
    outputs = [" ".join(best[0].replace("<unk>", " ").split()) for best in predictions]
    return {"seconds": time.perf_counter() - start, "outputs": outputs}


if __name__ == "__main__":
    serve({"make": make, "train": train, "load": load, "decode": decode})
