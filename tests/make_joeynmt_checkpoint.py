"""Trains a small recurrent model with JoeyNMT 2.3 and writes down what the original makes of some sentences.

Runs in an environment that has JoeyNMT, not in this project's:

    python tests/make_joeynmt_checkpoint.py OUTPUT lstm-bridge --updates 100
    python tests/make_joeynmt_checkpoint.py OUTPUT gru-last --source train.en --target train.de \\
        --test-source test.en --test-target test.de

Without files the task is to write sentences of made-up words backwards. In OUTPUT there will be `model`, as JoeyNMT
leaves it; `outputs.json` with the test's `sources` and `targets`, their ids, and the original's tokens and
log-probabilities: `greedy`, and its beam search's without and with its length penalty, `beam` and `beam_alpha`; and
`logits.pt`, its scores of the first 20 targets, [T, V] each.
"""

import copy
import json
import sys
from pathlib import Path

from parallel_text import arguments, read

# What each is there for: the parts of the configuration in which it differs from the first.
CONFIGURATIONS = {
    "lstm-bridge": {},
    "gru-last": {
        "model": {
            "encoder": {"rnn_type": "gru", "num_layers": 2},
            "decoder": {
                "rnn_type": "gru",
                "num_layers": 2,
                "attention": "luong",
                "init_hidden": "last",
                "input_feeding": False,
            },
        },
    },
    "lstm-tied": {
        "model": {
            "tied_softmax": True,
            "encoder": {"embeddings": {"scale": True}},
            "decoder": {"num_layers": 2, "embeddings": {"embedding_dim": 96, "scale": True}, "init_hidden": "last"},
        },
        "data": {"src": {"level": "char"}},
    },
    "subword-nmt": {
        "model": {"decoder": {"init_hidden": "zero", "attention": "luong"}},
        "data": {side: {"level": "bpe", "tokenizer_type": "subword-nmt"} for side in ("src", "trg")},
    },
    "sentencepiece": {
        "model": {"encoder": {"rnn_type": "gru"}},
        "data": {side: {"level": "bpe", "tokenizer_type": "sentencepiece"} for side in ("src", "trg")},
    },
}
SCORED, MAX_LENGTH, BEAMS, ALPHA, PIECES = 20, 40, 5, 1.0, 400


def base(folder: Path, updates: int) -> dict:
    side = {"level": "word", "voc_min_freq": 8, "lowercase": False}
    embeddings = {"embedding_dim": 48, "scale": False, "dropout": 0.1}
    part = {"type": "recurrent", "rnn_type": "lstm", "num_layers": 1, "dropout": 0.1}
    return {
        "name": "small",
        "joeynmt_version": "2.3.0",
        "model_dir": str(folder / "model"),
        "use_cuda": False,
        "random_seed": 1,
        "data": {
            "train": str(folder / "train"),
            "dev": str(folder / "test"),
            "test": str(folder / "test"),
            "dataset_type": "plain",
            "sample_dev_subset": 20,
            "src": {"lang": "src", **side},
            "trg": {"lang": "tgt", **side},
        },
        "testing": {"beam_size": BEAMS, "beam_alpha": ALPHA, "max_output_length": MAX_LENGTH, "batch_size": 50},
        "training": {
            "optimizer": "adam", "learning_rate": 0.003, "batch_size": 32, "batch_type": "sentence",
            "normalization": "tokens", "clip_grad_norm": 5.0, "epochs": 100, "updates": updates,
            "validation_freq": updates, "logging_freq": 10, "overwrite": True, "print_valid_sents": [],
            "early_stopping_metric": "ppl", "scheduling": "exponential", "decrease_factor": 1.0,
        },
        "model": {
            "initializer": "xavier_uniform",
            "encoder": {**part, "hidden_size": 96, "bidirectional": True, "embeddings": dict(embeddings)},
            "decoder": {
                **part, "hidden_size": 96, "hidden_dropout": 0.1, "input_feeding": True, "init_hidden": "bridge",
                "attention": "bahdanau", "embeddings": dict(embeddings),
            },
        },
    }  # fmt: skip


def merged(settings: dict, changes: dict) -> dict:
    settings = copy.deepcopy(settings)
    for name, value in changes.items():
        settings[name] = merged(settings[name], value) if isinstance(value, dict) else value
    return settings


