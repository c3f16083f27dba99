"""`Run`: read a work directory from Python, also while the experiment is running."""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from rlhf_jax import config as configs
from rlhf_jax.data.pipeline import Content, DataConfig
from rlhf_jax.inference.sample import draw_responses
from rlhf_jax.loading import pretrained, stage_models
from rlhf_jax.loading.models import Policy, RewardModel
from rlhf_jax.rewards import tfidf
from rlhf_jax.rewards.gold_judges import JUDGE_FILE
from rlhf_jax.runtime.files import read_json, read_rows
from rlhf_jax.runtime.workdir import read_record
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
"""First columns of results.csv, in order."""

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
"""Further columns of results.csv, if the evaluation measured them."""


class Run:
    """Stages, tables and models of an experiment in `workdir`; stages missing there are looked up in `inputs`.

    By default, `inputs` is the directory that the experiment was last run with.
    """

    def __init__(self, workdir: str | Path, inputs: str | Path | None = None) -> None:
        """Open a work directory. Raises RlhfError if a directory does not exist."""
        self.workdir = Path(workdir)
        self.inputs = read_record(self.workdir).inputs if inputs is None else Path(inputs)
        for path in filter(None, (self.workdir, self.inputs)):
            if not path.is_dir():
                raise RlhfError(f"work directory {path} does not exist: give the --workdir of an experiment")

    def __repr__(self) -> str:
        return f"Run({str(self.workdir)!r}): {', '.join(self.stages) or 'no stage yet'}"

    # ---- stages ----------------------------------------------------------------------------------------------------

    @property
    def stages(self) -> list[str]:
        """Names of started and complete stages, each after the stages that it reads, otherwise by start time."""
        directories = self._directories()
        inputs = {name: set(self._read_config(directory)["inputs"]) for name, directory in directories.items()}
        ordered: list[str] = []
        waiting = sorted(directories, key=lambda name: ((directories[name] / "config.json").stat().st_mtime_ns, name))
        while waiting:
            ready = (name for name in waiting if not inputs[name] & set(waiting))
            ordered.append(next(ready, waiting[0]))
            waiting.remove(ordered[-1])
        return ordered

    def directory(self, stage: str) -> Path:
        """Directory of a stage. Raises RlhfError, listing the stages, if the run has no such stage."""
        directories = self._directories()
        if stage not in directories:
            known = ", ".join(self.stages) or "none yet"
            raise RlhfError(f"{self.workdir} has no stage {stage!r}; its stages: {known}")
        return directories[stage]

    def is_complete(self, stage: str) -> bool:
        """Return whether a stage is complete."""
        return (self.directory(stage) / "complete.json").exists()

    def config(self, stage: str) -> dict[str, Any]:
        """Config of a stage: `section` (its own section), `common` (seed, data, ...) and `inputs`."""
        return self._read_config(self.directory(stage))

    def data(self, stage: str) -> DataConfig:
        """The data section that a stage was run with."""
        return configs.build(DataConfig, self.config(stage)["common"]["data"], f"{stage}/config.json: common.data")

    def kind(self, stage: str) -> str:
        """Kind of a stage, such as `dpo`."""
        return self.config(stage)["section"]["kind"]

    def of_kind(self, kind: str, *, complete: bool = False) -> list[str]:
        """Stages of a kind, in order; with `complete=True`, only complete ones."""
        return [name for name in self.stages if self.kind(name) == kind and (not complete or self.is_complete(name))]

    def summary(self, stage: str) -> dict[str, Any]:
        """Content of a complete stage's summary.json, including `time/seconds`."""
        return read_json(self._file(stage, "summary.json"))

    # ---- tables ----------------------------------------------------------------------------------------------------

    def metrics(self, stage: str) -> pd.DataFrame:
        """Metrics of a training stage, one row per step and seed; a partially written row is left out."""
        return _table(self._file(stage, "metrics.jsonl"), ["step", "seed"])

    def samples(self, stage: str) -> pd.DataFrame:
        """Samples of a stage: `step, seed, prompt, completion, score, kl, length`.

        Evaluations add `method` and `gold`; their `step` numbers the prompts.
        """
        columns = ["step", "seed", "prompt", "completion", "score", "kl", "length"]
        return _table(self._file(stage, "samples.jsonl"), columns)

    def pairs(self, stage: str) -> pd.DataFrame:
        """`prompt, chosen, rejected` of a preferences stage's training pairs, with their scores if there are any."""
        return _table(self._file(stage, "preferences.jsonl"), ["prompt", "chosen", "rejected"])

    def results(self) -> pd.DataFrame:
        """Results on the test split, one row per method and seed; gold columns are NaN without a gold judge."""
        return self._results("results.jsonl")

    def win_rates(self) -> pd.DataFrame:
        """Win rates on the test split of every method and seed against every opponent (`against`, `against_seed`)."""
        path = self.directory(self.evaluation()) / "win_rates.jsonl"  # not written by older releases
        return _table(path, ["method", "seed", "against", "against_seed", "n_prompts", "win_rate"])

    def selection(self) -> pd.DataFrame:
        """Results on the evaluation split, which is used to select hyperparameters such as beta."""
        return self._results("selection.jsonl")

    def selected(self) -> list[str]:
        """Method selected on the evaluation split for each kind with several compared stages."""
        stage = self.evaluation()
        compared = [name for name in self.results()["method"].unique() if name in self.stages]
        kinds = [self.kind(name) for name in compared]
        return [name for kind, name in self.summary(stage)["selected"].items() if kinds.count(kind) > 1]

    def best_of_n_curve(self, stage: str) -> pd.DataFrame:
        """`n, kl, proxy, proxy_se, gold, gold_se` for every n that a best_of_n stage reports; NaN if not measured."""
        table = _table(self._file(stage, "curve.jsonl"), ["n", "kl", "proxy", "proxy_se", "gold", "gold_se"])
        return table.astype({column: float for column in table.columns.drop("n")})

    def points(self, stage: str) -> pd.DataFrame:
        """Checkpoints measured by a frontier stage; the reference of the divergence comes first."""
        return _table(self._file(stage, "points.jsonl"), ["method", "seed", "step", "kl", "kl_se", "gold", "gold_se"])

    def matched(self, stage: str) -> pd.DataFrame:
        """Gold score of each method at each KL, interpolated by a frontier stage."""
        return _table(self._file(stage, "matched.jsonl"), ["method", "kl", "seeds", "reached", "gold", "gold_se"])

    def at_kl(self, stage: str) -> pd.DataFrame:
        """Gold score of each seed at each KL; empty for frontier stages of older releases."""
        return _table(self.directory(stage) / "at_kl.jsonl", ["method", "seed", "kl", "gold"])

    def evaluation(self) -> str:
        """Name of the last complete stage of kind evaluate. Raises RlhfError if there is none."""
        found = self.of_kind("evaluate", complete=True)
        if not found:
            known = ", ".join(self.stages) or "none yet"
            raise RlhfError(f"{self.workdir} has no complete stage of kind 'evaluate'; its stages: {known}")
        return found[-1]

    # ---- models ----------------------------------------------------------------------------------------------------

    def load_policy(self, stage: str, seed: int | None = None, step: int | None = None) -> Policy:
        """Load a stage's policy, by default of its first seed and newest checkpoint."""
        return stage_models.load_stage_policy(
            self.directory(stage), seed=self._seed(stage) if seed is None else seed, step=step, find=self.directory
        )

    def load_model(self, stage: str, seed: int | None = None) -> Policy | RewardModel:
        """Load the policy or reward model that a stage trained."""
        return stage_models.load_stage(
            self.directory(stage), seed=self._seed(stage) if seed is None else seed, find=self.directory
        )

    def load_reward_model(self, stage: str) -> RewardModel:
        """Load a stage's reward model."""
        return stage_models.load_stage_reward_model(self.directory(stage), find=self.directory)

    def load_judge(self) -> tfidf.TfidfJudge | None:
        """Load the gold judge of the evaluation, or else of the last stage that has a judge; None if there is none."""
        users = self.of_kind("evaluate", complete=True)[-1:] or reversed(self.stages)
        judges = (self.config(name)["section"].get("judge") for name in users)
        names = (judge for judge in judges if isinstance(judge, str))  # an HTTP judge is a section
        stage = next((name for name in names if name in self._directories() and self.is_complete(name)), None)
        fitted = stage is not None and (self.directory(stage) / JUDGE_FILE).exists()  # a judge may be a reward model
        return tfidf.load(self.directory(stage) / JUDGE_FILE) if stage is not None and fitted else None

    def reward_model_of(self, stage: str) -> str | None:
        """Name of a complete reward-model stage with this stage's tokenizer, or None.

        Candidates in order: the reward model of the stage itself, of evaluate, ppo and best_of_n stages, and any other.
        """
        tokenizer = (self._file(stage, "tokenizer") / TOKENIZER_FILE).read_bytes()
        users = [stage, *self.of_kind("evaluate"), *self.of_kind("ppo"), *self.of_kind("best_of_n")]
        sources = [self.config(name)["section"].get("reward_model") for name in users]
        names = [source.get("model") if isinstance(source, dict) else source for source in sources]
        for name in [*filter(None, names), *reversed(self.of_kind("reward_model", complete=True))]:
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
        """Sample n responses to each prompt from a stage's policy; see `inference.sample`.

            run.sample(["The film"], stage="ppo", n=4, temperature=0.7)

        Args: seed is the random seed of sampling; policy_seed selects the policy if the stage trained several; options
        are those of `inference.sample`, but max_new_tokens defaults to the experiment's data.max_response_tokens.

        Returns: `prompt, completion, score, kl`. The score is that of the experiment's reward model, NaN without one;
        `kl` is in nats, from the policy that the stage started from, and 0 for a policy trained from scratch.

        Raises RlhfError as `inference.sample` does, and if a prompt has more than data.max_prompt_tokens tokens.
        """
        sampling_options, data = configs.build(SamplingOptions, options, "sample"), self.data(stage)
        start = self.config(stage)["section"].get("policy")
        responses = draw_responses(
            self.load_policy(stage, policy_seed),
            prompts,
            sampling_options,
            n=n,
            seed=seed,
            reward=self.find_reward_model(stage),
            reference=None if start is None else self._policy(start),
            max_prompt_tokens=data.max_prompt_tokens,
            max_new_tokens=data.max_response_tokens,
        )
        return responses.assign(kl=0.0) if start is None else responses

    def _policy(self, source: str) -> Policy:
        return self.load_policy(source) if source in self.stages else pretrained.load_policy(source)

    # ---- files -----------------------------------------------------------------------------------------------------

    def _directories(self) -> dict[str, Path]:
        """Map stages to directories: started ones in `workdir`, then complete ones in `inputs` that belong to them."""
        found = {path.parent.name: path.parent for path in self.workdir.glob("*/config.json")}
        if self.inputs is not None:
            others = {path.parent.name: path.parent for path in self.inputs.glob("*/complete.json")}
            found |= {name: others[name] for name in self._belonging(self.inputs, others, here=set(found))}
        return found

    def _belonging(self, inputs: Path, others: Iterable[str], *, here: set[str]) -> list[str]:
        """Return the stages in `inputs` that were made from this run's stages, rather than from one rerun here.

        Args: others are the names of the complete stages in `inputs`, here those of the stages in `workdir`.
        """
        stages = here | {path.parent.name for path in inputs.glob("*/config.json")}

        def directory(name: str) -> Path:
            return self.workdir / name if name in here else inputs / name

        @functools.cache
        def belongs(name: str) -> bool:
            for source, fingerprint in self._read_config(directory(name))["inputs"].items():
                if source not in stages:  # a checkpoint or a Python file
                    continue
                marker = directory(source) / "complete.json"
                if not marker.exists() or read_json(marker)["fingerprint"] != fingerprint or not belongs(source):
                    return False
            return True

        return [name for name in others if name not in here and belongs(name)]

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
