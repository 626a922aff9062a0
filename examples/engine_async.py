"""Many callers, one engine: coroutines that ask for utterances of their own lengths, options and patience.

python examples/engine_async.py
"""

from __future__ import annotations

import asyncio

import torch

from spear_fast import DecodingOptions, Engine, TextToSemantic


async def caller(engine: Engine, number: int) -> str:
    """Asks for one utterance and says what came of it."""
    source = torch.randint(0, 100, (20 + 7 * number,), generator=torch.Generator().manual_seed(number))
    options = DecodingOptions(beam_size=1 + number % 4, max_length=8 + number)
    request = engine.submit(source, options, tag=f"caller {number}")
    if number == 5:
        # whoever no longer wants an answer gives the slot back
        request.cancel()
        return f"{request.tag}: cancelled"
    result = await asyncio.wrap_future(request)
    return f"{request.tag}: {int(result.lengths[0, 0])} tokens, score {float(result.scores[0, 0]):.2f}"


async def main() -> None:
    torch.manual_seed(0)
    model = TextToSemantic(
        64, source_depth=2, target_depth=2, heads=4, dim_head=16, num_text_token_ids=50, num_semantic_token_ids=100
    ).eval()
    # four slots for eight callers: whoever is finished leaves its slot to the next one
    with model.engine(slots=4, beams=4, max_length=16, max_source=128) as engine:
        # a thread of the engine's own runs the steps, so that no coroutine has to
        engine.start()
        for line in await asyncio.gather(*(caller(engine, number) for number in range(8))):
            print(line)
        # a request that cannot be served fails alone
        try:
            await asyncio.wrap_future(engine.submit(torch.tensor([1000])))
        except ValueError as error:
            print(f"refused: {error}")


if __name__ == "__main__":
    asyncio.run(main())
