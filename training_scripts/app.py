"""A page for a saved model: type a text, see its outputs with scores, where the model looked, what else it considered.

    python app.py outputs/g2p
    python app.py your-name/my-g2p --trust_remote_code --examples words.txt --share

It also is an app.py for a Hugging Face Space, which needs no package but gradio, torch and transformers: the Space's
variables MODEL, EXAMPLES and TRUST_REMOTE_CODE (1) stand for the arguments.

Beside the page there is `/generate` for programs:

    >>> from gradio_client import Client
    >>> Client("http://127.0.0.1:7860").predict(["cat"], num_beams=5, num_return_sequences=2, api_name="/generate")
    [[{"generated_text": "K AE T", "score": -0.01, "log_probability": -0.04}, ...]]
"""

import argparse
import contextlib
import math
import os
import unicodedata
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
from transformers import Pipeline, PreTrainedTokenizerBase, pipeline

with contextlib.suppress(ImportError):  # without it, the code comes with the model
    import hf_rnn_seq2seq  # noqa: F401  # registers the pipeline

if TYPE_CHECKING:
    from hf_rnn_seq2seq.pipeline_rnn_seq2seq import Hypothesis

ALTERNATIVES = 5  # shown for each token
WIDEST = 10  # beams and outputs
BATCH_SIZE = 32  # of requests to /generate
VISIBLE = {" ": "␣", "\t": "⇥", "\n": "↵", "\r": "↵"}  # a label should not look empty

CSS = """
#source textarea, #outputs label span, .example button { unicode-bidi: plaintext; text-align: start; }
#outputs .wrap { flex-direction: column; }
#outputs label { width: 100%; }
#outputs label span { white-space: pre-wrap; overflow-wrap: anywhere; }
.reading { line-height: 1.4; }
.reading h3 { margin: 1rem 0 0.4rem; font-size: 0.95rem; font-weight: 600; }
.reading p { margin: 0 0 0.3rem; color: var(--body-text-color-subdued); }
.reading .steps { position: relative; padding-bottom: calc(1.55rem * var(--rows) + 2.2rem); }
.reading .step { display: inline-block; margin: 0 0.15rem 0.35rem 0; padding: 0.15rem 0.5rem; cursor: pointer;
  border: 1px solid var(--border-color-primary); border-radius: 0.4rem;
  background: rgb(234 88 12 / calc(0.65 * var(--doubt))); }
.reading .step:hover, .reading .step:focus { outline: 2px solid var(--color-accent); }
.reading .hint, .reading .alternatives { position: absolute; inset-inline: 0; bottom: 0;
  height: calc(1.55rem * var(--rows) + 1.4rem); padding: 0.6rem 0.8rem; border-radius: 0.5rem;
  border: 1px dashed var(--border-color-primary); color: var(--body-text-color-subdued); }
.reading .alternatives { display: none; cursor: auto; overflow: hidden; border-style: solid;
  color: var(--body-text-color); background: var(--background-fill-secondary); }
.reading .step:focus .alternatives { display: block; z-index: 1; }
.reading .step:hover .alternatives { display: block; z-index: 2; }
.reading .alternative { display: grid; grid-template-columns: minmax(3rem, 30%) 1fr 4rem; gap: 0.6rem;
  align-items: center; height: 1.55rem; }
.reading .alternative.taken { font-weight: 700; }
.reading .name { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.reading .bar { height: 0.6rem; border-radius: 0.3rem; background: rgb(37 99 235 / 0.75); }
.reading .number { text-align: end; font-variant-numeric: tabular-nums; }
.reading .scroll { overflow: auto; max-height: 75vh; max-width: 100%; }
.reading table.map { border-collapse: separate; border-spacing: 1px; width: auto; margin: 0; border: 0; }
.reading table.map th { font-weight: 400; border: 0; white-space: nowrap;
  background: var(--background-fill-primary); }
.reading table.map thead th { position: sticky; top: 0; padding: 0.2rem 0; vertical-align: bottom;
  text-align: center; }
.reading table.map tbody th { position: sticky; inset-inline-start: 0; padding: 0 0.4rem; text-align: end; }
.reading table.map td { min-width: 1.7rem; width: 1.7rem; height: 1.7rem; padding: 0; border: 0; border-radius: 3px;
  background: color-mix(in srgb, rgb(37 99 235) calc(100% * var(--w)), var(--background-fill-secondary)); }
.reading table.map .long bdi { writing-mode: vertical-rl; }
"""


