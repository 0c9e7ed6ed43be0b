"""Trains a small model with OpenNMT-py 3.x and writes down what the original makes of some sentences.

Runs in an environment that has OpenNMT-py, not in this project's:

    python tests/make_opennmt_checkpoint.py OUTPUT brnn-lstm-general --steps 100
    python tests/make_opennmt_checkpoint.py OUTPUT rnn-gru-mlp --steps 300 --source train.en --target train.de \\
        --test-source test.en --test-target test.de

Without files the task is to write sentences of made-up words backwards. In OUTPUT there will be `model.pt` as
OpenNMT-py saves it; `outputs.json` with the test's `sources` and `targets`, the original's `greedy` output and its
beam search's (`beam_none`, `beam_avg`: by length penalty); and `logits.pt`, its scores of the first 20 targets in
float64, [T, V] each.
"""

import json
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path

from parallel_text import arguments, read

# What each is there for: the options of train.py that make the model.
CONFIGURATIONS = {
    "brnn-lstm-general": "-encoder_type brnn -rnn_type LSTM -global_attention general -input_feed 1",
    "brnn-lstm-dot-no-feed": "-encoder_type brnn -rnn_type LSTM -global_attention dot -input_feed 0 -enc_layers 2 "
    "-dec_layers 2",
    "rnn-gru-mlp": "-encoder_type rnn -rnn_type GRU -global_attention mlp -input_feed 1",
    "brnn-gru-mlp-bridge": "-encoder_type brnn -rnn_type GRU -global_attention mlp -input_feed 1 -bridge "
    "-enc_layers 2 -dec_layers 2",
    "brnn-lstm-bridge": "-encoder_type brnn -rnn_type LSTM -global_attention general -input_feed 1 -bridge "
    "-global_attention_function sparsemax -enc_layers 2 -dec_layers 2",
    "copy-mlp": "-encoder_type brnn -rnn_type LSTM -global_attention mlp -input_feed 1 -copy_attn -reuse_copy_attn "
    "-bridge -coverage_attn -share_vocab",
    "shared": "-encoder_type brnn -rnn_type LSTM -global_attention general -input_feed 1 -share_vocab "
    "-share_embeddings -share_decoder_embeddings",
    "no-attention": "-encoder_type rnn -rnn_type LSTM -global_attention none -input_feed 0",
}
BEAMS, MAX_LENGTH, SCORED = 5, 60, 20


def write_vocabulary(path: Path, lines: list[str], least: int) -> None:
    """As build_vocab does: a word and its count in a line, the most frequent first."""
    counts: dict[str, int] = {}
    for line in lines:
        for word in line.split():
            counts[word] = counts.get(word, 0) + 1
    kept = sorted((word for word in counts if counts[word] >= least), key=lambda word: (-counts[word], word))
    path.write_text("".join(f"{word}\t{counts[word]}\n" for word in kept), encoding="utf-8")


def train(folder: Path, configuration: str, size: int, steps: int) -> Path:
    from onmt.bin import train as onmt_train

    shared = "-share_vocab" in configuration
    (folder / "data.yaml").write_text(
        f"""data:
  corpus_1: {{path_src: {folder}/train.src, path_tgt: {folder}/train.tgt, transforms: []}}
  valid: {{path_src: {folder}/test.src, path_tgt: {folder}/test.tgt, transforms: []}}
save_data: {folder}/samples
src_vocab: {folder}/{"both" if shared else "src"}.vocab
tgt_vocab: {folder}/{"both" if shared else "tgt"}.vocab
"""
    )
    width = size if "-share_decoder_embeddings" in configuration else size // 2
    layers = "" if "-enc_layers" in configuration else "-enc_layers 1 -dec_layers 1"
    options = (
        f"-config {folder}/data.yaml -save_model {folder}/step {configuration} {layers} -hidden_size {size} "
        f"-word_vec_size {width} -dropout 0.1 -optim adam -learning_rate 0.002 -batch_size 64 -batch_type sents "
        f"-normalization tokens -max_grad_norm 5 -train_steps {steps} -valid_steps 1000000 -save_checkpoint_steps "
        f"{steps} -num_workers 0 -seed 1 -world_size 1 -accum_count 1"
    )
    sys.argv = ["train", *options.split()]
    onmt_train.main()
    return folder / f"step_step_{steps}.pt"


def translate(model: Path, folder: Path, options: str) -> list[str]:
    from onmt.bin import translate as onmt_translate
    from onmt.inference_engine import InferenceEnginePY
    from onmt.inputters.dynamic_iterator import build_dynamic_dataset_iter
    from onmt.utils.parse import ArgumentParser

    options = (
        f"-model {model} -src {folder}/test.src -output {folder}/out -batch_type sents -gpu -1 "
        f"-max_length {MAX_LENGTH} -max_length_ratio 100 {options}"
    )
    parsed = onmt_translate._get_parser().parse_args(options.split())
    ArgumentParser.validate_translate_opts(parsed)
    ArgumentParser._get_all_transform_translate(parsed)
    ArgumentParser._validate_transforms_opts(parsed)
    ArgumentParser.validate_translate_opts_dynamic(parsed)
    engine = InferenceEnginePY(parsed)
    # `infer_file`, which in 3.5 does not say that a model copies.
    rows = build_dynamic_dataset_iter(
        parsed, engine.transforms_cls, engine.vocabs, copy=engine.translator.copy_attn, task="infer", device_id=-1
    )
    _, predictions = engine._translate(rows)
    engine.terminate()
    return [best[0] for best in predictions]


