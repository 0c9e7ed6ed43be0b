"""
Greedy and beam search as graphs of ONNX: a `Loop` around the graph of one decoder step, so that a search is one call
of ONNX Runtime, from any language.

What comes between two steps is written as functions of onnxscript, which are read as ONNX, never run as Python:
[`greedy_step`] and [`beam_step`]. Beam search is transformers' `GenerationMixin._beam_search`, step for step, with
OpenNMT-py's among its ways to end.

Shapes: B sources, N beams a source, rows R = B or B * N, K candidates a source, t tokens so far, T in the end, E ids
that end a sequence, S' what the decoder attends to, V vocabulary.
"""

# mypy: disable-error-code="no-untyped-def"

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import onnx
from onnx import TensorProto, helper
from onnx.inliner import inline_local_functions
from onnxscript import OnnxFunction, opset20, script
from onnxscript.values import Opset

from .onnx_runner import PAST, PRESENT
from .search_base import NEVER

INT64, FLOAT, BOOL = TensorProto.INT64, TensorProto.FLOAT, TensorProto.BOOL

REPEATED = "repeated_"  # for each beam, what a step reads for each source
ROW = 2**32  # a token and the row that it came from are one number, row * ROW + token
BLOCKED_WORDS = 1000  # from so many words on their best is found by blocks

# Both untyped, as are the arguments of the functions that are written with them.
op: Any = opset20
functions: Any = Opset("hf_rnn_seq2seq", 1)


@script(functions)
def first_columns(logits, width):
    """logits [R, V or more], width [1] -> [R, width]"""
    return op.Slice(logits, [0], width, [1])


@script(functions)
def best_of_blocks(logits, blocks):
    """
    ArgMax, four times as fast: ONNX Runtime finds a maximum with all of a processor's width, its place one by one.

    Args:
        logits: [B, V].
        blocks: 0, Q and M, where V = Q * M.

    Returns:
        the place of the first highest, [B, 1].
    """
    scores = op.Reshape(logits, blocks)  # [B, Q, M]
    block = op.ArgMax(op.ReduceMax(scores, [2], keepdims=0), axis=1, keepdims=1)
    place = op.ArgMax(op.GatherND(scores, block, batch_dims=1), axis=1, keepdims=1)
    return block * op.Slice(blocks, [2], [3]) + place


@script(functions)
def greedy_start(input_ids):
    """`going`, `score` and `wasted` for [`greedy_step`] before the first."""
    return op.CastLike(op.Expand(1, op.Shape(input_ids)), True), op.Expand(0.0, op.Shape(input_ids)), op.Identity(0.0)


@script(functions)
def greedy_step(logits, best, going, score, wasted, eos, pad, copy_steps, with_scores):
    """
    Args:
        logits: [B, V].
        best: the word with the highest of each, [B, 1].
        going: which sequences have not ended, [B, 1].
        score: log-probability of each so far, [B, 1].
        wasted: how many steps those that had ended were carried along, in all.
        eos: [E].
        pad, copy_steps, with_scores: scalars, see [`greedy_search`].

    Returns:
        the next tokens [B, 1]; `going`, `score` and `wasted` with them; and whether to go on, by the rule of
        `Ended.should_leave`.
    """
    if with_scores:
        added = op.GatherElements(op.LogSoftmax(logits, axis=-1), best, axis=-1)
    else:
        added = op.Expand(0.0, op.Shape(best))
    tokens = op.Where(going, best, pad)
    hits = op.ReduceSum(op.Cast(op.Equal(tokens, eos), to=FLOAT), [1], keepdims=1)
    still = op.And(going, hits == 0.0)
    running = op.ReduceSum(op.Cast(still, to=FLOAT), keepdims=0)
    ended = op.Cast(op.Size(still), to=FLOAT) - running
    now_wasted = wasted + ended
    leave = op.And(ended > 0.0, now_wasted >= copy_steps * running)
    more = op.And(running > 0.0, op.Not(leave))
    return tokens, still, score + op.Where(going, added, 0.0), now_wasted, more


