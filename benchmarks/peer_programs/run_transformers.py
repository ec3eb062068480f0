"""transformers itself."""

import torch
from common import THREADS, Generate, Task, main
from transformers import AutoModelForCausalLM, StaticCache


def load(task: Task) -> Generate:
    torch.set_num_threads(THREADS)
    network = AutoModelForCausalLM.from_pretrained(task.model, dtype="auto")

    @torch.inference_mode()
    def generate(prompts, steps):
        cache = StaticCache(network.config, max_cache_len=len(prompts[0]) + steps + 1)
        ids, past = torch.tensor(prompts), 0
        for _ in range(steps + 1):
            places = torch.arange(past, past + ids.shape[1])
            out = network(ids, past_key_values=cache, cache_position=places, logits_to_keep=1)
            past += ids.shape[1]
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            yield

    return generate


main(load)
