"""Generate with a saved sequence-to-sequence model for every line of a text file or of standard input.

    python run_generate.py --model_name_or_path outputs/g2p --input_file words.txt --num_beams 5
    zcat big.gz | python run_generate.py --model_name_or_path outputs/en-de --output_format jsonl > out.jsonl
    python run_generate.py --model_name_or_path outputs/lstm outputs/gru --replace_unknown --dictionary de-en.tsv

Several models, which must have been made with the same tokenizer, generate as an ensemble.

Every input line gives `num_return_sequences` lines of text (one, unless asked otherwise), empty ones for a blank line,
so that input and output stay aligned. With `--output_format jsonl` it gives one JSON object instead:

    {"source": "cat", "predictions": [{"text": "K AE T", "score": -0.02, "log_probability": -0.08}]}

best first under beam search. `log_probability` is the model's own, natural, of all tokens up to and with the end of
sequence, whatever sampling or penalties chose them; `score` is log_probability / number of tokens ** length_penalty,
or what takes its place with GNMT's penalties, by which beam search ranks (but a diversity penalty is left out). For
blank lines both are null.
"""

import gzip
import itertools
import json
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, cast

import torch
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

import hf_rnn_seq2seq  # noqa: F401  # registers the model with the Auto classes
from hf_rnn_seq2seq.beam_options import OPTIONS, take_options
from hf_rnn_seq2seq.ensemble import ENSEMBLE_FILE, Average, RnnSeq2SeqEnsemble
from hf_rnn_seq2seq.generation_options import read_generation_options
from hf_rnn_seq2seq.pipeline_rnn_seq2seq import MAX_NEW_TOKENS, read_sequences
from hf_rnn_seq2seq.unknown_words import read_dictionary, replace_unknown_words, tokenize_with_words

BEAM_OPTIONS = ("gnmt_length_penalty", "coverage_penalty", "num_beam_groups", "diversity_penalty")