@script(functions)
def greedy_end(tokens, score):
    """Every step's tokens [T, B, 1], the last `score` -> [B, T], [B]."""
    return op.Transpose(op.Squeeze(tokens, [2]), perm=[1, 0]), op.Squeeze(score, [1])


@script(functions)
def beam_start(input_ids, num_beams, max_new_tokens, length_penalty, early_stopping, eos):
    """
    Args:
        input_ids: [B, 1].
        num_beams, max_new_tokens, length_penalty, early_stopping, eos: as for [`beam_search`].

    Returns:
        of each row its source [B * N]; what [`beam_step`] carries on, before the first step; and what it reads in
        every step, in its order.
    """
    batch = op.Shape(input_ids, start=0, end=1)
    beams = op.Unsqueeze(num_beams, [0])
    some = op.Concat(op.Shape(eos) + 1, [2], axis=0)
    kept = op.ReduceMax(some, keepdims=1) * beams  # K, enough that N of them have not ended
    rows = batch * beams

    numbers = op.Range(0, op.Squeeze(rows), 1)
    sources = numbers / num_beams
    scores = op.Unsqueeze(op.Where(numbers == sources * num_beams, 0.0, NEVER), [1])  # all beams are alike: one counts
    history = op.Expand(0, op.Concat(rows, [0], axis=0))
    finished = op.Expand(0, op.Concat(batch, beams, [0], axis=0))
    unfinished_scores = op.Expand(NEVER, op.Concat(batch, beams, axis=0))
    is_finished = op.Expand(0.0, op.Concat(batch, beams, axis=0))
    is_open = op.Expand(1.0, op.Concat(batch, [1], axis=0))

    each_source = op.Unsqueeze(op.Range(0, op.Squeeze(batch), 1), [1])  # [B, 1]
    first_pooled = each_source * (beams + kept)
    by_source = op.Concat(batch, [-1], axis=0)
    by_candidate = op.Concat(batch * kept, [-1], axis=0)
    by_pooled = op.Concat(batch * (beams + kept), [-1], axis=0)
    among_best = op.Cast(op.Range(0, op.Squeeze(kept), 1) < num_beams, to=FLOAT)
    longest = op.Cast(max_new_tokens, to=FLOAT)
    to_the_end = op.And(early_stopping == 2, length_penalty > 0.0)
    when_full = op.Cast(early_stopping == 1, to=FLOAT)
    at_best_end = op.Cast(early_stopping == 3, to=FLOAT)
    left_out = op.And(among_best == 0.0, early_stopping == 3)
    return (
        sources, history, scores, finished, unfinished_scores, is_finished, is_open,
        beams, kept, each_source * beams, each_source * kept, first_pooled, by_source, by_candidate, by_pooled,
        among_best, left_out, longest, to_the_end, when_full, at_best_end,
    )  # fmt: skip


