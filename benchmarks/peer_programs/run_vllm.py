"""vLLM for CPUs, its engine in this process. Format: bfloat16."""

import os

from common import MARGIN, THREADS, Generate, Task, main, step_through


def load(task: Task) -> Generate:
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{THREADS - 1}",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    from vllm import LLM, SamplingParams, TokensPrompt

    engine = LLM(
        str(task.model), max_model_len=task.longest + 8, max_num_seqs=32, enable_prefix_caching=False
    ).llm_engine
    numbers = iter(range(1 << 30))

    def generate(prompts, steps):
        params = SamplingParams(temperature=0, max_tokens=steps + MARGIN, ignore_eos=True, detokenize=False)
        names = [str(next(numbers)) for _ in prompts]
        for name, prompt in zip(names, prompts, strict=True):
            engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), params)
        yield from step_through(engine, names, steps)

    return generate


main(load)