def learn_pieces(kind: str, text: Path, output: Path) -> dict:
    """Codes or a model of the text; the options by which JoeyNMT finds them."""
    if kind == "sentencepiece":
        import sentencepiece

        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=str(output), vocab_size=PIECES, hard_vocab_limit=False
        )
        return {"model_file": f"{output}.model"}
    from subword_nmt.learn_bpe import learn_bpe

    with text.open(encoding="utf-8") as lines, output.with_suffix(".codes").open("w", encoding="utf-8") as codes:
        learn_bpe(lines, codes, PIECES)
    return {"codes": f"{output}.codes"}


def decode(config: dict, **changes: object) -> dict:
    """The tokens of every hypothesis and its log-probability (divided by the length penalty if there is one)."""
    from joeynmt.config import parse_global_args
    from joeynmt.prediction import predict, prepare

    config = merged(config, {"testing": {"return_prob": "hyp", **changes}})
    arguments = parse_global_args(config, rank=0, mode="test")
    model, _, _, data = prepare(arguments, rank=0, mode="test")
    result = predict(model=model, data=data, device=arguments.device, n_gpu=0, args=arguments.test,
                     autocast=arguments.autocast)  # fmt: skip
    _, _, texts, tokens, scores, _ = result
    # Greedy scores are the tokens', also of what comes after the end.
    sums = [float(sum(row[: len(hypothesis)])) for row, hypothesis in zip(scores, tokens, strict=True)]
    return {"texts": texts, "tokens": tokens, "scores": sums}


def score(config: dict) -> tuple[list, list, list]:
    """Ids of all test sentences, and the scores of the first targets' words and `</s>`, [T, V]."""
    import torch
    from joeynmt.config import parse_global_args
    from joeynmt.prediction import prepare

    model, _, _, data = prepare(parse_global_args(config, rank=0, mode="test"), rank=0, mode="test")
    model.eval().double()  # so that float32's rounding, which is as large as 1e-5, is not compared
    ids = []
    for lang, vocabulary, bos in (("src", model.src_vocab, False), ("tgt", model.trg_vocab, True)):
        rows = data.get_list(lang=lang, tokenized=True)
        ids.append([vocabulary.sentences_to_ids([row], bos=bos, eos=True)[0][0] for row in rows])
    logits = []
    for source, target in list(zip(*ids, strict=True))[:SCORED]:
        source = torch.tensor([source])
        with torch.no_grad():
            out, _, _, _ = model._encode_decode(
                src=source,
                trg_input=torch.tensor([target[:-1]]),
                src_mask=torch.ones(1, 1, source.size(1), dtype=torch.bool),
                src_length=torch.tensor([source.size(1)]),
            )
        logits.append(out[0].clone())
    return (*ids, logits)


def main() -> None:
    parser = arguments(__doc__, CONFIGURATIONS, "updates")
    options = parser.parse_args()
    folder = options.output.absolute()
    folder.mkdir(parents=True)
    text = read(options)
    text.write(folder)

    import torch
    import yaml
    from joeynmt.__main__ import main as joeynmt

    torch.set_num_threads(1)
    config = merged(base(folder, options.updates), CONFIGURATIONS[options.configuration])
    for side, name in (("src", "src"), ("trg", "tgt")):
        if config["data"][side]["level"] == "bpe":
            kind = config["data"][side]["tokenizer_type"]
            found = learn_pieces(kind, folder / f"train.{name}", folder / f"pieces_{name}")
            config["data"][side]["tokenizer_cfg"] = found
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    sys.argv = ["joeynmt", "train", str(folder / "config.yaml"), "--skip-test"]
    joeynmt()

    source_ids, target_ids, logits = score(config)
    outputs = {
        "sources": text.test_source,
        "targets": text.test_target,
        "source_ids": source_ids,
        "target_ids": target_ids,
        "greedy": decode(config, beam_size=1),
        "beam": decode(config, beam_alpha=-1.0),
        "beam_alpha": decode(config),
    }
    (folder / "outputs.json").write_text(json.dumps(outputs, ensure_ascii=False), encoding="utf-8")
    torch.save(logits, folder / "logits.pt")


if __name__ == "__main__":
    main()