@script(functions)
def beam_step(
    logits, step_number, history, scores, finished, finished_scores, is_finished, is_open,
    beams, kept, first_row, first_candidate, first_pooled, by_source, by_candidate, by_pooled,
    among_best, left_out, longest, to_the_end, when_full, at_best_end,
    length_penalty, length_offset, length_scale, eos,
):  # fmt: skip
    """
    Args:
        logits: [B * N, V].
        step_number: 0, 1, ...
        history: of the running hypotheses, each token and the row that it came from in one number, [B * N, t].
        scores: their log-probabilities, [B * N, 1].
        finished: as `history`, of the best that have ended; -1 behind an end, [B, N, t].
        finished_scores: their log P / ((length + length_offset) / length_scale) ** length_penalty, [B, N].
        is_finished: which of them have ended, 0 or 1, [B, N].
        is_open: may more of a source's hypotheses end? 0 or 1, [B, 1]

        beams, kept: N and K, [1].
        first_row, first_candidate, first_pooled: of each source in lists of N, K and N + K a source, [B, 1].
        by_source, by_candidate, by_pooled: shapes with one row each of B, of B * K, of B * (N + K).
        among_best: 1 for the first N of K, 0 for the others, [K].
        left_out: which of K never go on, [K].
        longest: `max_new_tokens`.
        to_the_end: do we hope for the best length that is possible?
        when_full, at_best_end: 1 if a source is done when N hypotheses, or a step's best candidate, have ended.
        length_penalty, length_offset, length_scale: scalars.
        eos: [E].

    Returns:
        the next tokens [B * N, 1], the rows that they follow [B * N], all that is carried on (`history` to `is_open`),
        and whether any source goes on.
    """
    length = op.Cast(step_number + 1, to=FLOAT)
    words = op.Shape(logits, start=1, end=2)
    top_scores, top = op.TopK(op.Reshape(op.LogSoftmax(logits, axis=-1) + scores, by_source), kept)  # [B, K]
    parents = top / words
    tokens = top - parents * words
    rows = parents + first_row
    both = op.Unsqueeze(rows * ROW + tokens, [2])
    candidates = op.Concat(op.Gather(history, rows, axis=0), both, axis=2)  # [B, K, t + 1]
    hits = op.ReduceSum(op.Cast(op.Equal(op.Unsqueeze(tokens, [2]), eos), to=FLOAT), [2], keepdims=0)
    ended = op.Max(op.Min(hits, 1.0), op.Cast(length >= longest, to=FLOAT))  # `eos` may hold an id twice

    next_scores, chosen = op.TopK(op.Where(left_out, NEVER, top_scores) + ended * NEVER, beams)  # [B, N]
    chosen_rows = op.Reshape(chosen + first_candidate, [-1])
    next_history = op.Gather(op.Reshape(candidates, by_candidate), chosen_rows, axis=0)
    next_tokens = op.Reshape(op.GatherElements(tokens, chosen, axis=1), [-1, 1])
    next_rows = op.Reshape(op.GatherElements(rows, chosen, axis=1), [-1])

    counts = ended * among_best  # only what ends among the N best
    penalty = op.Pow((length + length_offset) / length_scale, length_penalty)
    done = top_scores / penalty + (1.0 - counts * is_open) * NEVER
    next_finished_scores, best = op.TopK(op.Concat(finished_scores, done, axis=1), beams)
    pooled = op.Concat(op.Pad(finished, [0, 0, 0, 0, 0, 1], -1), candidates, axis=1)
    next_finished = op.Gather(op.Reshape(pooled, by_pooled), best + first_pooled, axis=0)
    next_is_finished = op.GatherElements(op.Concat(is_finished, counts, axis=1), best, axis=1)

    # Could a running hypothesis still come before a source's worst finished one?
    best_length = (op.Where(to_the_end, longest, length) + length_offset) / length_scale
    hope = op.ReduceMax(next_scores, [1], keepdims=1) / op.Pow(best_length, length_penalty)
    worst = op.ReduceMin(next_finished_scores, [1], keepdims=1)
    full = op.ReduceMin(next_is_finished, [1], keepdims=1)
    better = op.Cast(hope > op.Where(full > 0.0, worst, op.Min(worst, NEVER)), to=FLOAT)
    is_done = full * when_full + op.Slice(ended, [0], [1], [1]) * at_best_end
    next_is_open = is_open * op.Max(better, at_best_end) * (1.0 - is_done)
    any_open = op.ReduceMax(next_is_open, keepdims=0) > 0.0
    more = op.And(any_open, op.ReduceMin(ended, keepdims=0) == 0.0)
    flat_scores = op.Reshape(next_scores, [-1, 1])
    return (
        next_tokens, next_rows, next_history, flat_scores, next_finished, next_finished_scores, next_is_finished,
        next_is_open, more,
    )  # fmt: skip


