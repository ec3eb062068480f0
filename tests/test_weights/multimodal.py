"""Small multimodal models of which transformers makes a causal language model, and what it stores of them."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMultimodalLM

_TEXT: dict[str, Any] = {
    "vocab_size": 192,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_GEMMA3: dict[str, Any] = {
    "model_type": "gemma3",
    "text_config": {**_TEXT, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "vision_config": _TOWER,
    "mm_tokens_per_image": 4,
    "image_token_index": 190,
    **_IDS,
}
_GEMMA3["text_config"]["num_hidden_layers"] = 4

WHOLE: dict[str, dict[str, Any]] = {
    "gemma3": _GEMMA3,
    "gemma3 with a head": {**_GEMMA3, "tie_word_embeddings": False},
    "got_ocr2": {
        "model_type": "got_ocr2",
        "text_config": {**_TEXT, "model_type": "qwen2"},
        "vision_config": {"hidden_size": 32, "output_channels": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"image_size": 64, "mlp_dim": 32, "window_size": 2, "global_attn_indexes": [0]},
        "image_token_index": 190,
    },
    "moss_transcribe_diarize": {
        "model_type": "moss_transcribe_diarize",
        "text_config": {**_TEXT, "model_type": "qwen3"},
        "audio_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2},
        "audio_token_id": 190,
    },
    "fuyu": {
        "model_type": "fuyu",
        "text_config": {**_TEXT, "model_type": "persimmon"},
        "image_token_id": 190,
    },
}
"""transformers loads the whole model, of which the text part can be had alone."""
TEXT_ALONE: dict[str, dict[str, Any]] = {
    "qwen3_5": {
        "model_type": "qwen3_5",
        "text_config": {**_TEXT, "layer_types": ["full_attention"] * 3},
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "depth": 1,
            "num_heads": 2,
            "out_hidden_size": 64,
        },
    },
    "llama4": {
        "model_type": "llama4",
        "text_config": {**_TEXT, "intermediate_size_mlp": 96, "num_local_experts": 2, "moe_layers": [1]},
        "vision_config": _TOWER,
    },
}
"""transformers itself loads the text part alone."""


def save_multimodal(fields: dict[str, Any], directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Writes the whole model with random weights, as its own class stores it."""
    model = AutoModelForMultimodalLM.from_config(AutoConfig.for_model(**fields), dtype=dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    with redirect_stderr(io.StringIO()):
        model.save_pretrained(directory)
    return directory
