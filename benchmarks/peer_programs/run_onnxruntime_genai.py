"""onnxruntime-genai. Format: int4, by its model builder."""

import subprocess
import sys

from common import THREADS, Generate, Task, main


def prepare(task: Task) -> None:
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", task.model, "-o", task.work]
    subprocess.run([*builder, "-p", task.format, "-e", "cpu", "-c", task.work / "cache"], check=True, stdout=sys.stderr)


def load(task: Task) -> Generate:
    import onnxruntime_genai

    config = onnxruntime_genai.Config(str(task.work))
    config.overlay(f'{{"model": {{"decoder": {{"session_options": {{"intra_op_num_threads": {THREADS}}}}}}}}}')
    network = onnxruntime_genai.Model(config)

    def generate(prompts, steps):
        params = onnxruntime_genai.GeneratorParams(network)
        params.set_search_options(
            max_length=len(prompts[0]) + steps + 2, batch_size=len(prompts), do_sample=False, min_length=task.longest
        )
        generator = onnxruntime_genai.Generator(network, params)
        generator.append_tokens(prompts)
        for _ in range(steps + 1):
            generator.generate_next_token()
            yield

    return generate


main(load, prepare)
