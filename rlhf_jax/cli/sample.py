"""`rlhf-jax sample`: continuations of prompts, or answers to them."""

import argparse
from collections.abc import Sequence

import jax

from rlhf_jax import config as configs
from rlhf_jax.cli import flags
from rlhf_jax.data.pipeline import DataConfig
from rlhf_jax.loading.models import Policy, RewardModel
from rlhf_jax.loading.samples import respond
from rlhf_jax.reports.run import Run, encode_prompt
from rlhf_jax.sampling.batches import score_all
from rlhf_jax.types import RlhfError, Rollout

BATCH = 128  # rows at a time
ROWS = 4 * BATCH  # between two prints
DESCRIPTION = """\
Prints what a model writes after each prompt. A prompt is plain text; with --chat it is a user's message, and what is
printed is the answer. Of a stage whose experiment has a reward model, each line begins with the response's score.
"""


def sample_verb(arguments: list[str]) -> None:
    """Prints responses to prompts, with scores where there is something to score them by."""
    parser = flags.Parser("rlhf-jax sample", DESCRIPTION)
    flags.add_model_flags(parser)
    parser.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="may be given several times")
    parser.add_argument("--chat", action="store_true", help="the prompt is a message to the assistant")
    parser.add_argument("--n", type=int, help="responses to each prompt (default 4, and 1 at temperature 0)")
    flags.add_sampling_flags(parser)
    options = parser.parse_args(arguments)
    n = options.n if options.n is not None else 4 if options.temperature else 1
    if n < 1:
        raise RlhfError(f"--n={n} must be at least 1")
    policy = flags.load_policy(options)
    run = None if options.model is not None else Run(options.workdir, options.inputs)
    data = None if run is None else _data(run, options.stage)
    prompts = [_encode(policy, prompt, options.chat, data) for prompt in options.prompt]
    sampling = flags.sampling(options, policy, 128 if data is None else data.max_response_tokens)
    flags.within_context(policy, max(prompts, key=len), sampling)
    judge = None if run is None else _judge(run, options.stage)
    at_once = max(1, ROWS // n)
    with flags.until_closed():
        for start in range(0, len(prompts), at_once):
            asked = prompts[start : start + at_once]
            found = respond(
                policy,
                asked,
                jax.random.key(options.seed),
                sampling,
                options.stop,
                samples=n,
                batch_size=min(BATCH, len(asked) * n),
                first=start,
            )
            scores = _scores(judge, found.rollout)
            for row, (text, score) in enumerate(zip(found.texts, scores, strict=True), start=start * n):
                _show(options, options.prompt[row // n], text, score, first=row == 0)


def _encode(policy: Policy, prompt: str, chat: bool, data: DataConfig | None) -> list[int]:
    if chat:
        return flags.chat_prompt(policy, [{"role": "user", "content": prompt}])
    if data is not None:
        return encode_prompt(prompt, policy.tokenizer, data.max_prompt_tokens)
    return flags.text_prompt(policy, prompt)


def _data(run: Run, stage: str) -> DataConfig:
    return configs.build(DataConfig, run.config(stage)["common"]["data"], f"{stage}/config.json: common.data")


def _judge(run: Run, stage: str) -> RewardModel | None:
    name = run.reward_model_of(stage)
    return None if name is None else run.load_reward_model(name)


def _scores(judge: RewardModel | None, rollout: Rollout) -> Sequence[float | None]:
    if judge is None:
        return [None] * len(rollout.response)
    return score_all(judge.network, judge.params, rollout, min(BATCH, len(rollout.response))).tolist()


def _show(options: argparse.Namespace, prompt: str, text: str, score: float | None, *, first: bool) -> None:
    shown = text if options.chat else prompt + text
    if options.model is None:
        print(f"{'       ' if score is None else f'{score:+7.3f}'}  {shown}")
        return
    if not first:
        print()  # answers may have several lines
    print(shown)
