"""spikelm models in transformers: importing this module registers them.

    import spikelm.hf
    model = AutoModelForCausalLM.from_pretrained("runs/demo/spiking")

B sequences, T tokens, N vocabulary.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from spikelm.checkpoint import MANIFEST, MODEL_TYPE, model_config_of, use_coding
from spikelm.config import ModelConfig, to_dict
from spikelm.errors import CheckpointError, ConfigError
from spikelm.generate import run
from spikelm.models.layers import reset_parameters
from spikelm.models.spikelm import LanguageModel, shared_losses
from spikelm.state import State


class SpikelmConfig(PreTrainedConfig):
    """The fields of `spikelm.config.ModelConfig` as plain data."""

    model_type = MODEL_TYPE
    attribute_map = {"hidden_size": "width", "tie_word_embeddings": "tie_embeddings"}  # noqa: RUF012

    def __init__(self, **kwargs: Any) -> None:
        fields = {name: kwargs.pop(name, value) for name, value in to_dict(ModelConfig()).items()}
        for name, value in fields.items():
            setattr(self, name, value)
        self.spike_coding = kwargs.pop("spike_coding", None)
        # Where the state is forgotten; None in models of other projects.
        self.reset_token_id = kwargs.pop("reset_token_id", kwargs.get("eos_token_id"))
        self.tokenizer_fingerprint = kwargs.pop("tokenizer_fingerprint", None)
        super().__init__(**kwargs)

    @property
    def num_hidden_layers(self) -> int:
        return len(self.mixers)

    @property
    def model_config(self) -> ModelConfig:
        """The checked configuration. Raises: CheckpointError for a bad field."""
        return model_config_of(vars(self), "this model")


class StateCache(Cache):
    """The model's `State` where transformers expects a key/value cache."""

    is_compileable = False

    def __init__(self, state: State) -> None:
        super().__init__(layers=[])
        self.state = state
        self.seen_tokens = 0

    def __bool__(self) -> bool:
        return True

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of `input_ids` this cache covers, padding included."""
        return self.seen_tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.state = self.state.take(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = [row for row in range(self.state.batch_size) for _ in range(repeats)]
        self.state = self.state.take(rows)

    def crop(self, max_length: int) -> None:
        raise ConfigError("a recurrent state cannot be cropped; keep the State of that point")


class SpikelmForCausalLM(PreTrainedModel, GenerationMixin):
    """`LanguageModel` behind transformers' interface; generate() batches with left padding.

    Each row is computed without its padding, so a padded row equals the same row alone.
    """

    config_class = SpikelmConfig
    base_model_prefix = ""
    _is_stateful = True
    _tied_weights_keys = {"model.head.linear.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: SpikelmConfig) -> None:
        super().__init__(config)
        self.model = LanguageModel(config.model_config)
        if use_coding(self.model, vars(config), "this model"):
            # In half precision thresholds and scales would be others; the weights are integers.
            self._keep_in_fp32_modules_strict = [
                name for name, tensor in self.state_dict().items() if tensor.is_floating_point()
            ]
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but a missing, unknown or misshapen tensor is an error."""
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            names = sorted(map(str, info.get(problem) or ()))
            if names:
                raise CheckpointError(
                    f"{args[0]}: {len(names)} {problem.replace('_', ' ')} ({names[0]}); "
                    "config.json and weights belong to different models"
                )
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers; a spike-coded model takes its manifest along."""
        source = self.name_or_path or ""
        manifest = Path(source) / MANIFEST
        if self.config.spike_coding is not None and not manifest.is_file():
            raise CheckpointError(f"no {MANIFEST} in '{source}'; load the model from its folder")
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.config.spike_coding is not None:
            target = Path(save_directory) / MANIFEST
            if target.resolve() != manifest.resolve():
                shutil.copyfile(manifest, target)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _init_weights(self, module: nn.Module) -> None:
        own = list(module.parameters(recurse=False))
        loaded = any(getattr(p, "_is_hf_initialized", False) for p in own)
        if not loaded:
            reset_parameters(module)

    def get_input_embeddings(self) -> nn.Module:
        embedding: nn.Module = self.model.embedding
        return embedding

    def get_output_embeddings(self) -> nn.Module:
        linear: nn.Module = self.model.head.linear
        return linear

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        raise ConfigError("the vocabulary is the tokenizer's; train a model for another one")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """input_ids [B, T]; attention_mask [B, T or more] is 0 at padding. Logits [B, T, N]
        (zeros at padding), or those of the last `logits_to_keep` tokens.
        """
        T = input_ids.shape[1]
        state = past_key_values.state if past_key_values is not None else None
        mask = None if attention_mask is None else attention_mask[:, -T:].bool()
        last_only = logits_to_keep == 1
        losses: list[Tensor] | None = [] if labels is not None and self.training else None
        if mask is None or bool(mask.all()):
            logits, state = self._run(input_ids, state, last_only, losses)
        else:
            logits, state = self._run_padded(input_ids, mask, state, last_only, losses)
        logits = logits[:, -logits_to_keep:]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
            loss = sum(losses or (), start=loss)
        cache = None
        if use_cache is not False and labels is None:
            cache = past_key_values if past_key_values is not None else StateCache(state)
            cache.state = state
            cache.seen_tokens += T
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)  # type: ignore[arg-type]
        return output if return_dict else output.to_tuple()

    def _run(
        self,
        ids: Tensor,
        state: State | None,
        last_only: bool,
        losses: list[Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        reset_id = self.config.reset_token_id
        return run(self.model, ids, state, reset_id=reset_id, last_only=last_only, losses=losses)

    def _run_padded(
        self,
        ids: Tensor,
        mask: Tensor,
        state: State | None,
        last_only: bool,
        losses: list[Tensor] | None,
    ) -> tuple[Tensor, State]:
        """Row by row without the padding; real tokens must lie together."""
        T = ids.shape[1]
        logits, states = [], []
        for row in range(ids.shape[0]):
            real = mask[row].nonzero().flatten().tolist()
            if not real or real[-1] - real[0] + 1 != len(real):
                raise ConfigError(
                    f"attention_mask row {row} must mark one run of real tokens, "
                    "padding only before or after it"
                )
            before = None if state is None else state.take([row])
            tokens = ids[row : row + 1, real[0] : real[-1] + 1]
            with shared_losses(losses, tokens.shape[1] / int(mask.sum())) as terms:
                out, after = self._run(tokens, before, last_only, terms)
            padding = (0, 0) if last_only else (real[0], T - 1 - real[-1])
            logits.append(F.pad(out, (0, 0, *padding)))
            states.append(after)
        return torch.cat(logits), State.merge(states)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        past_key_values: StateCache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        if past_key_values is not None:
            input_ids = input_ids[:, past_key_values.get_seq_length() :]
        return {
            "input_ids": input_ids,
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": kwargs.get("use_cache"),
            "logits_to_keep": kwargs.get("logits_to_keep", 0),
        }


AutoConfig.register(MODEL_TYPE, SpikelmConfig)
AutoModelForCausalLM.register(SpikelmConfig, SpikelmForCausalLM)
