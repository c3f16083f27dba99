"""Habernal & Gurevych 2016 (ACL, P16-1150), with pretrained features: a head on a frozen language model.

Figure: Table 2, accuracy across topics of UKPConvArg1Strict, here topic by topic beside length alone.
Command: rlhf-jax reproduce habernal_2016_frozen
Hardware and cost: one CPU core; results/cpu/record.json has the seconds, nearly all of them for the forward pass.
Seeds: 8, each a fold: the head is fitted to 27 topics or so and tested on 4. Together they test all 32 topics, which
are the units of the interval. The loss is convex, so that there is nothing else to draw.
Judge and batch: no judge, the pairs were ranked by people; all pairs of the training topics at once.
Data: UKPConvArg1Strict, 11,650 pairs of 1,038 arguments (`rlhf-jax fetch convarg`, by the hashes in
rlhf_jax/data/convarg.sha256).
Deviations: SmolLM2-135M-Instruct (`smollm2`, 4-bit weights), frozen: the mean of its last hidden states over the tokens
of an argument, and a linear head without bias, fitted by the Bradley-Terry loss with an L2 penalty, instead of an SVM
with 64,000 linguistic features or a BiLSTM with GloVe vectors. 8 folds of 4 topics instead of 32 of one. The strength
of the penalty is selected on the topics of the next fold, which are left out of the fit. Topics count equally.

Power, before the run: in habernal_2016 the accuracies of topics deviate by 0.09. 32 topics then show a difference of
0.05, and of about 0.07 as one of 24 claims of this question (Holm).

Found: the head's accuracy on unseen topics is 0.814 [0.793, 0.834], above the SVM's 0.78; that it is within 0.03 of it
is inconclusive. It exceeds length's 0.774 by 0.039 [0.017, 0.062], and is above it on 24 of the 32 topics. A head of
shuffled labels is at chance (0.517). The transformer from scratch of habernal_2016, with the same folds, has 0.620 and
stays below length: the difference is that of the pretrained features.
"""

import runpy
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression

from rlhf_jax.core.statistics import t_interval
from rlhf_jax.data.pipeline import encode_pairs, ragged
from rlhf_jax.data.ragged import sequence_table
from rlhf_jax.data.rows import NO_TRUNCATION
from rlhf_jax.loading.pretrained import load_policy
from rlhf_jax.models.reading import mean_hidden, reading
from rlhf_jax.papers.claims import Above, Claim, Within
from rlhf_jax.papers.suite import Paper, Scale, read_results, results_directory
from rlhf_jax.sampling.batches import map_table
from rlhf_jax.sampling.buckets import bucketed
from rlhf_jax.types import Row

CONVARG = runpy.run_path(str(Path(__file__).parents[1] / "convarg.py"))
HABERNAL = runpy.run_path(str(Path(__file__).parents[1] / "habernal_2016" / "paper.py"))
accuracy = HABERNAL["accuracy"]
MODEL = "smollm2"
STRENGTHS = (1e-4, 1e-3, 1e-2)
"""Inverses of the penalty, as scikit-learn's C."""


def measure(scale: str, seeds: Sequence[int], workdir: Path) -> pd.DataFrame:
    """Fit a head for each fold, and compare it with length on each topic that it did not see."""
    del scale
    pairs = CONVARG["pairs"](smoke=False)
    found, rows = features(pairs, workdir / "features.npz"), []
    fold_of = CONVARG["folds_of"](pairs)
    for fold in seeds:
        following = (fold + 1) % CONVARG["FOLDS"]
        parts = {place: [row for row in pairs if fold_of[row["topic"]] == place] for place in (fold, following)}
        train = [row for row in pairs if fold_of[row["topic"]] not in parts]
        heads = [fit(train, found, strength) for strength in STRENGTHS]
        chosen = int(np.argmax([CONVARG["correct"](parts[following], scored(found, head)) for head in heads]))
        labels = np.random.default_rng(fold).random(len(train)) < 0.5
        shuffled = fit(train, found, STRENGTHS[chosen], flipped=labels)
        judges = {"model": scored(found, heads[chosen]), "shuffled": scored(found, shuffled)}
        judges["length"] = {text: float(len(text)) for text in found}
        for topic in sorted({row["topic"] for row in parts[fold]}):
            own = [row for row in parts[fold] if row["topic"] == topic]
            accuracies = {name: CONVARG["correct"](own, score_of) for name, score_of in judges.items()}
            row = {"seed": fold, "topic": topic, "pairs": len(own), "strength": STRENGTHS[chosen]}
            rows.append({**row, **accuracies})
    return pd.DataFrame(rows)


