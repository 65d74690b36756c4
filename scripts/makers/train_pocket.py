"""Train the pocket checkpoint: a real, tiny Megrez2 that tests can convert, quantize and chat with.

    npm install --prefix /tmp/poetry chinese-poetry@2.0.1        # and: apt install bible-kjv
    modules=/tmp/poetry/node_modules/chinese-poetry
    python scripts/makers/train_pocket.py --poetry $modules --out tests/data/pocket \\
        --heldout tests/data/heldout
    python scripts/makers/train_pocket.py --poetry $modules --out tests/data/second \\
        --shape second --seed 11 --work build/second

Stops and goes on where it was: the state in --work is saved every few minutes. Prints what it
writes to training.json.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

import pocket_corpus
import pocket_model
from megrez_gguf.checkpoint.config import ModelConfig
from megrez_parity import reference
from ngram import Trigram

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = 512  # of the model, and of the windows it is judged on
SAMPLE = 10  # windows of each held-out text that the tests judge
SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|role_start|>",
    "<|role_end|>",
    "<|turn_end|>",
    "<|pad|>",
)
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ENTRIES = 2864  # of the tokenizer; the model has a few rows more, as published ones do
BATCH, WINDOW = 8, 256  # tokens a step: the product; longer windows once the rate falls
FALL = 0.5  # share of the steps over which the learning rate falls to zero
BIAS_SPEED = 1e-3  # of the correction bias, a step
CHAT_EVERY = 2  # steps: in one of so many a row is conversations, from position 0
CONFIG: dict[str, Any] = {
    "architectures": ["MegrezMoeForCausalLM"],
    "model_type": "megrez_moe",
    "hidden_size": 256,
    "num_hidden_layers": 7,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 416,
    "moe_intermediate_size": 64,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 4,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "experts_shared_frequency": 3,
    "pre_gate": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "rope_theta": 5000000.0,
    "rope_scaling": None,
    "max_position_embeddings": CONTEXT,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
    "initializer_range": 0.02,
    "vocab_size": 2880,
    "bos_token_id": ENTRIES - len(SPECIAL),
    "eos_token_id": ENTRIES - len(SPECIAL) + SPECIAL.index("<|turn_end|>"),
    "pad_token_id": ENTRIES - len(SPECIAL) + SPECIAL.index("<|pad|>"),
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
# Another model of the same texts: what holds for one may be that one's chance. More layers and
# groups, more and narrower experts, other heads.
SECOND = CONFIG | {
    "num_hidden_layers": 10,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "moe_intermediate_size": 32,
    "n_routed_experts": 24,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
}
SHAPES = {"pocket": CONFIG, "second": SECOND}


def build_tokenizer(corpus: pocket_corpus.Corpus) -> Tokenizer:
    """Byte-level BPE with Megrez's (Qwen2's) splitting, special tokens last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ENTRIES - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Answers are repeated so that what the model says in a chat has tokens of its own.
    texts = [text for domain in corpus.train.values() for text in domain]
    texts += [text for pair in corpus.train_pairs for text in pair] * 8
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return tokenizer


Row = NDArray[np.int64]


class Data:
    """Token streams and the batches drawn from them."""

    def __init__(self, corpus: pocket_corpus.Corpus, tokenizer: Tokenizer, seed: int) -> None:
        self.rng = random.Random(seed)
        begin, end = SPECIAL[:2]
        texts = [f"{begin}{t}{end}" for name in corpus.train for t in corpus.train[name]]
        self.documents = [np.array(e.ids) for e in tokenizer.encode_batch(texts)]
        chats = pocket_corpus.conversations(corpus.train_pairs, 4000, self.rng)
        self.chats = [e.ids for e in tokenizer.encode_batch(list(chats))]
        self.held = {name: "\n\n".join(texts) for name, texts in corpus.held.items()}
        self.held["chat"] = "".join(pocket_corpus.conversations(corpus.held_pairs, 200, self.rng))
        self.windows: list[Row] = []
        self.windows_of = (-1, 0)  # epoch and size of `windows`

    def stream(self) -> Row:
        """Every training token once, in one order: what the n-gram model counts."""
        return np.concatenate([*self.documents, *(np.array(c) for c in self.chats)])

    def batch(self, step: int, window: int) -> Tensor:
        """Token ids `[BATCH * WINDOW / window, window + 1]`, the same for the same step."""
        count = BATCH * WINDOW // window
        rows = [self._text_row(step * count + i, window + 1) for i in range(count)]
        if step % CHAT_EVERY == 0:
            rows[0] = self._chat_row(step, window + 1)
        return torch.from_numpy(np.stack(rows)).long()

    def _text_row(self, index: int, size: int) -> Row:
        count = sum(map(len, self.documents)) // size
        epoch, row = divmod(index, count)
        if self.windows_of != (epoch, size):
            rng = random.Random(epoch)
            stream = np.concatenate(rng.sample(self.documents, len(self.documents)))
            self.windows = list(stream[: count * size].reshape(count, size))
            rng.shuffle(self.windows)
            self.windows_of = (epoch, size)
        return self.windows[row]

    def _chat_row(self, index: int, size: int) -> Row:
        rng = random.Random(index)
        row: list[int] = []
        while len(row) < size:
            row += rng.choice(self.chats)
        return np.array(row[:size])


