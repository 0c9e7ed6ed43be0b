"""Jobs of benchmark.py for this package."""

import contextlib
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from serve import Batch, padded, serve, timed_updates
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import hf_rnn_seq2seq.decoder
from hf_rnn_seq2seq import RnnSeq2SeqConfig, RnnSeq2SeqForConditionalGeneration, screening
from hf_rnn_seq2seq.host_memory import keep_for_training
from hf_rnn_seq2seq.int8 import Int8Linear, RnnSeq2SeqInt8Config
from hf_rnn_seq2seq.matmul_precision import recommended_precision
from hf_rnn_seq2seq.step_products import LoopWeight, linear, packed_weights, shared_by_steps

PAD, START, END = 0, 1, 2
models: dict[str, Any] = {}
products_made: dict[tuple[str, int, int, int], list[tuple[torch.Tensor, int]]] = {}
folders: list[tempfile.TemporaryDirectory[str]] = []  # of exports, for as long as this process runs


def make(name: str, compile: bool = False, bf16: bool = False, plain: bool = False, **config: Any) -> int:
    """A model with first weights and its optimizer, as RnnSeq2SeqTrainer has them; the number of its parameters."""
    keep_for_training()
    model = RnnSeq2SeqForConditionalGeneration(RnnSeq2SeqConfig(**config)).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    models[name] = (torch.compile(model) if compile else model, optimizer, bf16, plain)
    return model.num_parameters()


def train(name: str, batches: list[Batch], precision: str) -> float:
    model, optimizer, bf16, plain = models[name]

    def update(batch: Batch) -> None:
        source = padded(batch["source"], PAD)
        labels = padded([[*row, END] for row in batch["target"]], -100)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = model(input_ids=source, attention_mask=(source != PAD).long(), labels=labels, skip_logits=True)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    shared = hf_rnn_seq2seq.decoder.shared_by_steps
    if plain:
        hf_rnn_seq2seq.decoder.shared_by_steps = lambda active=True: contextlib.nullcontext()
    try:
        return timed_updates(update, batches, precision)
    finally:
        hf_rnn_seq2seq.decoder.shared_by_steps = shared


def recommended(rows: int, width: int) -> str:
    """The precision of float32 products that training takes by default here."""
    return recommended_precision(rows, width)


def limit(
    batches: list[Batch],
    precision: str,
    source_vocab: int,
    target_vocab: int,
    hidden: int,
    embedding: int,
    parameters: int = 0,
    bf16: bool = False,
) -> float:
    """
    Seconds of nothing but the matrix products of these updates: additive attention, input feeding, one layer; with the
    number of the model's `parameters` also of cross entropy and Adam, in float32 either way.
    """
    torch.set_float32_matmul_precision(precision)
    seconds: list[float] = []
    dtype = torch.bfloat16 if bf16 else torch.float32

    def timed(work: Callable[[], object]) -> None:
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)

    def products(rows: int, inputs: int, outputs: int, steps: int = 1) -> None:
        """Forward, and backward to the input, step by step; backward to the weight for all steps."""
        x, grad, w = (torch.randn(size, dtype=dtype) for size in ((rows, inputs), (rows, outputs), (outputs, inputs)))
        all_x, all_grads = x.repeat(steps, 1), grad.repeat(steps, 1)
        timed(lambda: [torch.nn.functional.linear(x, w) for _ in range(steps)])
        timed(lambda: [grad @ w for _ in range(steps)])
        timed(lambda: all_grads.t() @ all_x)

    def cross_entropy(rows: int, words: int) -> None:
        scores, labels = torch.randn(rows, words, requires_grad=True), torch.randint(words, (rows,))
        timed(lambda: torch.nn.functional.cross_entropy(scores, labels).backward())

    weights = torch.zeros(parameters, requires_grad=True)
    weights.grad = torch.ones(parameters)
    adam = torch.optim.Adam([weights], 1e-3, fused=True)
    adam.step()  # makes room for the moments
    for batch in batches:
        rows = len(batch["source"])
        s, t = (max(len(row) for row in batch[side]) for side in ("source", "target"))
        t += 1
        products(rows * s, embedding, 4 * hidden)  # the encoder's input gates, both directions
        products(rows, hidden // 2, 2 * hidden, 2 * s)  # its recurrence
        products(rows * s, hidden, hidden)  # keys
        products(rows * t, embedding, 4 * hidden)  # the decoder's input gates, the embedding's part
        products(rows, 2 * hidden, 4 * hidden, t)  # its recurrence and feeding
        products(rows, hidden, hidden, t)  # queries
        products(rows, 2 * hidden, hidden, t)  # features
        products(rows * t, hidden, target_vocab)  # scores
        if parameters:
            cross_entropy(rows * t, target_vocab)
            timed(adam.step)
    return sum(seconds)


def load(
    name: str,
    folder: str,
    dtype: str = "float32",
    int8: bool = False,
    packed: bool = False,
    onnx: str | None = None,
    times: int = 1,
) -> int:
    """
    The number of bytes of its weights. `packed`: matrices are packed once for all batches, not by each call. `onnx`:
    the precision of an export that ONNX Runtime computes. `times`: the target vocabulary becomes so many times as
    large, by words that look like its own and are hardly ever chosen.
    """
    if onnx is not None:
        return load_exported(name, folder, onnx)
    extra: dict[str, Any] = {}
    if int8:
        extra["quantization_config"] = RnnSeq2SeqInt8Config()
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=getattr(torch, dtype), **extra).eval()
    if times > 1:
        words = model.config.vocab_size
        model.resize_token_embeddings(times * words, mean_resizing=False)
        output, generator = model.get_output_embeddings(), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for copy in range(1, times):
                order, place = torch.randperm(words, generator=generator), slice(copy * words, (copy + 1) * words)
                noise = torch.randn(output.weight[:words].shape, generator=generator) * output.weight.std()
                output.weight[place] = output.weight[order] + 0.1 * noise
                output.bias[place] = output.bias[order] - 8
    models[name] = (model, AutoTokenizer.from_pretrained(folder), packed)
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def load_exported(name: str, folder: str, precision: str) -> int:
    """The number of bytes of the files."""
    from hf_rnn_seq2seq.onnx_export import export_onnx
    from hf_rnn_seq2seq.onnx_model import RnnSeq2SeqOnnx

    place = tempfile.TemporaryDirectory()
    folders.append(place)  # graphs are loaded when they are first used
    export_onnx(AutoModelForSeq2SeqLM.from_pretrained(folder), place.name, precisions=(precision,))
    model = RnnSeq2SeqOnnx.from_pretrained(place.name, precision, threads=torch.get_num_threads())
    models[name] = (model, AutoTokenizer.from_pretrained(folder), False)
    return sum(path.stat().st_size for path in Path(place.name).glob("*.onnx*"))