@dataclass
class GenerateArguments:
    """Generation options that are not given keep the value in the model's generation_config.json."""

    model_name_or_path: list[str] = field(
        metadata={"help": "Folder of a saved model or ensemble, or a name on the Hub. Several models are an ensemble."}
    )
    ensemble_average: Average | None = field(
        default=None, metadata={"help": "What an ensemble averages; probabilities, unless a saved one says otherwise."}
    )
    input_file: str = field(
        default="-", metadata={"help": "UTF-8 text, one source a line, plain or .gz; - is standard input."}
    )
    output_file: str = field(default="-", metadata={"help": "Where to write; - is standard output."})
    output_format: Literal["text", "jsonl"] = field(default="text", metadata={"help": "jsonl has scores."})
    num_beams: int | None = field(default=None, metadata={"help": "Width of beam search; 1 is greedy search."})
    num_return_sequences: int | None = field(default=None, metadata={"help": "Outputs for each line (n-best)."})
    do_sample: bool = field(default=False, metadata={"help": "Sample instead of taking the likeliest."})
    temperature: float | None = field(default=None, metadata={"help": "Divides the logits before sampling."})
    top_k: int | None = field(default=None, metadata={"help": "Sample among the k likeliest tokens; 0 is all."})
    top_p: float | None = field(default=None, metadata={"help": "Sample among the likeliest with this much mass."})
    max_new_tokens: int | None = field(
        default=None, metadata={"help": f"Longest output in tokens; {MAX_NEW_TOKENS} where the model names no limit."}
    )
    length_penalty: float | None = field(
        default=None, metadata={"help": "Power of the length that divides a beam's log-probability; > 0 favours long."}
    )
    gnmt_length_penalty: float | None = field(
        default=None, metadata={"help": "GNMT's length penalty alpha, in place of length_penalty."}
    )
    coverage_penalty: float | None = field(
        default=None, metadata={"help": "GNMT's coverage penalty beta: favours beams that attend to the whole source."}
    )
    num_beam_groups: int | None = field(
        default=None, metadata={"help": "Groups of beams for diverse beam search; needs diversity_penalty."}
    )
    diversity_penalty: float | None = field(
        default=None, metadata={"help": "What a token loses for every beam of an earlier group that took it."}
    )
    force_words: list[str] = field(
        default_factory=list, metadata={"help": "Target words or phrases that every output must contain."}
    )
    generation_options: list[str] = field(
        default_factory=list,
        metadata={"help": "Any other fields of GenerationConfig as name=value, values in JSON: early_stopping=true"},
    )
    replace_unknown: bool = field(
        default=False, metadata={"help": "Put the most attended source word in place of each unknown word."}
    )
    dictionary: str | None = field(
        default=None,
        metadata={"help": "Translations of source words for replace_unknown: a line is word, tab, translation."},
    )
    batch_size: int = field(default=32, metadata={"help": "Lines generated for at once."})
    chunk_size: int = field(
        default=10_000,
        metadata={"help": "Lines read, sorted by length and written at once; 1 answers each line as it comes."},
    )
    device: str = field(
        default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Such as cpu, cuda or cuda:1."}
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = field(
        default="auto", metadata={"help": "Of the weights; auto is as they were saved."}
    )
    seed: int = field(default=42, metadata={"help": "For sampling."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


class Prediction(NamedTuple):
    """One generated text; see the module's docstring for the figures."""

    text: str
    score: float | None
    log_probability: float | None


def read_lines(path: str) -> Iterator[str]:
    """The lines of a UTF-8 file (gzip if it is named .gz) or of standard input (`-`), without their ends.

    Raises:
        SystemExit: no such file, not gzip, or not UTF-8; names the file and the line.
    """
    name = "standard input" if path == "-" else path
    number = 0
    try:
        with open(sys.stdin.fileno() if path == "-" else path, "rb", closefd=path != "-") as raw:
            file = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw
            for number, line in enumerate(file, 1):
                # Universal newlines would also split at a lone \r, and line counts would differ from other tools'.
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise SystemExit(f"{name}, line {number}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SystemExit(f"{name}: not a whole gzip file, after line {number}: {error}") from error
    except OSError as error:
        raise SystemExit(f"--input_file {path}: {error.strerror or error}") from error


def make_generation_config(args: GenerateArguments, model_config: GenerationConfig) -> GenerationConfig:
    """The model's generation configuration with what the arguments set.

    Raises:
        SystemExit: an option that doesn't exist, or a combination that has no effect or no meaning.
    """
    names = ["num_beams", "num_return_sequences", "temperature", "top_k", "top_p", "max_new_tokens", "length_penalty"]
    names += BEAM_OPTIONS
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.do_sample:
        options["do_sample"] = True
    try:
        options |= read_generation_options(args.generation_options, options)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    # The two limits exclude each other, and the one given now is the one that is meant.
    merged = {**model_config.to_dict(), **options}
    if "max_new_tokens" in options and "max_length" not in options:
        merged["max_length"] = None
    elif "max_length" in options and "max_new_tokens" not in options:
        merged["max_new_tokens"] = None
    elif merged.get("max_length") is None and merged.get("max_new_tokens") is None:
        merged["max_new_tokens"] = MAX_NEW_TOKENS

    beams, outputs = merged.get("num_beams") or 1, merged.get("num_return_sequences") or 1
    if not merged.get("do_sample"):
        if outputs > beams:
            raise SystemExit(
                f"--num_return_sequences {outputs} needs --num_beams {outputs} or more (not {beams}), or --do_sample: "
                "there are only as many different outputs as beams"
            )
        for name in ("temperature", "top_k", "top_p"):
            if name in options:
                raise SystemExit(f"--{name} {options[name]} needs --do_sample")
    for name in ("length_penalty", *OPTIONS):
        if name in options and beams == 1:
            raise SystemExit(f"--{name} {options[name]} needs --num_beams greater than 1")
    if args.force_words and beams == 1:
        raise SystemExit(f"--force_words {' '.join(args.force_words)} needs --num_beams greater than 1")
    # The two length penalties exclude each other, too.
    if "gnmt_length_penalty" in options:
        merged["length_penalty"] = options.get("length_penalty", 1.0)
    elif "length_penalty" in options:
        merged["gnmt_length_penalty"] = None
    try:
        config = GenerationConfig.from_dict(merged)
        if options.keys() & set(OPTIONS):  # what generate() would refuse later
            penalty = merged.get("length_penalty")
            defaults = {"num_beams": beams, "length_penalty": 1.0 if penalty is None else penalty}
            take_options(GenerationConfig.from_dict({**merged, **defaults}), {}, {})
    except (ValueError, TypeError) as error:
        raise SystemExit(f"generation options: {error}") from error
    return config


def force_words_ids(words: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The target's ids of each word or phrase.

    Raises:
        SystemExit: a word that the vocabulary lacks.
    """
    rows = [tokenizer(text_target=word, add_special_tokens=False)["input_ids"] for word in words]
    for word, row in zip(words, rows, strict=True):
        if not row or tokenizer.unk_token_id in row:
            raise SystemExit(f"--force_words {word}: not in the model's target vocabulary")
    return rows


@torch.inference_mode()
def generate_for(
    lines: list[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    with_scores: bool,
    dictionary: dict[str, str] | None,
    progress: tqdm,
) -> list[list[Prediction]]:
    """Predictions for each line, in the order of the lines, as many and as found as `model.generation_config` says.

    Args:
        dictionary: `None` leaves unknown words out; with any other, even an empty one, source words take their place.
    """
    config = model.generation_config
    outputs = config.num_return_sequences or 1
    predictions = [[Prediction("", None, None)] * outputs for _ in lines]
    ids = tokenizer(lines)["input_ids"] if lines else []
    # A line of white space may still encode to an end of sequence, for which a model would make something up.
    order = sorted((i for i, line in enumerate(lines) if line.strip() and ids[i]), key=lambda i: -len(ids[i]))
    progress.update(len(lines) - len(order))
    extra: dict[str, Any] = (
        {"tokenizer": tokenizer} if config.stop_strings else {}
    )  # generate() takes it for nothing else
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        sources = [lines[i] for i in batch]
        if dictionary is None:
            padded = tokenizer(sources, padding=True, return_tensors="pt")
        else:
            padded, words = tokenize_with_words(tokenizer, sources, padding=True, return_tensors="pt")
            extra["output_attentions"] = True
        names = [name for name in ("input_ids", "attention_mask", "copy_ids") if name in padded]
        inputs = {name: padded[name].to(model.device) for name in names}
        # Ids alone come faster.
        output = model.generate(**inputs, **extra, return_dict_in_generate=dictionary is not None)  # type: ignore[operator]  # declared nowhere
        if dictionary is None:
            sequences = output
            copied: dict[str, Any] = {"source_texts": sources} if "copy_ids" in inputs else {}
            texts = tokenizer.batch_decode(sequences, skip_special_tokens=True, **copied)
        else:
            sequences = output.sequences
            # A recurrent model and a fast tokenizer, or the words could not have been had.
            texts = replace_unknown_words(cast(Any, model), output, cast(Any, tokenizer), words, dictionary)
        scores: list[tuple[float | None, float | None]] = [(None, None)] * len(texts)
        if with_scores:
            reading = read_sequences(model, inputs, sequences, config.to_dict())
            scores = list(zip(reading.scores.tolist(), reading.log_probabilities.tolist(), strict=True))
        for row, i in enumerate(batch):
            rows = range(row * outputs, (row + 1) * outputs)
            predictions[i] = [Prediction(texts[k], *scores[k]) for k in rows]
        progress.update(len(batch))
    return predictions


def write_predictions(
    file: IO[str], lines: list[str], predictions: list[list[Prediction]], output_format: Literal["text", "jsonl"]
) -> None:
    for line, candidates in zip(lines, predictions, strict=True):
        if output_format == "jsonl":
            record = {"source": line, "predictions": [prediction._asdict() for prediction in candidates]}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        else:
            # A generated line break would put all that follows out of step.
            file.writelines(" ".join(prediction.text.splitlines()) + "\n" for prediction in candidates)
    file.flush()


def check_arguments(args: GenerateArguments) -> None:
    """
    Raises:
        SystemExit: something about the arguments can't work; found before the model is loaded.
    """
    for name in ("batch_size", "chunk_size", "num_beams", "num_return_sequences", "max_new_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise SystemExit(f"--{name} {value}: must be at least 1")
    if args.temperature is not None and args.temperature <= 0:
        raise SystemExit(f"--temperature {args.temperature}: must be greater than 0 (the likeliest: no --do_sample)")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise SystemExit(f"--top_p {args.top_p}: must be greater than 0 and at most 1")
    if args.dictionary is not None and not args.replace_unknown:
        raise SystemExit(f"--dictionary {args.dictionary} needs --replace_unknown")
    if args.input_file != "-" and not Path(args.input_file).is_file():
        raise SystemExit(f"--input_file {args.input_file}: no such file")
    if args.output_file != "-" and not Path(args.output_file).resolve().parent.is_dir():
        raise SystemExit(f"--output_file {args.output_file}: its folder doesn't exist")
    if (
        "-" not in (args.input_file, args.output_file)
        and Path(args.output_file).resolve() == Path(args.input_file).resolve()
    ):
        raise SystemExit(f"--output_file {args.output_file}: is the input file, which would be overwritten")


def load(args: GenerateArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model or ensemble, and its tokenizer.

    Raises:
        SystemExit: they can't be loaded, or don't go together.
    """
    names = args.model_name_or_path
    several = len(names) > 1 or (Path(names[0]) / ENSEMBLE_FILE).is_file()
    if args.ensemble_average is not None and not several:
        raise SystemExit(f"--ensemble_average {args.ensemble_average} needs several models")
    loading: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
    try:
        tokenizers = [AutoTokenizer.from_pretrained(name, **loading) for name in names]
        sides = [(one.get_vocab(), getattr(one, "source_tokenizer", one).get_vocab()) for one in tokenizers]
        for name, side in zip(names, sides, strict=True):
            if side != sides[0]:
                raise ValueError(f"the vocabulary of {name} is another one than that of {names[0]}")
        loading["dtype"] = args.dtype
        model: PreTrainedModel
        if several:
            ensemble = names if len(names) > 1 else names[0]
            model = RnnSeq2SeqEnsemble.from_pretrained(ensemble, args.ensemble_average, **loading)
        else:
            model = AutoModelForSeq2SeqLM.from_pretrained(names[0], **loading)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--model_name_or_path {' '.join(names)}: {error}") from error
    for option in ("replace_unknown", "coverage_penalty"):
        if getattr(args, option) and getattr(model.config, "attention_type", "none") == "none":
            raise SystemExit(f"--{option} needs a recurrent model with attention")
    if args.replace_unknown and model.config.head_type == "pointer_generator":
        raise SystemExit("--replace_unknown: this model (`head_type`='pointer_generator') copies words by itself")
    return model, tokenizers[0]


def main() -> None:
    parser = HfArgumentParser(GenerateArguments)  # type: ignore[arg-type]  # its annotation asks for instances
    (args,) = parser.parse_args_into_dataclasses()
    check_arguments(args)
    set_seed(args.seed)
    show_progress = sys.stderr.isatty()
    if not show_progress:
        disable_progress_bar()  # of loading
    try:
        dictionary = {} if args.dictionary is None else read_dictionary(args.dictionary)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--dictionary: {error}") from error
    model, tokenizer = load(args)
    model = model.to(args.device).eval()
    # Put into its place, since generate() fills what a configuration handed to it leaves open from the model's.
    model.generation_config = make_generation_config(args, model.generation_config)
    if args.force_words:
        model.generation_config.force_words_ids = force_words_ids(args.force_words, tokenizer)

    count_lines = show_progress and args.input_file != "-"
    total = sum(1 for _ in read_lines(args.input_file)) if count_lines else None
    # Standard output by number, for UTF-8 and unchanged line ends whatever the locale.
    target = sys.stdout.fileno() if args.output_file == "-" else args.output_file
    with (
        model.packed(),  # type: ignore[operator]  # declared nowhere, as generate()
        open(target, "w", encoding="utf-8", newline="\n", closefd=args.output_file != "-") as output,
        tqdm(total=total, unit=" lines", file=sys.stderr, disable=not show_progress) as progress,
    ):
        lines = read_lines(args.input_file)
        while chunk := list(itertools.islice(lines, args.chunk_size)):
            predictions = generate_for(
                chunk,
                model,
                tokenizer,
                batch_size=args.batch_size,
                with_scores=args.output_format == "jsonl",
                dictionary=dictionary if args.replace_unknown else None,
                progress=progress,
            )
            write_predictions(output, chunk, predictions, args.output_format)


if __name__ == "__main__":
    main()