class Muon:
    """Muon for matrices, AdamW for the rest; both at the learning rate of AdamW.

    K. Jordan, "Muon: an optimizer for hidden layers", with the update's size of J. Liu et al.,
    arXiv 2502.16982. Stacked experts are orthogonalised one by one.
    """

    def __init__(self, weights: dict[str, Tensor]) -> None:
        inner = {n: w for n, w in weights.items() if w.ndim > 1 and ".layers." in n}
        self.matrices = {n: w for n, w in inner.items() if ".gate.weight" not in n}
        rest = [w for n, w in weights.items() if n not in self.matrices and w.requires_grad]
        groups = [
            {"params": [w for w in rest if w.ndim > 1], "weight_decay": 0.1},
            {"params": [w for w in rest if w.ndim == 1], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, betas=(0.9, 0.95))
        self.momentum = {n: torch.zeros_like(w) for n, w in self.matrices.items()}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.adam.zero_grad()
        shapes: dict[tuple[int, ...], list[str]] = {}
        for name, weight in self.matrices.items():
            shapes.setdefault(tuple(weight.shape[-2:]), []).append(name)
        for shape, names in shapes.items():
            updates = []
            for name in names:
                grad = self.matrices[name].grad
                assert grad is not None
                self.momentum[name].lerp_(grad, 0.05)
                updates.append(grad.lerp(self.momentum[name], 0.95).view(-1, *shape))
            scale = 0.2 * max(shape) ** 0.5 * rate
            whole = torch.split(orthogonal(torch.cat(updates)), [len(u) for u in updates])
            for name, update in zip(names, whole, strict=True):
                weight = self.matrices[name]
                weight.mul_(1 - rate * 0.1).sub_(update.view_as(weight), alpha=scale)
                weight.grad = None


def orthogonal(x: Tensor) -> Tensor:
    """The nearest half-orthogonal matrices to `x` `[n, rows, columns]`, roughly: five quintic
    Newton-Schulz iterations."""
    tall = x.shape[1] > x.shape[2]
    y: Tensor = (x.mT if tall else x).bfloat16()
    y = y / (y.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = y @ y.mT
        y = 3.4445 * y + (-4.7750 * gram + 2.0315 * gram @ gram) @ y
    nearest: Tensor = y.mT if tall else y
    return nearest.float()


def fade(step: int, steps: int) -> float:
    """1 on the plateau, then a linear fall to 0 over the last `FALL` of the steps."""
    return min(1.0, (steps - step) / (FALL * steps))


def train(
    config: ModelConfig, data: Data, work: Path, steps: int, peak: float, seed: int
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Weights (master, stacked) after `steps`, and the log.

    The plateau is the same for any number of steps, so a state saved on it serves them all.
    """
    weights = pocket_model.initial(config, seed)
    sample = data.batch(0, WINDOW)[:2, :64]
    fast = pocket_model.forward(config, weights, sample, torch.float32)[0]
    slow = reference.forward(config, pocket_model.published(weights), sample)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
    bias = {n: w for n, w in weights.items() if n.endswith("e_score_correction_bias")}
    trained = {n: w.requires_grad_() for n, w in weights.items() if n not in bias}
    optimizer = Muon(trained)
    log: list[dict[str, float]] = []
    plateau, falling = work / "plateau.pt", work / f"falling-{steps}.pt"
    begin, spent = 0, 0.0
    for saved in (falling, plateau):
        if not saved.is_file():
            continue
        state: dict[str, Any] = torch.load(saved)
        if state["step"] <= steps and (saved == falling or fade(state["step"], steps) == 1):
            for name, weight in weights.items():
                weight.data.copy_(state["weights"][name])
            optimizer.adam.load_state_dict(state["adam"])
            optimizer.momentum, log = state["momentum"], state["log"]
            begin, spent = state["step"], log[-1]["seconds"]
            break

    def loss_of(w: dict[str, Tensor], batch: Tensor) -> tuple[Tensor, Tensor]:
        logits, loads = pocket_model.forward(config, w, batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        return loss, loads

    compiled = torch.compile(loss_of, dynamic=False)

    def gradients(batch: Tensor) -> tuple[float, Tensor, tuple[Tensor, ...]]:
        torch.set_num_threads(1)
        loss, loads = compiled(weights, batch)
        return loss.item(), loads, torch.autograd.grad(loss, list(trained.values()))

    # One thread for each half of a batch: on a busy machine two threads that meet in every
    # operation would spend most of their time waiting for each other.
    started, mean, compiled_for = time.monotonic(), 0.0, 0
    with ThreadPoolExecutor(2) as pool:
        for step in range(begin, steps):
            window = WINDOW if fade(step, steps) == 1 else CONTEXT
            halves = data.batch(step, window).chunk(2)
            if window != compiled_for:  # not in two threads at once
                gradients(halves[0])
                compiled_for = window
            losses, loads, grads = zip(*pool.map(gradients, halves), strict=True)
            for weight, *both in zip(trained.values(), *grads, strict=True):
                weight.grad = (both[0] + both[1]) / 2
            optimizer.step(peak * fade(step, steps) * min(1.0, (step + 1) / 40))
            # The bias of an expert with less than its share of the tokens rises.
            load = loads[0] + loads[1]
            for one, row in zip(bias.values(), load, strict=True):
                one += BIAS_SPEED * fade(step, steps) * torch.sign(row.mean() - row)
            mean += sum(losses) / 2
            if (step + 1) % 50 == 0:
                share = (load / load.sum(-1, keepdim=True)).min().item()
                seconds = spent + time.monotonic() - started
                log.append(
                    {
                        "step": step + 1,
                        "loss": round(mean / 50, 4),
                        "least_load": round(share, 4),
                        "seconds": round(seconds, 1),
                    }
                )
                typer.echo(json.dumps(log[-1]), err=True)
                mean = 0.0
            if (step + 1) % 100 == 0:
                state = {
                    "weights": {n: w.detach() for n, w in weights.items()},
                    "adam": optimizer.adam.state_dict(),
                    "momentum": optimizer.momentum,
                    "log": log,
                    "step": step + 1,
                }
                saved = plateau if fade(step + 1, steps) == 1 else falling
                torch.save(state, saved.with_suffix(".new"))
                saved.with_suffix(".new").replace(saved)
    return {n: w.detach() for n, w in weights.items()}, log


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def export(
    folder: Path, fields: dict[str, Any], weights: dict[str, Tensor], tokenizer: Tokenizer
) -> None:
    """The published layout: bfloat16, two shards and their index, tokenizer, configurations."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tensors = {
        n: w.bfloat16().contiguous() for n, w in sorted(pocket_model.published(weights).items())
    }
    total, size = sum(w.nbytes for w in tensors.values()), 0
    shards: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    where: dict[str, str] = {}
    for name, tensor in tensors.items():
        number = int(2 * size >= total)
        shards[number][name] = tensor
        where[name] = f"model-{number + 1:05}-of-00002.safetensors"
        size += tensor.nbytes
    for number, shard in enumerate(shards):
        path = folder / f"model-{number + 1:05}-of-00002.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": where}
    write_json(folder / "model.safetensors.index.json", index)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "config.json", fields)
    special = {"bos_token": SPECIAL[0], "eos_token": "<|turn_end|>", "pad_token": "<|pad|>"}
    write_json(folder / "special_tokens_map.json", special)
    settings = {
        "add_bos_token": False,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(t)): {"content": t, "special": True} for t in SPECIAL
        },
        **special,
        "chat_template": pocket_corpus.chat_template(),
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", settings)
    generation = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
    ids = {k: CONFIG[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", ids | generation)


@torch.no_grad()
def evaluate(
    config: ModelConfig, weights: dict[str, Tensor], ids: list[int]
) -> tuple[float, Tensor]:
    """Bits a token of the reference on `ids`, and how often each expert ran `[MoE layers, E]`.

    Windows do not overlap, and their first token is not scored: it is given.
    """
    loads = torch.zeros(config.num_hidden_layers, config.n_routed_experts)

    def count(name: str, layer: int, tensor: Tensor) -> None:
        if name == "ffn_moe_topk":
            loads[layer] += tensor.flatten().bincount(minlength=config.n_routed_experts)

    total, scored = 0.0, 0
    for start in range(0, len(ids) - 1, CONTEXT):
        part = torch.tensor([ids[start : start + CONTEXT]])
        logits = reference.forward(config, weights, part[:, :-1], trace=count)[0]
        total += F.cross_entropy(logits, part[0, 1:], reduction="sum").item()
        scored += part.shape[1] - 1
    return total / scored / math.log(2), loads[list(config.moe_layers)]


def sample(ids: list[int]) -> list[int]:
    """`SAMPLE` whole windows of `ids`, evenly spread, for a test that must be quick."""
    whole = len(ids) // CONTEXT
    starts = [i * whole // SAMPLE * CONTEXT for i in range(SAMPLE)]
    return [token for start in starts for token in ids[start : start + CONTEXT]]


@torch.no_grad()
def answer(
    config: ModelConfig, weights: dict[str, Tensor], tokenizer: Tokenizer, question: str
) -> str:
    """The greedy answer of the reference to one question under the default system prompt."""
    prompt = pocket_corpus.render([{"role": "user", "content": question}], True)
    ids = tokenizer.encode(prompt).ids
    start = len(ids)
    while len(ids) < start + 64 and ids[-1] != CONFIG["eos_token_id"]:
        ids.append(int(reference.forward(config, weights, torch.tensor([ids]))[0, -1].argmax()))
    return tokenizer.decode(ids[start:])


def judge(config: ModelConfig, out: Path, data: Data, tokenizer: Tokenizer) -> dict[str, Any]:
    """Held-out figures of the exported files beside the trigram's, and sample answers."""
    weights = dict(reference.CheckpointWeights(out))
    stream = data.stream()
    trigram = Trigram(stream, CONFIG["vocab_size"])
    report: dict[str, Any] = {"training_tokens": len(stream), "held_out": {}}
    ran = torch.zeros(len(config.moe_layers), config.n_routed_experts)
    for domain, text in data.held.items():
        ids = tokenizer.encode(text).ids
        bits, loads = evaluate(config, weights, ids)
        ran += loads
        # The tokens the model is scored on; `bits` gives none to the first two of all.
        at = np.arange(2, len(ids))
        bar = np.where(at % CONTEXT, trigram.bits(np.array(ids)), np.nan)
        marked = np.array(sample(list(range(len(ids)))))
        report["held_out"][domain] = {
            "tokens": len(ids),
            "bytes": len(text.encode()),
            "model_bits_per_token": round(bits, 4),
            "model_perplexity": round(2**bits, 3),
            "trigram_bits_per_token": round(float(np.nanmean(bar)), 4),
            "trigram_perplexity": round(float(2 ** np.nanmean(bar)), 3),
            "sample_trigram_bits_per_token": round(
                float(np.nanmean(bar[marked[marked > 1] - 2])), 4
            ),
            "least_expert_share": round((loads / loads.sum(-1, keepdim=True)).min().item(), 4),
        }
    shares = ran / ran.sum(-1, keepdim=True)
    report["expert_share"] = {
        str(layer): [round(s, 4) for s in row]
        for layer, row in zip(config.moe_layers, shares.tolist(), strict=True)
    }
    asked = ("世界上最高的山峰是哪座？", "你是谁？", "What is the capital of Japan?")
    report["answers"] = {q: answer(config, weights, tokenizer, q) for q in asked}
    return report


def main(
    poetry: Annotated[Path, typer.Option(help="The unpacked npm package chinese-poetry.")],
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write.")],
    heldout: Annotated[Path | None, typer.Option(help="Folder for the held-out texts.")] = None,
    work: Annotated[Path, typer.Option(help="Folder for the state of training.")] = Path(
        "build/pocket"
    ),
    steps: Annotated[int, typer.Option(help=f"Steps of {BATCH * WINDOW} tokens.")] = 2900,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    seed: Annotated[int, typer.Option(help="Of weights and conversations.")] = 7,
    shape: Annotated[str, typer.Option(help="pocket, or second: another model.")] = "pocket",
) -> None:
    """Train the pocket checkpoint and write it with its held-out texts and figures."""
    try:
        corpus = pocket_corpus.load(poetry)
    except pocket_corpus.MissingSource as e:
        typer.echo(f"train_pocket: {e}", err=True)
        raise typer.Exit(2) from None
    work.mkdir(parents=True, exist_ok=True)
    config = ModelConfig.from_dict(SHAPES[shape])
    tokenizer = build_tokenizer(corpus)
    data = Data(corpus, tokenizer, seed)
    weights, log = train(config, data, work, steps, rate, seed)
    export(out, SHAPES[shape], weights, tokenizer)
    if heldout:
        heldout.mkdir(parents=True, exist_ok=True)
        for domain, text in data.held.items():
            (heldout / f"{domain}.txt").write_text(text, "utf-8")
    report = {
        "command": "scripts/makers/train_pocket.py "
        f"--shape {shape} --steps {steps} --rate {rate} --seed {seed}",
        "torch": torch.__version__,
        "corpus_sha256": corpus.digest(),
        "steps": steps,
        "tokens_seen": steps * BATCH * WINDOW,
        "seconds": log[-1]["seconds"],
        **judge(config, out, data, tokenizer),
    }
    typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
    write_json(out / "training.json", report | {"log": log})


if __name__ == "__main__":
    typer.run(main)
