"""From a folder of dialogues and the name of a model to the turns of all tasks."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.language.data import Corpus, load, write_made_up
from experiments.language.encoders import Encoders, has_token_types, max_length
from experiments.language.protocol import Protocol
from experiments.language.settings import Settings
from experiments.language.tokens import TokenizedTurns, tokenize
from experiments.lib.training import check_rank, known
from experiments.lib.unused import at_most


def load_corpus(settings: Settings) -> Corpus:
    """The dialogues, or for a smoke run without data made-up ones.

    Raises:
        RunError: no data were given, or they are missing, damaged or too few.
    """
    with tempfile.TemporaryDirectory() as made_up:
        root = settings.data
        if root is None:
            if not settings.smoke:
                raise ValueError(
                    "argument --data: give the folder of the ConvAI2 dialogues; "
                    "--smoke runs without"
                )
            root = Path(made_up)
            write_made_up(root)
        return load(
            root,
            retrain_file=settings.retrain_file,
            test_file=settings.test_file,
            tasks=known(settings.tasks),
            test_tasks=known(settings.test_tasks),
            held_out=settings.validation_dialogues,
            test_held_out=settings.held_out_dialogues,
            strict=settings.strict,
            per_turn=settings.candidates,
            seed=settings.data_seed,
            turns=settings.turns,
        )


def prepare(settings: Settings, corpus: Corpus, device: torch.device) -> Protocol:
    """The protocol, with the turns of all tasks as token sequences.

    Raises:
        RunError: the model or its tokenizer is missing or damaged, or a rank too large for it.
    """
    every = [d for task in (*corpus.retraining, *corpus.testing) for d in task.train]
    texts = (c for d in every for turn in d.turns for c in (turn.utterance, *turn.candidates))
    encoders = Encoders(known(settings.model), settings.tokenizer, settings.as_roberta, texts)
    model = encoders.new(0)
    check_rank(model, max(settings.rank))
    longest = max_length(model)
    if settings.max_length is not None:
        longest = min(longest, settings.max_length)

    def turns(tasks: Sequence[Sequence[Any]]) -> TokenizedTurns:
        return tokenize(
            tasks,
            encoders.tokenizer,
            max_length=longest,
            token_types=has_token_types(model, encoders.tokenizer),
            history=settings.history,
        )

    return Protocol(
        settings,
        turns([task.train[: settings.dialogues] for task in corpus.retraining]),
        turns([task.held_out for task in corpus.retraining]),
        turns([task.train[: settings.dialogues] for task in corpus.testing]),
        turns([task.held_out for task in corpus.testing]),
        encoders,
        device,
    )


def notes(corpus: Corpus, protocol: Protocol, list_unmatched: bool) -> list[str]:
    """Lines on what of the data is left out or cut, and settings that ask for more than there is.

    On request there is a line for every unmatched dialogue too.
    """
    lines = _beyond(corpus, protocol)
    for file in corpus.files:
        if file.unmatched or list_unmatched:
            hint = "" if list_unmatched else "; --list-unmatched lists them"
            lines.append(
                f"note: {file.path}: {len(file.unmatched)} dialogues are left out, whose personas "
                f"match no cluster{hint}"
            )
        if list_unmatched:
            lines += [f"{where}: {' '.join(persona)}" for where, persona in file.unmatched]
    for name, turns in _parts(protocol).items():
        if turns.truncated:
            lines.append(
                f"note: {name.replace('_', '-')}: {turns.truncated} of {len(turns)} turns are too "
                "long for the model and lose their oldest tokens"
            )
    return lines


def _beyond(corpus: Corpus, protocol: Protocol) -> list[str]:
    """A line for each setting that asks for more than there is."""
    s, every = protocol.settings, [*corpus.retraining, *corpus.testing]
    dialogues = [d for task in every for d in (*task.train, *task.held_out)]
    utterances = max(2 * len(d.turns) - 1 for d in dialogues)
    most = max(len(task.train) for task in every)
    turns = max(len(d.turns) for d in dialogues)
    longest = max_length(protocol.encoders.new(0))
    return [
        *at_most("dialogues", s.dialogues, most, "the tasks have"),
        *at_most("turns", s.turns, turns, "the dialogues have"),
        *at_most("history", s.history, utterances, "before a response there are"),
        *at_most("max_length", s.max_length, longest, "the model takes"),
    ]


def facts(corpus: Corpus, protocol: Protocol) -> dict[str, Any]:
    """What the data turned out to be, for the manifest."""
    parts = _parts(protocol)
    return {
        "retraining_clusters": [task.cluster for task in corpus.retraining],
        "test_clusters": [task.cluster for task in corpus.testing],
        "turns": {name: torch.bincount(turns.task_ids) for name, turns in parts.items()},
        "tokens": {name: int(turns.starts[-1]) for name, turns in parts.items()},
        "turns_cut_short": {name: turns.truncated for name, turns in parts.items()},
        "dialogues": {file.path.name: file.counts() for file in corpus.files},
        "other_sides_left_out": corpus.other_sides,
        "packed": protocol.packed,
    }


def _parts(protocol: Protocol) -> dict[str, TokenizedTurns]:
    return {
        "retraining": protocol.retraining,
        "validation": protocol.validation,
        "test": protocol.test,
        "held_out": protocol.held_out,
    }
