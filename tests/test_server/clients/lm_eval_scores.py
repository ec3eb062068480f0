"""lm-eval: a multiple-choice and a perplexity task, by its `local-completions` and by its own `hf` model.

usage: lm_eval_scores.py URL MODEL_DIRECTORY; prints one JSON object: run -> task -> what its samples were given.
`served` has the server's tokenizer, which lm-eval finds; `with a tokenizer` is given one.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import lm_eval
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

url, directory = sys.argv[1:]

QUESTIONS = [
    {"question": "It was a", "choices": [" bright day", " dark night", " fish"], "answer": 0},
    {"question": "She looked at the", "choices": [" sea", " of", " gentleman with some surprise"], "answer": 2},
    {"question": "He had never", "choices": [" been so happy", " the the"], "answer": 0},
]
TEXTS = [
    {"text": "It is a truth universally acknowledged, that a single man must be in want of a wife."},
    {"text": "The sea was calm. " * 12},
]


def task(name: str, documents: list[dict[str, Any]], **config: Any) -> ConfigurableTask:
    splits = {"test": Dataset.from_list(documents)}
    fields = {"task": name, "custom_dataset": lambda **_: splits, "test_split": "test", **config}
    return ConfigurableTask(config=fields)


def tasks() -> list[ConfigurableTask]:
    return [
        task(
            "choices",
            QUESTIONS,
            output_type="multiple_choice",
            doc_to_text="{{question}}",
            doc_to_choice="choices",
            doc_to_target="answer",
            target_delimiter="",
            metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
        ),
        task(
            "texts",
            TEXTS,
            output_type="loglikelihood_rolling",
            doc_to_text="",
            doc_to_target="{{text}}",
            metric_list=[{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
        ),
    ]


LENGTH = 96
SERVED = {
    "model": "test",
    "base_url": f"{url}/v1/completions",
    "max_length": LENGTH + 2,  # lm-eval takes off a token that is generated, and in windows another
    "num_concurrent": 2,
}
TOKENIZER = {"tokenizer": directory, "tokenizer_backend": "huggingface"}
OWN = {"pretrained": directory, "dtype": "float32", "max_length": LENGTH, "device": "cpu"}

RUNS = {
    "served": ("local-completions", SERVED),
    "with a tokenizer": ("local-completions", SERVED | TOKENIZER),
    "own": ("hf", OWN),
}

found: dict[str, Any] = {}
for name, (model, arguments) in RUNS.items():
    scored = lm_eval.simple_evaluate(model=model, model_args=arguments, tasks=tasks(), bootstrap_iters=0)
    found[name] = {
        "results": scored["results"],
        "samples": {
            task_name: [sample["filtered_resps"] for sample in samples]
            for task_name, samples in scored["samples"].items()
        },
    }
print(json.dumps(found, default=str))
