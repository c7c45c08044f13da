"""What a run looks at from time to time: held-out loss, and a sample of text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikelm.checkpoint import Checkpoint
from spikelm.generate import Engine, prompt_ids, stream_text
from spikelm.models.spikelm import LanguageModel
from spikelm.sampling import SamplingParams
from spikelm_train.config import TrainConfig
from spikelm_train.data import Batch, Corpus, make_batch, validation_rows
from spikelm_train.objective import IGNORED, Objective


def to_batch(rows: Any, eos_id: int, device: torch.device) -> Batch:
    """Rows of tokens [B, L + 1] as a batch on `device`."""
    return Batch(*(tensor.to(device) for tensor in make_batch(rows, eos_id)))


@torch.no_grad()
def validation_sums(
    model: Callable[..., Any],
    corpus: Corpus,
    config: TrainConfig,
    device: torch.device,
    rank: int,
    num_ranks: int,
) -> Tensor:
    """This rank's share of the held-out text: nats, tokens and bytes [3], float64.

    Separators, and what is not an answer in conversations, are read but not predicted, so bytes are
    exactly those of the predicted tokens.
    Every window starts from an empty state, as in training.
    """
    tokenizer, size = corpus.tokenizer, config.micro_batch_size
    objective = Objective(chunk=config.loss_chunk)
    rows = validation_rows(
        corpus.validation.tokens, config.data.sequence_length, config.eval_tokens
    )
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for first in range(0, len(rows), num_ranks * size):
        start = first + rank * size
        # Weights that are shared out need all ranks: one that has no rows left repeats some.
        batch = to_batch(
            rows[start : start + size] if start < len(rows) else rows[:1], tokenizer.eos_id, device
        )
        output, _ = model(batch.inputs, reset=batch.reset, **objective.options(batch.targets))
        if start >= len(rows):
            break
        text = (batch.targets != tokenizer.eos_id) & (batch.targets != IGNORED)
        nats = objective.nats(output, batch.targets)[text.flatten()].double().sum()
        num_bytes = len(tokenizer.decode_bytes(batch.targets[text].tolist()))
        sums += torch.stack([nats, text.sum().double(), nats.new_tensor(num_bytes)])
    return sums


def sample_text(model: LanguageModel, corpus: Corpus, config: TrainConfig, out: Path) -> str:
    """The recipe's prompt and its continuation by a copy of `model` on the CPU, in fp32.

    Of a model for conversations, the prompt is what the user says first.
    """
    tokenizer = corpus.tokenizer
    with torch.device("meta"):
        copy = LanguageModel(config.model)
    state = {name: tensor.float().cpu() for name, tensor in model.state_dict().items()}
    copy.load_state_dict(state, assign=True)
    copy.tie_weights()
    engine = Engine(Checkpoint(out, copy.eval(), tokenizer, None))
    params = SamplingParams(
        temperature=0.8, top_p=0.95, seed=config.seed, max_tokens=config.sample_tokens
    )
    prompt, stop = config.sample_prompt, tuple[str, ...]()
    if corpus.has_conversations:
        from spikelm.template import ChatTemplate

        template = ChatTemplate(tokenizer=tokenizer)
        stop = template.stop
        prompt = template.render([{"role": "user", "content": config.sample_prompt}])
    ids = prompt_ids(tokenizer, prompt, special=corpus.has_conversations)
    return prompt + "".join(chunk.text for chunk in stream_text(engine, ids, params, stop))