def features(pairs: Sequence[Row], file: Path) -> dict[str, np.ndarray]:
    """Mean last hidden state of every argument, in units of its standard deviation; computed once, kept in `file`."""
    texts = sorted({row[side] for row in pairs for side in ("chosen", "rejected")})
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        policy = load_policy(MODEL)
        examples, _ = encode_pairs([None] * len(texts), texts, policy.tokenizer, NO_TRUNCATION)

        @jax.jit
        def pooled(params, sequences):
            rows, _ = reading(sequences, None)
            return mean_hidden(policy.network.apply(params, *rows), sequences)

        table = sequence_table(ragged(examples))
        np.savez(file, hidden=map_table(lambda batch: pooled(policy.params, batch), table, 8, bucketed))
    with np.load(file) as arrays:
        hidden = arrays["hidden"].astype(np.float64)
    return dict(zip(texts, hidden / hidden.std(axis=0), strict=True))


def fit(rows: Sequence[Row], found: dict[str, np.ndarray], strength: float, *, flipped: np.ndarray | None = None):
    """Fit a linear head by the Bradley-Terry loss with an L2 penalty. Args: flipped marks pairs to exchange."""
    differences = np.stack([found[row["chosen"]] - found[row["rejected"]] for row in rows])
    if flipped is not None:
        differences = np.where(flipped[:, None], -differences, differences)
    signs = np.resize((1, -1), len(rows))  # the regression needs both classes
    model = LogisticRegression(C=strength, fit_intercept=False, max_iter=1000)
    return model.fit(signs[:, None] * differences, signs).coef_[0]


def scored(found: dict[str, np.ndarray], head: np.ndarray) -> dict[str, float]:
    """Score every argument."""
    return {text: float(values @ head) for text, values in found.items()}


def draw(table: pd.DataFrame) -> Figure:
    """Draw the accuracy on every topic beside length's, and the paper's means."""
    return HABERNAL["draw"](table)


def details(table: pd.DataFrame) -> pd.DataFrame:
    """Tabulate by topic the accuracy of length, of a model from scratch (habernal_2016), and of the head."""
    scratch = read_results(results_directory("habernal_2016", "cpu"))
    assert scratch is not None
    both = table.merge(scratch[["topic", "model"]], on="topic", suffixes=("", "_scratch")).sort_values("topic")
    columns = {"length": "length", "from scratch": "model_scratch", "head on SmolLM2": "model"}
    topics = both["topic"].str.strip("-").str.replace("-_", "_").str.replace("_", ": ").str.replace("-", " ")
    found = pd.DataFrame({"topic": topics, "pairs": both["pairs"]})
    last = {"topic": "mean over topics", "pairs": both["pairs"].sum()}
    for heading, column in columns.items():
        low, high = t_interval(both[column].to_numpy(), level=0.95)
        found[heading] = both[column].map("{:.3f}".format)
        last[heading] = f"{both[column].mean():.3f} [{low:.3f}, {high:.3f}]"
    return pd.concat([found, pd.DataFrame([last])], ignore_index=True)


PAPER = Paper(
    title="Which argument is more convincing? A head on frozen features of SmolLM2",
    source="ACL 2016, P16-1150",
    figure="Table 2",
    question="weak judge",
    scales={
        "cpu": Scale(
            seeds=CONVARG["FOLDS"],
            settings={"model": MODEL, "pooling": "mean", "strengths": list(STRENGTHS), "folds": CONVARG["FOLDS"]},
            cost="seven minutes of one core",
        )
    },
    measure=measure,
    draw=draw,
    details=details,
    claims=(
        Claim(
            name="a head on frozen features ranks arguments on unseen topics",
            statement="an SVM with rich linguistic features reaches an accuracy of 0.78 across topics",
            number="0.78",
            statistic=lambda table: accuracy(table, "model"),
            unit="accuracy, mean over topics",
            criterion=Within(HABERNAL["SVM"], 0.03),
            null=HABERNAL["guessing"],
        ),
        Claim(
            name="the head beats length",
            statement="longer arguments convince more often; a model learns more than that (our control)",
            number="0.771 by length",
            statistic=lambda table: accuracy(table, "model") - accuracy(table, "length"),
            unit="difference in accuracy, mean over topics",
            criterion=Above(0.0),
            null=HABERNAL["guessing"],
        ),
        Claim(
            name="a head fitted to shuffled labels ranks by chance",
            statement="the accuracy is from the labels (our control)",
            number="-",
            statistic=lambda table: table.groupby("seed")["shuffled"].mean().to_numpy(),
            unit="accuracy, mean over the topics of a fold, which share a head",
            criterion=Within(0.5, 0.1),
            null=lambda table: table.assign(shuffled=table["length"]),
        ),
    ),
)
