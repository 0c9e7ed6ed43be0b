"""What tests/test_processes.py runs on one process and on several, on GPUs launched by Accelerate:

    accelerate launch --num_processes 2 tests/process_worker.py RESULTS_FOLDER 2 evaluate train:1,2

calls `evaluate(folder, 2, rank)` and `train(folder, 2, rank, "1", "2")` on every process and writes what each returns
into `RESULTS_FOLDER/NAME-on-2-RANK.json`. Each function asserts that it runs on so many processes.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from datasets import Dataset
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from transformers import AutoConfig, DataCollatorForSeq2Seq

from hf_rnn_seq2seq import RnnSeq2SeqConfig, RnnSeq2SeqForConditionalGeneration
from hf_rnn_seq2seq.scoring import Scorer
from hf_rnn_seq2seq.sharding import own_class, shard_tables
from hf_rnn_seq2seq.tokenizer_training import TokenizerArguments, build_tokenizer
from hf_rnn_seq2seq.trainer import RnnSeq2SeqTrainer, RnnSeq2SeqTrainingArguments

ROWS = 41  # 5 more than a multiple of the global batch
GLOBAL_BATCH = 12  # on 1, 2 or 3 processes, also in two parts
STEPS_PER_EPOCH, EPOCHS = 4, 3
SAVED_AT = STEPS_PER_EPOCH + 2  # in the middle of the second epoch

COMMON: dict[str, Any] = {
    "num_train_epochs": EPOCHS,
    "max_grad_norm": 0.3,  # less than the gradients' norm
    "optim": "adam",
    "learning_rate": 1e-2,
    "save_strategy": "steps",
    "save_steps": SAVED_AT,
    "logging_steps": 1,
}
RUNS: dict[str, dict[str, Any]] = {
    "lengths": {**COMMON, "train_sampling_strategy": "group_by_length", "eval_strategy": "epoch"},
    "random": {
        **COMMON,
        "train_sampling_strategy": "random",
        "gradient_accumulation_steps": 2,
        "label_smoothing_factor": 0.1,
        "ema_decay": 0.8,
        "lr_scheduler_type": "halving",
        "lr_decay_start": 1,
        "eval_strategy": "epoch",
        "predict_with_generate": False,
    },
    "sequential": {**COMMON, "train_sampling_strategy": "sequential", "save_strategy": "no", "num_train_epochs": 1},
}


NO_DROPOUT = {"dropout": 0.0, "embedding_dropout": 0.0, "output_dropout": 0.0}
SHARDED: dict[str, dict[str, Any]] = {
    "one-vocabulary-tied": {"tie_word_embeddings": True},
    "input-feeding": {"source_vocab_size": 11, "wiring_type": "input_feeding", "attention_type": "general"},
    "gru-tied": {"source_vocab_size": 11, "cell_type": "gru", "decoder_layers": 2, "tie_word_embeddings": True},
}


class RecordingTrainer(RnnSeq2SeqTrainer):
    """Notes the rows that it trains on: those with a label."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rows_of_step: dict[int, list[int]] = {}

    def training_step(self, model: nn.Module, inputs: dict[str, torch.Tensor], *args: Any) -> torch.Tensor:
        labelled = (inputs["labels"] != -100).any(1)
        rows = [row_number(ids) for ids in inputs["input_ids"][labelled].tolist()]
        self.rows_of_step.setdefault(self.state.global_step + 1, []).extend(rows)
        return super().training_step(model, inputs, *args)