def direction(text: str) -> str:
    """`rtl` or `ltr`, as HTML's `dir="auto"` finds it: by the first character with a direction of its own."""
    for char in text:
        if (kind := unicodedata.bidirectional(char)) in ("L", "R", "AL"):
            return "ltr" if kind == "L" else "rtl"
    return "ltr"


def shown(token: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A token as a reader knows it: bytes as characters, spaces and lone combining marks made visible."""
    text = tokenizer.convert_tokens_to_string([token])
    if not text or "\ufffd" in text:  # nothing, or part of a character, by itself
        text = token
    text = "".join(VISIBLE.get(char, char) for char in text)
    return "◌" + text if unicodedata.category(text[0]).startswith("M") else text


def choices(hypotheses: "list[Hypothesis]") -> list[tuple[str, int]]:
    """Labels for the outputs, with probability and score, each with its number."""
    # Isolates: a text from right to left must not carry its figures with it.
    return [
        (f"\u2068{one['generated_text']}\u2069  ·  {percent(math.exp(log_probability))}  ·  {one['score']:.3f}", index)
        for index, one in enumerate(hypotheses)
        if (log_probability := one["log_probability"]) is not None
    ]


def percent(probability: float) -> str:
    return "< 0.01\u00a0%" if probability < 1e-4 else f"{100 * probability:.3g}\u00a0%"


def steps_html(hypothesis: "Hypothesis", tokenizer: PreTrainedTokenizerBase) -> str:
    """The output's tokens, the redder the less sure, each with the likeliest alternatives on hover, focus or tap."""
    steps = []
    taken = zip(hypothesis["target_tokens"], hypothesis["token_log_probabilities"], strict=True)
    for (token, log_probability), alternatives in zip(taken, hypothesis["alternatives"], strict=True):
        rows = [*alternatives]
        if token not in dict(rows):  # beam search may take what is less likely at first
            rows[-1] = (token, math.exp(log_probability))
        lines = "".join(
            f'<span class="alternative{" taken" if other == token else ""}">'
            f'<span class="name"><bdi>{escape(shown(other, tokenizer))}</bdi></span>'
            f'<span><span class="bar" style="display: block; width: {100 * probability:.1f}%"></span></span>'
            f'<span class="number"><bdi dir="ltr">{percent(probability)}</bdi></span></span>'
            for other, probability in rows
        )
        steps.append(
            f'<span class="step" tabindex="0" style="--doubt: {1 - math.exp(log_probability):.3f}">'
            f'<bdi>{escape(shown(token, tokenizer))}</bdi><span class="alternatives">{lines}</span></span>'
        )
    return (
        f'<h3>Step by step</h3><div class="steps" dir="{direction(hypothesis["generated_text"])}" '
        f'style="--rows: {ALTERNATIVES}">{"".join(steps)}'
        '<div class="hint" dir="ltr">Point at a token, or tap it, to see what else was likely in its place. '
        "Red ones were doubtful.</div></div>"
    )


def attention_html(hypothesis: "Hypothesis", tokenizer: PreTrainedTokenizerBase) -> str:
    """The heat map: a row for each token of the output, a column for each of the source, the largest the darkest."""
    side = getattr(tokenizer, "source_tokenizer", tokenizer)
    columns = [shown(token, side) for token in hypothesis["source_tokens"]]
    rows = [shown(token, tokenizer) for token in hypothesis["target_tokens"]]
    darkest = hypothesis["attention"].max().item() or 1.0
    head = "".join(f'<th class="{"long" if len(name) > 3 else ""}"><bdi>{escape(name)}</bdi></th>' for name in columns)
    body = "".join(
        f'<tr><th scope="row"><bdi>{escape(row)}</bdi></th>'
        + "".join(
            f'<td style="--w: {weight / darkest:.3f}" title="{escape(f"{row} ← {column}: {weight:.3f}")}"></td>'
            for column, weight in zip(columns, weights, strict=True)
        )
        + "</tr>"
        for row, weights in zip(rows, hypothesis["attention"].tolist(), strict=True)
    )
    return (
        f'<h3>Attention</h3><p>From 0 to {darkest:.2f}</p><div class="scroll" tabindex="0">'
        f'<table class="map" dir="{direction("".join(columns))}"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def reading_html(hypotheses: "list[Hypothesis]", index: int | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """All about one of the outputs."""
    if index is None or not hypotheses:
        return ""
    hypothesis = hypotheses[index]
    has_attention = "attention" in hypothesis
    attention = attention_html(hypothesis, tokenizer) if has_attention else "<p>This model has no attention.</p>"
    return f'<div class="reading">{steps_html(hypothesis, tokenizer)}{attention}</div>'


def build(pipe: Pipeline, title: str, examples: list[str]) -> gr.Blocks:
    """The page and its endpoint `/generate`.

    Args:
        pipe: `pipeline("rnn-text2text", ...)`.
        title: what stands above.
        examples: texts to click on.
    """
    tokenizer = pipe.tokenizer
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    attends = getattr(pipe.model.config, "attention_type", "none") != "none"

    def run(text: str, num_beams: float, num_return_sequences: float) -> tuple[Any, ...]:
        if not text.strip():
            raise gr.Error("There is no text to start from.", print_exception=False)
        beams = int(num_beams)
        try:
            hypotheses = pipe(
                text,
                num_beams=beams,
                num_return_sequences=min(int(num_return_sequences), beams),
                return_scores=True,
                return_alignments=attends,
                num_alternatives=ALTERNATIVES,
                truncation=True,
            )
        except ValueError as error:
            raise gr.Error(str(error)) from error
        return hypotheses, gr.Radio(choices(hypotheses), value=0, visible=True), reading_html(hypotheses, 0, tokenizer)

    def show(hypotheses: list[Any], index: int | None) -> str:
        return reading_html(hypotheses, index, tokenizer)

    def generate(
        texts: list[str], num_beams: int = 1, num_return_sequences: int = 1
    ) -> list[list[dict[str, str | float | None]]]:
        """For each text its outputs, best first: generated_text, score, log_probability."""
        try:
            found = pipe(
                list(texts),
                num_beams=num_beams,
                num_return_sequences=num_return_sequences,
                return_scores=True,
                truncation=True,
                batch_size=BATCH_SIZE,
            )
        except (TypeError, ValueError) as error:
            raise gr.Error(str(error), print_exception=False) from error
        names = ("generated_text", "score", "log_probability")
        return [[{name: one[name] for name in names} for one in hypotheses] for hypotheses in found]

    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.Markdown(f"# {title}")
        kept = gr.State([])
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                source = gr.Textbox(label="Source", lines=1, max_lines=8, elem_id="source", autofocus=True)
                with gr.Row():
                    beams = gr.Slider(1, WIDEST, value=5, step=1, label="Beam width", min_width=130)
                    count = gr.Slider(1, WIDEST, value=3, step=1, label="Outputs (≤ beams)", min_width=130)
                button = gr.Button("Generate", variant="primary", elem_id="generate")
                if examples:
                    gr.Examples([[example] for example in examples], source, elem_id="examples")
            with gr.Column(scale=3, min_width=300):
                outputs = gr.Radio(
                    [], label="Outputs, their probabilities and scores", type="value", visible=False, elem_id="outputs"
                )
                reading = gr.HTML(elem_id="reading")
        # One at a time: a fast tokenizer can't be used by two threads.
        one: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
        gr.on(
            [button.click, source.submit], run, [source, beams, count], [kept, outputs, reading], api_name="run",
            api_visibility="private", **one,
        )  # fmt: skip
        outputs.input(show, [kept, outputs], reading, api_visibility="private")
        gr.api(generate, api_name="generate", **one)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=os.environ.get("MODEL"), help="a folder, or a name on the Hub")
    parser.add_argument("--examples", default=os.environ.get("EXAMPLES"), help="UTF-8 text, one source a line")
    parser.add_argument(
        "--share", action="store_true", help="a public address, for three days, through gradio's servers"
    )
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        default=os.environ.get("TRUST_REMOTE_CODE") == "1",
        help="run code that comes with the model",
    )
    args = parser.parse_args()
    if not args.model:
        parser.error("name a model, here or in the environment variable MODEL")
    examples = []
    if args.examples:
        try:
            examples = Path(args.examples).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"--examples {args.examples}: {error}")
    pipe = pipeline("rnn-text2text", model=args.model, trust_remote_code=args.trust_remote_code)  # type: ignore[call-overload]  # transformers' own tasks
    page = build(pipe, Path(args.model).name, [line.strip() for line in examples if line.strip()])
    page.launch(share=args.share, css=CSS)


if __name__ == "__main__":
    main()
