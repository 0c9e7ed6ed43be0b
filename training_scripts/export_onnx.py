"""Export a saved model to ONNX:

    python training_scripts/export_onnx.py outputs/mine outputs/mine_onnx --int8

writes a folder that `RnnSeq2SeqOnnx.from_pretrained` loads, and that its own `onnx_runner.py` runs where there are
only numpy, onnxruntime and tokenizers:

    echo recurrent | python outputs/mine_onnx/onnx_runner.py outputs/mine_onnx
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import hf_rnn_seq2seq  # noqa: F401  # registers the model with the Auto classes
from hf_rnn_seq2seq.onnx_export import export_onnx, largest_error
from hf_rnn_seq2seq.onnx_runner import DECODER, ENCODER, Precision, file_name


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model_name_or_path", help="A saved model with its tokenizer, or a name on the Hub.")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--int8", action="store_true", help="Also with weights of 8 bits, in files of their own.")
    parser.add_argument("--trust_remote_code", action="store_true")
    args = parser.parse_args(argv)

    loading = {"trust_remote_code": args.trust_remote_code}
    try:
        model = AutoModelForSeq2SeqLM.from_pretrained(args.model_name_or_path, **loading)
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, **loading)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{args.model_name_or_path}: {error}") from error
    precisions: tuple[Precision, ...] = ("float32", "int8") if args.int8 else ("float32",)
    export_onnx(model, args.output_dir, tokenizer=tokenizer, precisions=precisions)
    for precision in precisions:
        paths = [args.output_dir / file_name(graph, precision) for graph in (ENCODER, DECODER)]
        size = sum(path.stat().st_size for one in paths for path in one.parent.glob(f"{one.name}*"))
        error = largest_error(model, args.output_dir, precision)
        print(f"{precision}: {size / 2**20:.1f} MB, largest difference from the model {error:.1e}")


if __name__ == "__main__":
    main()