def decode(
    name: str, sentences: list[str], batch_size: int, beams: int, max_length: int = 60, screens: bool = True
) -> dict[str, Any]:
    """
    Seconds and outputs; batches in the order of the sentences' lengths, outputs in the order given. Without `screens`
    exact scores are made of all words.
    """
    model, tokenizer, packed = models[name]
    start = time.perf_counter()
    order = sorted(range(len(sentences)), key=lambda index: -len(sentences[index].split()))
    outputs = [""] * len(sentences)
    worth = screening.WORTH_SCREENING if screens else 2**62
    with (
        torch.inference_mode(),
        model.packed() if packed else contextlib.nullcontext(),
        mock.patch.object(screening, "WORTH_SCREENING", worth),
    ):
        for first in range(0, len(order), batch_size):
            indices = order[first : first + batch_size]
            batch = tokenizer([sentences[index] for index in indices], return_tensors="pt", padding=True)
            ids = model.generate(**batch, num_beams=beams, do_sample=False, max_new_tokens=max_length)
            for index, text in zip(indices, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
                outputs[index] = text
    return {"seconds": time.perf_counter() - start, "outputs": outputs}


def decoding_limit(name: str, sentences: list[str], batch_size: int, beams: int, precision: str) -> float:
    """
    Seconds of nothing but the matrix products that the decoder's steps make in `decode` of a float32 model, with exact
    scores of all words, each as fast as it is here: in float32, bfloat16 or int8, of made-up numbers.
    """
    key = (name, len(sentences), batch_size, beams)
    if key not in products_made:
        made = products_made[key] = []
        product = LoopWeight.product

        def noted(self: LoopWeight, x: torch.Tensor) -> torch.Tensor:
            made.append((self.original, x.numel() // x.size(-1)))
            return product(self, x)

        with mock.patch.object(LoopWeight, "product", noted):
            decode(name, sentences, batch_size, beams, screens=False)
    most: dict[torch.Tensor, int] = {}
    for weight, rows in products_made[key]:
        most[weight] = max(rows, most.get(weight, 0))
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    inputs = {weight: torch.randn(rows, weight.size(1)).to(dtype) for weight, rows in most.items()}
    if precision == "int8":
        makers: dict[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]] = {
            weight: Int8Linear(weight, None, loaded=True).eval() for weight in most
        }
    else:
        makers = {weight: partial(linear, weight=weight.detach().to(dtype)) for weight in most}
    with torch.inference_mode(), packed_weights(), shared_by_steps(packed=True):
        for weight, x in inputs.items():  # packs it
            makers[weight](x)
        start = time.perf_counter()
        for weight, rows in products_made[key]:
            makers[weight](inputs[weight][:rows])
        return time.perf_counter() - start


def peak_memory() -> float:
    """Of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    jobs = (make, train, recommended, limit, load, decode, decoding_limit, peak_memory)
    serve({job.__name__: job for job in jobs})