@script(functions)
def beam_end(finished):
    """[B, N, T] -> tokens and rows, -1 behind an end, both [B, N, T]."""
    rows = finished / ROW
    ended = finished < 0
    return op.Where(ended, -1, finished - rows * ROW), op.Where(ended, -1, rows)


FUNCTIONS: tuple[OnnxFunction, ...] = (
    first_columns, best_of_blocks, greedy_start, greedy_step, greedy_end, beam_start, beam_step, beam_end,
)  # fmt: skip


class Carried(NamedTuple):
    """What goes from one step to the next: its name before the loop, and in its body before and after a step."""

    start: str
    old: str
    new: str
    type: int


def greedy_search(step: onnx.ModelProto) -> onnx.ModelProto:
    """
    Inputs: the step's, of which `input_ids` [B, 1] are start tokens, and `max_new_tokens`, `eos_token_id` [E],
    `pad_token_id`, which follows an end, `copy_steps`, what it costs to copy a sequence, in its steps: when those that
    have ended were carried along for as long as it would take to copy the others, the search stops, so that they can
    be dropped and it goes on from the others' last tokens and state; `with_scores`; of a model that copies `width`
    [1], how many of its scores count.

    Outputs: `sequences` [B, T] without the start tokens, `scores` [B], their log-probabilities, or zeros not
    `with_scores`, which cost a tenth, the state behind the last step under its names there, and `attention`
    [T, B, heads, S'].
    """
    before = [call(greedy_start, ["input_ids"], ["start_going", "start_score", "start_wasted"])]
    logits, between = counting_logits(step)
    chosen = ["next_tokens", "next_going", "next_score", "next_wasted", "more"]
    read = [logits, "best", "going", "score", "wasted", "eos_token_id", "pad_token_id", "copy_steps", "with_scores"]
    between += [
        *best_words(step, logits),
        call(greedy_step, read, chosen),
        helper.make_node("Identity", ["next_tokens"], ["tokens"]),
    ]
    carried = [
        Carried("input_ids", "step_input_ids", "next_tokens", INT64),
        *(Carried(name, f"step_{name}", f"step_{new}", kind) for name, new, kind in states(step)),
        Carried("start_going", "going", "next_going", BOOL),
        Carried("start_score", "score", "next_score", FLOAT),
        Carried("start_wasted", "wasted", "next_wasted", FLOAT),
    ]
    after = [call(greedy_end, ["all_tokens", "end_score"], ["sequences", "scores"])]
    options = [
        value("eos_token_id", INT64, ["ends"]),
        value("pad_token_id", INT64, []),
        value("copy_steps", FLOAT, []),
        value("with_scores", BOOL, []),
    ]
    outputs = [value("sequences", INT64, ["batch", "length"]), value("scores", FLOAT, ["batch"])]
    after += [helper.make_node("Identity", [f"end_step_{name}"], [new]) for name, new, _ in states(step)]
    outputs += [one for one in step.graph.output if one.name.startswith(PRESENT)]
    return looped(step, before, between, carried, after, options, outputs, repeated="")


