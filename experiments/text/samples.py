"""Text that models write after they are adapted to a task."""

from __future__ import annotations

import torch

from experiments.lib.runs import RunFolder
from experiments.lib.training import Labels
from experiments.text.tokens import Tokenizer
from experiments.text.trials import Unseen
from metalora.meta import Callback, Training
from metalora.meta.evaluation import evaluation_mode
from metalora.nn import tasks

PHASE = "sample"
PROMPT_TOKENS = 48
TEMPERATURE = 0.7


class WriteSamples(Callback):
    """At the end of an adaptation has the model continue the beginning of held-out text.

    One text for each task goes into the run's metrics. Every model is drawn from with the same
    seed.

    Args:
        run: the run's folder.
        labels: of the adaptation.
        unseen: the tasks that it is to.
        tokenizer: of the model.
        count: how many tokens to write.
    """

    def __init__(
        self, run: RunFolder, labels: Labels, unseen: Unseen, tokenizer: Tokenizer, count: int
    ) -> None:
        self._run, self._labels, self._unseen = run, labels, unseen
        self._tokenizer, self._count = tokenizer, count

    def on_end(self, training: Training) -> None:
        part, pad = self._unseen.held_out, self._tokenizer.pad
        device = next(training.model.parameters()).device
        count = len(self._unseen.names)
        firsts = torch.searchsorted(part.ids, torch.arange(count))
        starts = part.sequences.starts[firsts]
        length = min(PROMPT_TOKENS, int(part.sequences.lengths[firsts].min()) // 2)
        places = starts[:, None] + torch.arange(max(1, length))
        prompts = part.sequences.fields["input_ids"][places].long().to(device)
        model = training.model
        with evaluation_mode(model), torch.random.fork_rng(), tasks(torch.arange(count)):
            torch.manual_seed(0)
            written = model.generate(  # type: ignore[operator]
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=self._count,
                do_sample=True,
                temperature=TEMPERATURE,
                top_k=0,
                pad_token_id=pad,
            )
        for name, tokens in zip(self._unseen.names, written.tolist(), strict=True):
            end = prompts.shape[1]
            prompt, text = tokens[1:end], tokens[end:]  # the first is the end of another document
            self._run.log(
                phase=PHASE,
                **self._labels,
                task=name,
                prompt=self._tokenizer.decode(prompt),
                text=self._tokenizer.decode(text),
            )
