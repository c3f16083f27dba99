"""`Run`: a work directory as a notebook reads it, also while the experiment is still under way."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from rlhf_jax import config as configs
from rlhf_jax.data.pipeline import Content, DataConfig
from rlhf_jax.inference.sample import draw
from rlhf_jax.loading import models, pretrained
from rlhf_jax.loading.models import Policy, RewardModel
from rlhf_jax.rewards import tfidf
from rlhf_jax.rewards.judging import JUDGE_FILE
from rlhf_jax.runtime.files import read_json, read_rows
from rlhf_jax.sampling.options import SamplingOptions
from rlhf_jax.text.tokenizer import TOKENIZER_FILE
from rlhf_jax.types import RlhfError

RESULT_COLUMNS = (
    "method",
    "seed",
    "n_prompts",
    "gold_score",
    "gold_se",
    "win_rate",
    "win_low",
    "win_high",
    "reward_score",
    "kl",
    "kl_se",
    "length",
    "vader",
    "distinct_2",
    "seconds",
)
"""The first columns of results.csv, in their order."""

FURTHER_COLUMNS = (
    "tie_rate",
    "boot_low",
    "boot_high",
    "lc_win_rate",
    "lc_win_se",
    "kl_k3",
    "kl_k3_se",
    "ref_nll",
    "text_nll",
    "distinct_1",
    "distinct_3",
    "repetition_4",
)
"""Those that follow them, where an evaluation has measured them."""


class Run:
    """What an experiment left in `workdir`, and, for stages that are missing there, in `inputs`."""

    def __init__(self, workdir: str | Path, inputs: str | Path | None = None) -> None:
        """Reads nothing yet. Raises RlhfError where a directory does not exist."""
        self.workdir = Path(workdir)
        self.inputs = None if inputs is None else Path(inputs)
        for path in filter(None, (self.workdir, self.inputs)):
            if not path.is_dir():
                raise RlhfError(f"there is no work directory {path}: name one that an experiment has written")

    def __repr__(self) -> str:
        return f"Run({str(self.workdir)!r}): {', '.join(self.stages) or 'no stage yet'}"

    # ---- stages ----------------------------------------------------------------------------------------------------

    @property
    def stages(self) -> list[str]:
        """Names of the stages that are complete or begun, each after those it reads, otherwise as they were begun."""
        directories = self._directories()
        ordered: list[str] = []
        waiting = sorted(directories, key=lambda name: ((directories[name] / "config.json").stat().st_mtime_ns, name))
        while waiting:
            ready = (name for name in waiting if not set(self._read_config(directories[name])["inputs"]) & set(waiting))
            ordered.append(next(ready, waiting[0]))
            waiting.remove(ordered[-1])
        return ordered

    def directory(self, stage: str) -> Path:
        """Where a stage's files are. Raises RlhfError, naming the stages there are, where it has none."""
        directories = self._directories()
        if stage not in directories:
            known = ", ".join(self.stages) or "none yet"
            raise RlhfError(f"{self.workdir} has no stage {stage!r}; its stages: {known}")
        return directories[stage]

    def is_complete(self, stage: str) -> bool:
        """Whether a stage has run to its end."""
        return (self.directory(stage) / "complete.json").exists()

    def config(self, stage: str) -> dict[str, Any]:
        """All that made a stage: `section` (its part of the config), `common` (seed, data) and `inputs`."""
        return self._read_config(self.directory(stage))

    def data(self, stage: str) -> DataConfig:
        """The data section that a stage was run with."""
        return configs.build(DataConfig, self.config(stage)["common"]["data"], f"{stage}/config.json: common.data")

    def kind(self, stage: str) -> str:
        """A stage's kind, such as `dpo`."""
        return self.config(stage)["section"]["kind"]

    def of_kind(self, kind: str, *, complete: bool = False) -> list[str]:
        """The stages of a kind, in order; only complete ones if asked."""
        return [name for name in self.stages if self.kind(name) == kind and (not complete or self.is_complete(name))]

    def summary(self, stage: str) -> dict[str, Any]:
        """What a complete stage says of itself, `time/seconds` included."""
        return read_json(self._file(stage, "summary.json"))

    # ---- tables ----------------------------------------------------------------------------------------------------

    def metrics(self, stage: str) -> pd.DataFrame:
        """One row a step (and seed) of a training stage; a row that is still being written is left out."""
        return _table(self._file(stage, "metrics.jsonl"), ["step", "seed"])

    def samples(self, stage: str) -> pd.DataFrame:
        """`step, seed, prompt, completion, score, kl, length`; evaluate adds `method` and `gold`, one step a prompt."""
        columns = ["step", "seed", "prompt", "completion", "score", "kl", "length"]
        return _table(self._file(stage, "samples.jsonl"), columns)

    def results(self) -> pd.DataFrame:
        """The table on the test split: a row for every method and seed; NaN where no judge was asked."""
        return self._results("results.jsonl")

    def win_rates(self) -> pd.DataFrame:
        """Every method, and seed, against every opponent on the test split: `against` and `against_seed` name it."""
        path = self.directory(self.evaluation()) / "win_rates.jsonl"  # not written by evaluations of an older release
        return _table(path, ["method", "seed", "against", "against_seed", "n_prompts", "win_rate"])

    def selection(self) -> pd.DataFrame:
        """The same table on the evaluation split, on which beta and the like are chosen."""
        return self._results("selection.jsonl")

    def selected(self) -> list[str]:
        """The methods chosen on the evaluation split, for each kind of stage that has several."""
        stage = self.evaluation()
        compared = [name for name in self.results()["method"].unique() if name in self.stages]
        kinds = [self.kind(name) for name in compared]
        return [name for kind, name in self.summary(stage)["selected"].items() if kinds.count(kind) > 1]

    def best_of_n_curve(self, stage: str) -> pd.DataFrame:
        """`n, kl, proxy, proxy_se, gold, gold_se`, a row for every n that a best_of_n stage reports; NaN for null."""
        table = _table(self._file(stage, "curve.jsonl"), ["n", "kl", "proxy", "proxy_se", "gold", "gold_se"])
        return table.astype({column: float for column in table.columns.drop("n")})

    def points(self, stage: str) -> pd.DataFrame:
        """Every checkpoint that a frontier stage measured, the one that divergence is measured from first."""
        return _table(self._file(stage, "points.jsonl"), ["method", "seed", "step", "kl", "kl_se", "gold", "gold_se"])

    def matched(self, stage: str) -> pd.DataFrame:
        """Each method's gold score at each divergence, as a frontier stage interpolated it."""
        return _table(self._file(stage, "matched.jsonl"), ["method", "kl", "seeds", "reached", "gold", "gold_se"])

    def at_kl(self, stage: str) -> pd.DataFrame:
        """Each run's gold score at each divergence; empty for a frontier stage of an older release."""
        return _table(self.directory(stage) / "at_kl.jsonl", ["method", "seed", "kl", "gold"])

    def evaluation(self) -> str:
        """The name of the last complete stage of kind evaluate. Raises RlhfError where there is none."""
        found = self.of_kind("evaluate", complete=True)
        if not found:
            known = ", ".join(self.stages) or "none yet"
            raise RlhfError(f"{self.workdir} has no complete stage of kind 'evaluate'; its stages: {known}")
        return found[-1]

    # ---- models ----------------------------------------------------------------------------------------------------

    def load_policy(self, stage: str, seed: int | None = None, step: int | None = None) -> Policy:
        """A stage's policy: of the first of its seeds, and of its newest checkpoint, unless told otherwise."""
        return models.load_stage_policy(
            self.directory(stage), seed=self._seed(stage) if seed is None else seed, step=step, find=self.directory
        )

    def load_model(self, stage: str, seed: int | None = None) -> Policy | RewardModel:
        """A stage's policy or reward model, whichever it trained."""
        return models.load_stage(
            self.directory(stage), seed=self._seed(stage) if seed is None else seed, find=self.directory
        )

    def load_reward_model(self, stage: str) -> RewardModel:
        """A stage's reward model."""
        return models.load_stage_reward_model(self.directory(stage), find=self.directory)

    def load_judge(self) -> tfidf.TfidfJudge | None:
        """The gold judge that the experiment's results were judged by, if it has one.

        Those are the evaluation's, and where there is none what was judged last.
        """
        askers = self.of_kind("evaluate", complete=True)[-1:] or reversed(self.stages)
        asked = (self.config(name)["section"].get("judge") for name in askers)
        named = (name for name in asked if isinstance(name, str))  # one over HTTP is a section
        stage = next((name for name in named if name in self._directories() and self.is_complete(name)), None)
        fitted = stage is not None and (self.directory(stage) / JUDGE_FILE).exists()  # a judge may be a reward model
        return tfidf.load(self.directory(stage) / JUDGE_FILE) if stage is not None and fitted else None

    def reward_model_of(self, stage: str) -> str | None:
        """The reward model that a stage, or else a later one or any, scores this stage's responses by."""
        tokenizer = (self._file(stage, "tokenizer") / TOKENIZER_FILE).read_bytes()
        askers = [stage, *self.of_kind("evaluate"), *self.of_kind("ppo"), *self.of_kind("best_of_n")]
        sources = [self.config(name)["section"].get("reward_model") for name in askers]
        named = [source.get("model") if isinstance(source, dict) else source for source in sources]
        for name in [*filter(None, named), *reversed(self.of_kind("reward_model", complete=True))]:
            complete = name in self._directories() and self.is_complete(name)
            if complete and (self._file(name, "tokenizer") / TOKENIZER_FILE).read_bytes() == tokenizer:
                return name
        return None

    def find_reward_model(self, stage: str) -> RewardModel | None:
        """Load the reward model that `reward_model_of` names, or return None."""
        name = self.reward_model_of(stage)
        return None if name is None else self.load_reward_model(name)

    def sample(
        self,
        prompts: Sequence[Content],
        *,
        stage: str,
        n: int = 1,
        seed: int = 0,
        policy_seed: int | None = None,
        **options: Any,
    ) -> pd.DataFrame:
        """Draw n responses to each prompt from a stage's policy; see `inference.sample`.

            run.sample(["The film"], stage="ppo", n=4, temperature=0.7)

        Args: seed is of the random numbers; policy_seed chooses a policy where the stage trained several; options are
        those of `inference.sample`, but that max_new_tokens is the experiment's data.max_response_tokens.

        Returns: `prompt, completion, score, kl`. The score is that of the experiment's reward model, NaN without one;
        `kl` is in nats, from the policy that the stage started from, and 0 for a policy trained from scratch.

        Raises RlhfError as `inference.sample`, and where a prompt has more tokens than data.max_prompt_tokens.
        """
        how, data = configs.build(SamplingOptions, options, "sample"), self.data(stage)
        start = self.config(stage)["section"].get("policy")
        found = draw(
            self.load_policy(stage, policy_seed),
            prompts,
            how,
            n=n,
            seed=seed,
            reward=self.find_reward_model(stage),
            reference=None if start is None else self._policy(start),
            max_prompt_tokens=data.max_prompt_tokens,
            max_new_tokens=data.max_response_tokens,
        )
        return found.assign(kl=0.0) if start is None else found

    def _policy(self, source: str) -> Policy:
        return self.load_policy(source) if source in self.stages else pretrained.load_policy(source)

    # ---- where things are ------------------------------------------------------------------------------------------

    def _directories(self) -> dict[str, Path]:
        """Every stage's directory: those begun here, then those complete under `inputs` that belong to them."""
        found = {path.parent.name: path.parent for path in self.workdir.glob("*/config.json")}
        if self.inputs is not None:
            others = {path.parent.name: path.parent for path in self.inputs.glob("*/complete.json")}
            found |= {name: path for name, path in others.items() if name not in found and self._belongs(path)}
        return found

    def _belongs(self, directory: Path) -> bool:
        """Whether a stage under `inputs` was made from this run's stages, not from one that was run anew here."""
        assert self.inputs is not None
        for name, fingerprint in self._read_config(directory)["inputs"].items():
            here = self.workdir / name
            used = here if (here / "config.json").exists() else self.inputs / name
            marker = used / "complete.json"
            if not marker.exists() or read_json(marker)["fingerprint"] != fingerprint or not self._belongs(used):
                return False
        return True

    def _read_config(self, directory: Path) -> dict[str, Any]:
        return read_json(directory / "config.json")

    def _file(self, stage: str, name: str) -> Path:
        path = self.directory(stage) / name
        if not path.exists():
            have = ", ".join(sorted(entry.name for entry in path.parent.iterdir()))
            state = "" if self.is_complete(stage) else ", which is not complete,"
            raise RlhfError(f"stage {stage!r}{state} has no {name} in {path.parent}; it has {have}")
        return path

    def _seed(self, stage: str) -> int:
        spec = self.directory(stage) / "model.json"
        return read_json(spec).get("seeds", [0])[0] if spec.exists() else 0

    def _results(self, name: str) -> pd.DataFrame:
        table = _table(self._file(self.evaluation(), name), list(RESULT_COLUMNS))
        table = table[[*RESULT_COLUMNS, *(column for column in table.columns if column not in RESULT_COLUMNS)]]
        numbers = table.columns.drop("method")
        return table.astype({column: float for column in numbers.drop(["seed", "n_prompts"])})


def _table(path: Path, columns: list[str]) -> pd.DataFrame:
    rows = read_rows(path)
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=columns)