def beam_search(step: onnx.ModelProto) -> onnx.ModelProto:
    """
    Inputs: the step's, of which `input_ids` [B, 1] are start tokens, and `num_beams`, `max_new_tokens`, `eos_token_id`
    [E], `length_penalty`, `length_offset`, `length_scale`, `early_stopping`; of a model that copies `width` [1], how
    many of its scores count. A finished hypothesis of n tokens has the score
    log P / ((n + length_offset) / length_scale) ** length_penalty: with 0 and 1 that is transformers', with 5 and 6
    that of Wu et al. 2016, eq. 14. `early_stopping` is 0, 1 or 2 for transformers' False, True and "never", and 3 for
    OpenNMT-py's search (see `OpennmtSearch`).

    Outputs: `sequences` [B, N, T] without the start tokens, best first, -1 behind an end; `beam_indices` [B, N, T],
    for each token the row of the step that gave it; `sequences_scores` [B, N]; `attention` [T, B * N, heads, S'].
    """
    options = ["num_beams", "max_new_tokens", "length_penalty", "early_stopping", "eos_token_id"]
    names = ["history", "scores", "finished", "finished_scores", "is_finished", "is_open"]
    constants = [
        "beams", "kept", "first_row", "first_candidate", "first_pooled", "by_source", "by_candidate", "by_pooled",
        "among_best", "left_out", "longest", "to_the_end", "when_full", "at_best_end",
    ]  # fmt: skip
    started = ["sources", *(f"start_{name}" for name in names), *constants]
    before = [call(beam_start, ["input_ids", *options], started)]
    before += [helper.make_node("Gather", [one.name, "sources"], [REPEATED + one.name]) for one in step.graph.input]
    logits, between = counting_logits(step)
    results = ["next_tokens", "rows", *(f"next_{name}" for name in names), "more"]
    penalty = ["length_penalty", "length_offset", "length_scale"]
    read = [logits, "step_number", *names, *constants, *penalty, "eos_token_id"]
    between.append(call(beam_step, read, results))
    kinds = states(step)
    between += [helper.make_node("Gather", [f"step_{new}", "rows"], [f"next_{new}"]) for _, new, _ in kinds]
    carried = [
        Carried(f"{REPEATED}input_ids", "step_input_ids", "next_tokens", INT64),
        *(Carried(REPEATED + name, f"step_{name}", f"next_{new}", kind) for name, new, kind in kinds),
        *(
            Carried(f"start_{name}", name, f"next_{name}", INT64 if name in ("history", "finished") else FLOAT)
            for name in names
        ),
    ]
    after = [
        call(beam_end, ["end_finished"], ["sequences", "beam_indices"]),
        helper.make_node("Identity", ["end_finished_scores"], ["sequences_scores"]),
    ]
    inputs = [
        value("num_beams", INT64, []),
        *(value(name, FLOAT, []) for name in penalty),
        value("early_stopping", INT64, []),
        value("eos_token_id", INT64, ["ends"]),
    ]
    outputs = [
        value("sequences", INT64, ["batch", "beams", "length"]),
        value("beam_indices", INT64, ["batch", "beams", "length"]),
        value("sequences_scores", FLOAT, ["batch", "beams"]),
    ]
    return looped(step, before, between, carried, after, inputs, outputs, repeated=REPEATED)


def looped(
    step: onnx.ModelProto,
    before: Sequence[onnx.NodeProto],
    between: Sequence[onnx.NodeProto],
    carried: Sequence[Carried],
    after: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    repeated: str,
) -> onnx.ModelProto:
    """
    Args:
        step: the graph of one step; its weights become the search's.
        before: nodes in front of the loop.
        between: nodes behind each step. They make `more`, and what is carried; a step's tensors are `step_logits`, ...
        carried: what goes from step to step, at the end `end_*` of its name in the body. Tokens are among it.
        after: nodes behind the loop; `all_tokens` [T, B, 1] are there of a greedy search, `attention` of each.
        inputs: besides the step's and `max_new_tokens`.
        outputs: besides `attention`.
        repeated: what the names of the step's other inputs begin with in the loop.
    """
    graph = step.graph
    olds = {one.old for one in carried}
    # Its weights, and what all steps read, lie outside of the loop.
    outside = {one.name: one.name for one in graph.initializer} | {
        one.name: repeated + one.name for one in graph.input if f"step_{one.name}" not in olds
    }
    nodes = [renamed(node, outside) for node in graph.node]
    scanned = {"step_attention": "attention"}
    if any("tokens" in node.output for node in between):
        scanned["tokens"] = "all_tokens"
    body = helper.make_graph(
        [*nodes, *between],
        "step",
        [value("step_number", INT64, []), value("go_on", BOOL, []), *(value(one.old, one.type) for one in carried)],
        [
            value("more", BOOL, []),
            *(value(one.new, one.type) for one in carried),
            *(value(name, FLOAT if name == "step_attention" else INT64) for name in scanned),
        ],
    )
    loop = helper.make_node(
        "Loop",
        ["max_new_tokens", "", *(one.start for one in carried)],
        [*(f"end_{one.old}" for one in carried), *scanned.values()],
        body=body,
    )
    attention = next(one for one in graph.output if one.name == "attention")
    shape = [dim.dim_param or dim.dim_value for dim in attention.type.tensor_type.shape.dim]
    width = [value("width", INT64, [1])] if copies(step) else []
    search = helper.make_graph(
        [*before, loop, *after],
        "search",
        [*graph.input, value("max_new_tokens", INT64, []), *inputs, *width],
        [*outputs, value("attention", FLOAT, ["length", f"{repeated}{shape[0]}", *shape[1:]])],
        graph.initializer,
    )
    imports = {one.domain: one.version for one in step.opset_import} | {functions.domain: functions.version}
    model = helper.make_model(
        search,
        opset_imports=[helper.make_opsetid(*one) for one in imports.items()],
        ir_version=step.ir_version,
        functions=[*step.functions, *(one.to_function_proto() for one in FUNCTIONS)],
    )
    return inline_local_functions(model)