def score(model_path: Path, sources: list[str], targets: list[str]) -> list:
    """The generator's output for each target's words and `</s>`, [T, V], all in one padded batch."""
    import torch
    from onmt.bin import translate as onmt_translate
    from onmt.model_builder import load_test_model

    parsed = onmt_translate._get_parser().parse_args(["-model", str(model_path), "-src", "unused"])
    vocabs, model, _ = load_test_model(parsed)
    model.double()  # a copying generator's 1 - p loses digits in float32 where p is near 1
    source = [vocabs["src"](text.split(" ")) for text in sources]
    target = [vocabs["tgt"](["<s>", *text.split(" ")]) for text in targets]
    lengths = torch.tensor([len(ids) for ids in source])

    def padded(rows: list[list[int]]) -> torch.Tensor:
        tensors = [torch.tensor(row) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=vocabs["src"]["<blank>"])

    with torch.no_grad():
        ids = padded(source).unsqueeze(-1)
        memory, final, _ = model.encoder(ids, lengths)
        model.decoder.init_state(ids, memory, final)
        features, attentions = model.decoder(padded(target).unsqueeze(-1), memory, src_len=lengths)
        if "copy" not in attentions:
            logits = list(model.generator(features))
        else:  # log-probabilities of the vocabulary's words, those that the source has with their copies
            logits, places = [], torch.eye(ids.size(1), dtype=features.dtype).unsqueeze(0)
            for text, states, attention in zip(sources, features, attentions["copy"].transpose(0, 1), strict=True):
                # Alone: of several sentences the generator takes one's attention for another's.
                both = model.generator(states, attention, places)
                p, copied = both.split([len(vocabs["tgt"]), ids.size(1)], dim=-1)
                for place, word in enumerate(text.split(" ")):
                    if vocabs["tgt"][word] != 0:
                        p[:, vocabs["tgt"][word]] += copied[:, place]
                logits.append(p.log())
    return [rows[: len(ids)].clone() for rows, ids in zip(logits, target, strict=True)]


def loader(load: Callable[..., object]) -> Callable[..., object]:
    """torch.load as OpenNMT-py 3.5 needs it."""

    def patched(*arguments: object, **named: object) -> object:
        # Its checkpoints hold an argparse.Namespace, and it does not say so to a torch that reads tensors only.
        checkpoint = load(*arguments, **{**named, "weights_only": False})
        if isinstance(checkpoint, dict) and "linear_copy.weight" in checkpoint.get("generator", {}):
            # It looks for a copy generator's weights where it does not save them.
            generator, checkpoint["generator"] = checkpoint["generator"], {}
            checkpoint["model"].update({f"generator.{name}": value for name, value in generator.items()})
        return checkpoint

    return patched


def main() -> None:
    parser = arguments(__doc__, CONFIGURATIONS, "steps")
    parser.add_argument("--size", type=int, default=64, help="width of the recurrent layers")
    options = parser.parse_args()

    for name in ("fasttext", "spacy"):  # for filters of data that nothing here uses
        sys.modules.setdefault(name, types.ModuleType(name))
    import torch

    torch.set_num_threads(1)
    torch.load = loader(torch.load)

    folder = options.output / "work"
    folder.mkdir(parents=True)
    text = read(options)
    text.write(folder)
    words = {"src": text.train_source, "tgt": text.train_target, "both": text.train_source + text.train_target}
    for name, lines in words.items():
        write_vocabulary(folder / f"{name}.vocab", lines, least=2)

    trained = train(folder, CONFIGURATIONS[options.configuration], options.size, options.steps)
    shutil.copy(trained, options.output / "model.pt")
    sources, targets = text.test_source, text.test_target
    # 3.5 mixes up the sources that copies come from when one sentence of a batch ends before another.
    batch = "-batch_size 1" if "-copy_attn" in CONFIGURATIONS[options.configuration] else "-batch_size 32"
    outputs = {
        "sources": sources,
        "targets": targets,
        "greedy": translate(trained, folder, f"{batch} -beam_size 1 -random_sampling_topk 1"),
        "beam_none": translate(trained, folder, f"{batch} -beam_size {BEAMS} -length_penalty none"),
        "beam_avg": translate(trained, folder, f"{batch} -beam_size {BEAMS} -length_penalty avg -alpha 1"),
    }
    (options.output / "outputs.json").write_text(json.dumps(outputs, ensure_ascii=False), encoding="utf-8")
    torch.save(score(trained, sources[:SCORED], targets[:SCORED]), options.output / "logits.pt")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
