"""The engine step by step: requests come and go while others run.

python llm_engine.py --model /path/to/artifact --devices cpu
"""

import argparse

from furiosa_build.runtime import EngineArgs, LLMEngine, SamplingParams


def create_test_prompts() -> list[tuple[str, SamplingParams]]:
    """Prompts, each with its sampling parameters."""
    return [
        ("A robot may not injure a human being", SamplingParams(temperature=0.0, max_tokens=24)),
        ("To be or not to be,", SamplingParams(temperature=0.8, top_k=5, max_tokens=24)),
        ("It is only the heart", SamplingParams(temperature=0.8, top_p=0.95, seed=1, max_tokens=24)),
    ]


def process_requests(engine: LLMEngine, test_prompts: list[tuple[str, SamplingParams]]) -> None:
    """Gives the engine one more request after every step, and prints what is finished."""
    waiting = [(str(number), *prompt) for number, prompt in enumerate(test_prompts)]
    while waiting or engine.has_unfinished_requests():
        if waiting:
            engine.add_request(*waiting.pop(0))
        for output in engine.step():
            if output.finished:
                print(f"request {output.request_id}: {output.prompt!r} -> {output.outputs[0].text!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Demo on using the LLMEngine class directly")
    EngineArgs.add_cli_args(parser)
    engine_args = EngineArgs.from_cli_args(parser.parse_args())
    engine = LLMEngine.from_engine_args(engine_args)
    process_requests(engine, create_test_prompts())


if __name__ == "__main__":
    main()
