"""The engine for asyncio: every request is a generator of outputs, many at once.

python async_llm_engine.py --model /path/to/artifact --devices cpu
"""

import argparse
import asyncio

from furiosa_build.runtime import AsyncEngineArgs, AsyncLLMEngine, SamplingParams

PROMPTS = ["A robot may not injure a human being", "To be or not to be,", "It is only the heart"]


async def generate(engine: AsyncLLMEngine, prompt: str, request_id: str) -> None:
    """Prints the whole text when it is finished. Every output on the way has the text so far."""
    sampling_params = SamplingParams(temperature=0.8, top_p=0.95, seed=1, max_tokens=24)
    async for output in engine.generate(prompt, sampling_params, request_id):
        if output.finished:
            print(f"request {output.request_id}: {output.prompt!r} -> {output.outputs[0].text!r}")


async def run(engine_args: AsyncEngineArgs) -> None:
    async with AsyncLLMEngine.from_engine_args(engine_args) as engine:
        await asyncio.gather(*(generate(engine, prompt, str(number)) for number, prompt in enumerate(PROMPTS)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Demo on using the AsyncLLMEngine class directly")
    AsyncEngineArgs.add_cli_args(parser)
    asyncio.run(run(AsyncEngineArgs.from_cli_args(parser.parse_args())))


if __name__ == "__main__":
    main()