def call(function: OnnxFunction, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.NodeProto:
    return helper.make_node(function.name, inputs, outputs, domain=functions.domain)


def value(name: str, kind: int, shape: Sequence[int | str] | None = None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def states(step: onnx.ModelProto) -> list[tuple[str, str, int]]:
    """Of each tensor of the decoder's state its name before and after a step, and its type."""
    kinds = {one.name: one.type.tensor_type.elem_type for one in step.graph.input}
    return [(name, PRESENT + name.removeprefix(PAST), kinds[name]) for name in kinds if name.startswith(PAST)]


def copies(step: onnx.ModelProto) -> bool:
    return any(one.name == "copy_ids" for one in step.graph.input)


def counting_logits(step: onnx.ModelProto) -> tuple[str, list[onnx.NodeProto]]:
    """The step's scores as far as they count: their name in a loop's body, and the nodes that make them."""
    if not copies(step):
        return "step_logits", []
    return "logits", [call(first_columns, ["step_logits", "width"], ["logits"])]


def best_words(step: onnx.ModelProto, logits: str) -> list[onnx.NodeProto]:
    """The nodes that find the word with the highest of these scores, `best` [B, 1]."""
    shape = next(one for one in step.graph.output if one.name == "logits").type.tensor_type.shape
    words = 0 if copies(step) else shape.dim[1].dim_value  # 0: not known before
    most = next((size for size in range(math.isqrt(words), 1, -1) if words % size == 0), 1)
    if most == 1 or words < BLOCKED_WORDS:
        return [helper.make_node("ArgMax", [logits], ["best"], axis=-1, keepdims=1)]
    blocks = helper.make_node("Constant", [], ["blocks"], value_ints=[0, most, words // most])
    return [blocks, call(best_of_blocks, [logits, "blocks"], ["best"])]


def renamed(node: onnx.NodeProto, outside: Mapping[str, str]) -> onnx.NodeProto:
    """A copy in which tensors have the names given in `outside`, and all others begin with `step_`."""

    def rename(name: str) -> str:
        return outside.get(name, name and f"step_{name}")  # "" is an input left out

    node = copy.deepcopy(node)
    todo = [node]
    while todo:
        one = todo.pop()
        one.input[:] = [rename(name) for name in one.input]
        one.output[:] = [rename(name) for name in one.output]
        for graph in (attribute.g for attribute in one.attribute if attribute.HasField("g")):
            todo.extend(graph.node)
            for tensor in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
                tensor.name = rename(tensor.name)
    return node
