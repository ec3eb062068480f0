"""Small models: every feature of the large ones, few numbers."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from furiosa_build.models.skeleton import make_config

_SIZES: dict[str, Any] = {
    "vocab_size": 192,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}

LLAMA: dict[str, Any] = {
    **_SIZES,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    # As in Llama 3.1, with lengths such that every frequency band is met: kept, smoothed and stretched.
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
TIED: dict[str, Any] = {**LLAMA, "tie_word_embeddings": True}
MISTRAL: dict[str, Any] = {
    **_SIZES,
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "sliding_window": 12,
}
QWEN2: dict[str, Any] = {**_SIZES, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
QWEN3: dict[str, Any] = {
    **_SIZES,
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    # Not hidden_size / num_attention_heads, as in the 0.6B and 32B models.
    "head_dim": 32,
}
GEMMA3: dict[str, Any] = {
    **_SIZES,
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "num_hidden_layers": 4,
    "head_dim": 16,
    "sliding_window": 12,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 16,
}

MODELS = {"llama": LLAMA, "tied": TIED, "mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3, "gemma3": GEMMA3}


def save_random_model(hf_config: dict[str, Any], directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Writes a model of random weights by transformers' `save_pretrained`.

    The weights are larger than an untrained model's (variance 2 / fan-in, biases and norms far from neutral): every
    part of a layer moves the logits, and the largest logit is ahead of the next by more than rounding.
    """
    model = AutoModelForCausalLM.from_config(make_config(hf_config), dtype=torch.float32)
    # Gemma multiplies embeddings by 8 (the root of hidden_size) and norms by 1 + weight.
    is_gemma = hf_config["model_type"].startswith("gemma")
    embedding_size = 0.04 if is_gemma else 0.5 if hf_config["tie_word_embeddings"] else 1.0
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(0.3 * noise + (1.0 if name.endswith("norm.weight") and not is_gemma else 0.0))
            elif "embed" in name:
                parameter.copy_(embedding_size * noise)
            else:
                parameter.copy_(1.5 * noise * parameter.shape[-1] ** -0.5)
    with redirect_stderr(io.StringIO()):  # It draws a progress bar.
        model.to(dtype).save_pretrained(directory)
    return directory


def load(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of `directory` by transformers alone, with its own attention."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
    return model.eval()


def read_config(directory: Path) -> dict[str, Any]:
    """The fields of config.json."""
    return dict(json.loads((directory / "config.json").read_text()))
