"""vLLM for CPUs, its engine in this process. Format: bfloat16."""

import os

from common import THREADS, Generate, Task, main


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
        params = SamplingParams(temperature=0, max_tokens=steps + 100, ignore_eos=True, detokenize=False)
        # More tokens than are measured: the first prompt still runs when the last has its first token.
        names, waiting, done = [], set(), 0
        for prompt in prompts:
            names.append(name := str(next(numbers)))
            waiting.add(name)
            engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), params)
        while done <= steps and engine.has_unfinished_requests():
            waiting -= {output.request_id for output in engine.step() if output.outputs[0].token_ids}
            if not waiting:
                done += 1
                yield
        engine.abort_request(names)

    return generate


main(load)
