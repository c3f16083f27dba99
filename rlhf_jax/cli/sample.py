"""`rlhf-jax sample`: sample continuations of prompts, or answers to them."""

import argparse
import math

from rlhf_jax.cli import flags
from rlhf_jax.cli.output import until_closed
from rlhf_jax.cli.parser import Parser
from rlhf_jax.data.pipeline import Content
from rlhf_jax.inference.encoding import encode_prompts
from rlhf_jax.inference.sample import BATCH, MAX_NEW_TOKENS, draw_responses
from rlhf_jax.reports.run import Run
from rlhf_jax.types import RlhfError

ROWS = 4 * BATCH  # responses sampled before they are printed
DESCRIPTION = """\
Sample continuations of plain-text prompts. With --chat, each prompt is a user message, which the model answers. If
the model is a stage of an experiment with a reward model, each line starts with the response's score.
"""


def sample_verb(arguments: list[str]) -> None:
    """Print responses to prompts, with scores if the experiment has a reward model."""
    parser = Parser("rlhf-jax sample", DESCRIPTION)
    flags.add_model_flags(parser)
    parser.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="may be repeated")
    parser.add_argument("--chat", action="store_true", help="treat the prompt as a user message")
    parser.add_argument("--n", type=int, help="responses per prompt (default 4, or 1 at temperature 0)")
    flags.add_sampling_flags(parser)
    options = parser.parse_args(arguments)
    n = options.n if options.n is not None else 4 if options.temperature else 1
    if n < 1:
        raise RlhfError(f"--n={n} must be at least 1")
    sampling_options, policy = flags.sampling_options(options), flags.load_policy(options)
    reward, max_prompt_tokens, max_new_tokens = None, None, MAX_NEW_TOKENS
    if options.model is None:
        run = Run(options.workdir, options.inputs)
        reward, data = run.find_reward_model(options.stage), run.data(options.stage)
        max_prompt_tokens = None if options.chat else data.max_prompt_tokens
        max_new_tokens = data.max_response_tokens
    prompts: list[Content] = options.prompt
    if options.chat:
        prompts = [[{"role": "user", "content": prompt}] for prompt in options.prompt]
    encode_prompts(prompts, policy, max_prompt_tokens)  # reject invalid prompts before printing anything
    chunk = max(1, ROWS // n)
    with until_closed():
        for start in range(0, len(prompts), chunk):
            responses = draw_responses(
                policy,
                prompts[start : start + chunk],
                sampling_options,
                n=n,
                seed=options.seed,
                reward=reward,
                max_prompt_tokens=max_prompt_tokens,
                max_new_tokens=max_new_tokens,
                first=start,
            )
            texts = zip(responses["completion"].tolist(), responses["score"].tolist(), strict=True)
            for row, (text, score) in enumerate(texts, start=start * n):
                _show(options, options.prompt[row // n], text, score, first=row == 0)


def _show(options: argparse.Namespace, prompt: str, text: str, score: float, *, first: bool) -> None:
    shown = text if options.chat else prompt + text
    if options.model is None:
        print(f"{'       ' if math.isnan(score) else f'{score:+7.3f}'}  {shown}")
        return
    if not first:
        print()  # answers may have several lines
    print(shown)
