"""Samples of all stages, as data for the report's explorer, `assets/explorer.js`.

The page holds the first rows. The others are in a script file beside it, which the explorer loads when it is used.
"""

import json
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from rlhf_jax.reports import frames
from rlhf_jax.reports.curve_data import rounded
from rlhf_jax.reports.markup import allowed
from rlhf_jax.reports.run import Run
from rlhf_jax.types import Json

MOST_ROWS, MOST_BYTES, MOST_OF_TOKENS = 6000, 2_500_000, 1_000_000
"""Rows of the page, at most, the bytes of their contents, and those of samples with values of tokens."""

NUMBERS = ("score", "gold", "kl", "length")


class ExplorerData(NamedTuple):
    """Samples of a report."""

    writers: list[Json]  # what wrote the answers: `label, run, stage, method, seed, colour, step`
    inline: Json  # columns of the rows in the page
    rest: Json | None  # columns of the other rows
    default: tuple[int, int] | None  # writers to compare at first: the best method and the reference
    with_tokens: int  # number of samples whose tokens have values


def samples(runs: Mapping[str, Run]) -> ExplorerData:
    """Collect the samples of all stages; those of the last evaluation come first, then those of later stages."""
    writers: list[Json] = []
    tables: list[pd.DataFrame] = []
    default: tuple[int, int] | None = None
    seen = set()
    for name, run in runs.items():
        evaluations = run.of_kind("evaluate", complete=True)
        for stage in [*reversed(evaluations), *(other for other in reversed(run.stages) if other not in evaluations)]:
            directory = run.directory(stage).resolve()  # runs may read a stage from the same --inputs
            if directory in seen or not (directory / "samples.jsonl").exists():
                continue
            seen.add(directory)
            table, first = run.samples(stage), len(writers)
            if table.empty:
                continue
            if stage in evaluations:  # all answers to a prompt, so that the page has those of every method
                table = table.sort_values("step", kind="stable")
            methods = table["method"] if "method" in table else pd.Series(stage, index=table.index)
            names = [(str(method), int(seed)) for method, seed in zip(methods, table["seed"], strict=True)]
            known = {pair: first + i for i, pair in enumerate(dict.fromkeys(names))}
            labels = frames.stage_labels(run, list(dict.fromkeys(methods.astype(str))))
            several = len(table["seed"].unique()) > 1
            for method, seed in known:
                label = labels[method] if stage in evaluations else f"{stage}, training samples"
                label += f", seed {seed}" if several else ""
                writers.append(
                    {
                        "label": f"{label} · {name}" if len(runs) > 1 else label,
                        "stage": stage,
                        "colour": frames.colour_of(run, method),
                        "step": _step(run, stage),
                    }
                )
            tables.append(table.assign(writer=[known[pair] for pair in names]))
            if default is None and stage in evaluations[-1:]:
                default = _best_and_reference(run, known)
    columns = ["writer", "step", "prompt", "completion", *NUMBERS, "tokens"]
    whole = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)
    whole = whole.reindex(columns=columns)
    whole["tokens"] = whole["tokens"].map(lambda found: _tokens(found) if isinstance(found, dict) else None)
    fits = _fits(whole)
    rest = whole[~fits]
    known = int(whole["tokens"].notna().sum())
    return ExplorerData(writers, _columns(whole[fits]), _columns(rest) if len(rest) else None, default, known)


def _fits(table: pd.DataFrame) -> pd.Series:
    """Choose the rows of the page: those with values of tokens, up to a share of its size, then the first others."""
    sizes = table[["completion", "tokens"]].map(lambda value: len(embedded(value).encode())).sum(axis=1)
    coloured = table["tokens"].notna()
    first = coloured & (sizes.where(coloured, 0).cumsum() <= MOST_OF_TOKENS)
    ordered = table.loc[(~first).sort_values(kind="stable").index]
    once = ~ordered["prompt"].duplicated()  # the page has each prompt once
    prompts = ordered["prompt"].map(lambda prompt: len(str(prompt).encode(errors="replace"))).where(once, 0)
    fits = ((sizes.loc[ordered.index] + prompts).cumsum() <= MOST_BYTES) & (np.arange(len(table)) < MOST_ROWS)
    return fits.sort_index()


def script(rest: Json) -> str:
    """Write the other rows as a script, which a page can load from a file without a server."""
    return f"reportSamples({embedded(rest)});\n"


def embedded(value: Json) -> str:
    """Encode as JSON that can stand in a script element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _columns(table: pd.DataFrame) -> Json:
    """Columns of a table, with the prompts stored once."""
    prompts = [allowed(str(prompt)) for prompt in table["prompt"]]
    numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    return {
        "prompts": list(numbers),
        "writer": [int(writer) for writer in table["writer"]],
        "step": [int(step) for step in table["step"]],
        "prompt": [numbers[prompt] for prompt in prompts],
        "text": [allowed(str(completion)) for completion in table["completion"]],
        **{name: [*_numbers(table[name])] for name in NUMBERS},
        "tokens": {i: tokens for i, tokens in enumerate(table["tokens"]) if tokens is not None},
    }


def _tokens(tokens: Mapping[str, Json]) -> Json:
    return {**tokens, "text": [allowed(text) for text in tokens["text"]]}


def _numbers(column: pd.Series) -> Iterable[float | None]:
    return (rounded(None if value is None else float(value)) for value in column)


def _step(run: Run, stage: str) -> str:
    """Name of the number that a stage writes as `step` of a sample."""
    kind = run.kind(stage)
    if kind in ("evaluate", "best_of_n"):
        return {"evaluate": "prompt", "best_of_n": "n ="}[kind]
    return frames.step_of(kind)


def _best_and_reference(run: Run, known: Mapping[tuple[str, int], int]) -> tuple[int, int] | None:
    results = frames.comparison(run)
    best, start = frames.best_method(results), frames.reference(run)
    found = [[number for (method, _), number in known.items() if method == name] for name in (best, start)]
    return (found[0][0], found[1][0]) if best != start and all(found) else None