def texts() -> list[str]:
    """Unequal lengths; each begins with its number in base 4."""
    return ["".join("abcd"[row // 4**place % 4] for place in range(3)) + "dcba" * (row % 3) for row in range(ROWS)]


TOKENIZER = build_tokenizer(
    texts(), texts(), TokenizerArguments(source_tokenizer_kind="char", target_tokenizer_kind="char")
)


def row_number(ids: list[int]) -> int:
    text = TOKENIZER.source_tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "")
    return texts().index(text)


def make_trainer(
    folder: str, world_size: int, trainer_class: type[RecordingTrainer] = RecordingTrainer, **arguments: Any
) -> RecordingTrainer:
    """A trainer of a tiny model, without dropout, whose global batch has the same size on any number of processes."""
    parts = world_size * arguments.get("gradient_accumulation_steps", 1)
    args = RnnSeq2SeqTrainingArguments(
        **{
            "output_dir": folder,
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": "none",
            "per_device_train_batch_size": GLOBAL_BATCH // parts,
            "per_device_eval_batch_size": GLOBAL_BATCH // world_size,
            "generation_max_length": 12,
            "ddp_find_unused_parameters": False,
            **arguments,
        }
    )
    assert args.world_size == world_size, args.world_size
    targets = [text[::-1] for text in texts()]
    encoded = TOKENIZER(texts(), text_target=targets)
    rows = Dataset.from_dict(
        {"input_ids": encoded["input_ids"], "labels": encoded["labels"], "source": texts(), "target": targets}
    )
    torch.manual_seed(0)
    config = RnnSeq2SeqConfig(
        vocab_size=TOKENIZER.target_vocab_size,
        source_vocab_size=TOKENIZER.source_vocab_size,
        embedding_size=8,
        hidden_size=8,
        tie_word_embeddings=True,  # a weight in two places, which Accelerate's FSDP alone would refuse
        **NO_DROPOUT,
    )
    model = RnnSeq2SeqForConditionalGeneration(config)
    scorer = Scorer(TOKENIZER, ["cer", "chrf"])
    return trainer_class(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=scorer.watch(rows),
        processing_class=TOKENIZER,
        data_collator=DataCollatorForSeq2Seq(TOKENIZER, model=model),
        compute_metrics=scorer if args.predict_with_generate else None,
    )


def log_of(trainer: RecordingTrainer) -> list[dict[str, float]]:
    keep = ("step", "epoch", "loss", "grad_norm", "learning_rate", "eval_loss", "eval_cer", "eval_chrf")
    entries = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    return [{name: entry[name] for name in keep if name in entry} for entry in entries]


def outcome(trainer: RecordingTrainer) -> dict[str, Any]:
    return {
        "log": log_of(trainer),
        "rows": {str(step): rows for step, rows in trainer.rows_of_step.items()},
        "weights": {name: weight.tolist() for name, weight in trainer.model.named_parameters()},
    }


def train(folder: str, world_size: int, rank: int, *checkpoints: str) -> dict[str, Any]:
    """All runs, and each again from the checkpoints that runs on these numbers of processes have left."""
    results: dict[str, Any] = {}
    for name, arguments in RUNS.items():
        # With a folder of its own for each process, one can see which of them writes what.
        output_dir = f"{folder}/{name}-on-{world_size}/rank{rank}"
        trainer = make_trainer(output_dir, world_size, **arguments)
        trainer.train()
        trainer.save_model()
        trainer.create_model_card()
        results[name] = outcome(trainer)
        for source in checkpoints if arguments["save_strategy"] == "steps" else ():
            results[f"{name} from {source}"] = resume(folder, world_size, rank, name, source)
    return results


def resume(folder: str, world_size: int, rank: int, name: str, source: str) -> dict[str, Any]:
    """A run from the checkpoint that it left on `source` processes."""
    arguments = {**RUNS[name], "save_strategy": "no"}
    trainer = make_trainer(f"{folder}/{name}-on-{world_size}/resumed", world_size, **arguments)
    trainer.train(resume_from_checkpoint=f"{folder}/{name}-on-{source}/rank0/checkpoint-{SAVED_AT}")
    return outcome(trainer)


def evaluate(folder: str, world_size: int, rank: int) -> dict[str, Any]:
    """Loss, metrics and predictions, by generating, greedily and with beams, and without."""
    results: dict[str, Any] = {}
    for generate in (True, False):
        trainer = make_trainer(f"{folder}/evaluated-on-{world_size}", world_size, predict_with_generate=generate)
        with torch.no_grad():  # an untrained model would predict the same for every source
            for parameter in trainer.model.parameters():
                parameter.mul_(4)
        if generate:
            for name, beams in (("greedy", 1), ("beams", 3)):
                output = trainer.predict(trainer.eval_dataset, num_beams=beams)
                results[name] = trainer.compute_metrics.decode(output.predictions)
                results[f"{name} metrics"] = output.metrics
            results["labels"] = trainer.compute_metrics.decode(output.label_ids)
        else:
            results["loss alone"] = trainer.evaluate()
            results["loss of one row"] = trainer.evaluate(trainer.eval_dataset.select([0]))
    return results


def shard(folder: str, world_size: int, rank: int) -> dict[str, Any]:
    """Models sharded by FSDP2 against the same ones whole: weights after three steps, generated ids, saved folder."""
    assert RnnSeq2SeqTrainingArguments(output_dir=folder, use_cpu=True).world_size == world_size
    mesh = init_device_mesh("cpu", (world_size,))
    source, target = torch.randint(3, 11, (2, 6, 5), generator=torch.Generator().manual_seed(0))
    target[0, 2:] = -100
    own = slice(rank * 6 // world_size, (rank + 1) * 6 // world_size)

    def train(model: nn.Module, rows: slice, scale: int) -> nn.Module:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(3):
            outputs = model(input_ids=source[rows], labels=target[rows], num_items_in_batch=(target != -100).sum())
            (scale * outputs.loss).backward()  # of several processes' gradients FSDP takes the mean
            optimizer.step()
            optimizer.zero_grad()
        return model.eval()

    results: dict[str, Any] = {}
    for name, fields in SHARDED.items():
        torch.manual_seed(0)
        config = RnnSeq2SeqConfig(vocab_size=13, embedding_size=8, hidden_size=8, **NO_DROPOUT, **fields)
        whole, model = RnnSeq2SeqForConditionalGeneration(config), RnnSeq2SeqForConditionalGeneration(config)
        model.load_state_dict(whole.state_dict())
        first = {key: weight.clone() for key, weight in whole.state_dict().items()}
        train(whole, slice(None), 1)

        shard_tables(model, mesh)
        fully_shard(model.model.encoder.body, mesh=mesh)
        fully_shard(model, mesh=mesh)
        register_fsdp_forward_method(model, "generate")
        train(model, own, world_size)
        options = {"max_new_tokens": 6, "num_beams": 2}
        generated, expected = model.generate(source, **options), whole.generate(source, **options)
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        saved = f"{folder}/sharded-{name}-on-{world_size}"
        if rank == 0:
            with own_class(model):
                model.save_pretrained(saved, state_dict=state)
            loaded = RnnSeq2SeqForConditionalGeneration.from_pretrained(saved).state_dict()
            config = AutoConfig.from_pretrained(saved)
            results[name] = {
                "moved": max((loaded[key] - weight).abs().max().item() for key, weight in first.items()),
                "error": max((loaded[key] - weight).abs().max().item() for key, weight in whole.state_dict().items()),
                "code": sorted(path.name for path in Path(saved).glob("*.py")),
                "classes": [*config.auto_map.values(), *config.architectures],
            }
        else:
            results[name] = {}
        results[name] |= {
            "own parameters": sum(weight.to_local().numel() for weight in model.parameters()),
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "same ids": torch.equal(generated, expected),
        }
    return results


class ShardingTrainer(RecordingTrainer):
    """Takes the way of FSDP2, which Accelerate has for GPUs only, on CPUs."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.accelerator.state.distributed_type = DistributedType.FSDP
        self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="no_wrap",
            cpu_ram_efficient_loading=False,
            state_dict_type="full_state_dict",
        )
        self.is_fsdp_enabled = True


def fsdp(folder: str, world_size: int, rank: int) -> dict[str, Any]:
    """A run by the Trainer with a sharded model, and again from its checkpoint. To be called last."""
    output_dir, arguments = f"{folder}/fsdp-on-{world_size}", RUNS["lengths"]
    trainer = make_trainer(output_dir, world_size, ShardingTrainer, **arguments)
    trainer.train()
    for module in trainer.model.modules():  # what the last evaluation has left gathered
        if isinstance(module, FSDPModule):
            module.reshard()
    sharded = sum(weight.to_local().numel() for weight in trainer.model.parameters())
    trainer.save_model()
    results = {
        "own parameters": sharded,
        "parameters": trainer.model.num_parameters(),
        "evaluated": trainer.evaluate(),
    }
    again = make_trainer(f"{output_dir}/again", world_size, ShardingTrainer, **{**arguments, "save_strategy": "no"})
    again.train(resume_from_checkpoint=f"{output_dir}/checkpoint-{SAVED_AT}")
    loaded = RnnSeq2SeqForConditionalGeneration.from_pretrained(output_dir)
    weights = {name: weight.tolist() for name, weight in loaded.named_parameters()}
    logs = {"log": log_of(trainer), "log again": log_of(again), "steps again": sorted(again.rows_of_step)}
    return {**results, **logs, "weights": weights, "code": sorted(path.name for path in Path(output_dir).glob("*.py"))}


def gpu(folder: str, world_size: int, rank: int, kind: str) -> dict[str, Any]:
    """A run on CUDA devices, or on one that several processes share."""
    kinds: dict[str, dict[str, Any]] = {
        "bf16": {"bf16": True},
        "fp16": {"fp16": True},
        "compiled": {"torch_compile": True},
    }
    arguments = {**RUNS["lengths"], "save_strategy": "no", "use_cpu": False, **kinds.get(kind, {})}
    if torch.cuda.device_count() < world_size:
        os.environ["LOCAL_RANK"] = "0"
        arguments["ddp_backend"] = "gloo"
    trainer = make_trainer(f"{folder}/{kind}", world_size, **arguments)
    trainer.train()
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    loaded = RnnSeq2SeqForConditionalGeneration.from_pretrained(f"{folder}/{kind}")
    return {"log": log_of(trainer), "weights": {name: weight.tolist() for name, weight in loaded.named_parameters()}}


FUNCTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "train": train,
    "evaluate": evaluate,
    "shard": shard,
    "fsdp": fsdp,
    "gpu": gpu,
}


def main(folder: str, number: str, *calls: str) -> None:
    for call in calls:
        name, _, arguments = call.partition(":")
        rank = int(os.environ.get("RANK", "0"))
        result = FUNCTIONS[name](folder, int(number), rank, *filter(None, arguments.split(",")))
        (Path(folder) / f"{name}-on-{number}-{rank}.json").write_text(json.dumps(result), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
