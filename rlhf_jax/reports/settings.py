"""Section of the report on configs: the settings in which stages of one kind differ, and every config in full."""

from collections.abc import Mapping

from rlhf_jax.reports.markup import as_json, fold, table_of, text
from rlhf_jax.reports.run import Run
from rlhf_jax.runtime.workdir import flatten
from rlhf_jax.types import Json

MISSING = "–"


def configs(runs: Mapping[str, Run]) -> str:
    """Render the differing settings of each kind with several stages, and the configs in folds."""
    stages = [(name, run, stage) for name, run in runs.items() for stage in run.stages]
    shown = {(name, stage): f"{stage} · {name}" if len(runs) > 1 else stage for name, _, stage in stages}
    kinds: dict[str, dict[str, dict[str, Json]]] = {}
    for name, run, stage in stages:
        config = run.config(stage)
        flat = flatten({"section": config["section"], "common": config["common"]})
        kinds.setdefault(run.kind(stage), {})[shown[name, stage]] = flat
    parts = []
    for kind, columns in kinds.items():
        rows = differing(columns)
        if len(columns) > 1:
            body = [[setting, *map(_value, values)] for setting, values in rows.items()]
            parts.append(f"<h3>{text(kind)}</h3>")
            parts.append(
                table_of(["setting", *columns], body) if body else f"<p>{len(columns)} stages with equal settings.</p>"
            )
    folds = "".join(
        fold(shown[name, stage], run.kind(stage), as_json(run.config(stage))) for name, run, stage in stages
    )
    note = '<p class="note">Settings that differ between stages of the same kind.</p>' if parts else ""
    return f"{note}{''.join(parts)}<h3>Configs</h3>{folds}" if stages else ""


def differing(columns: Mapping[str, dict[str, Json]]) -> dict[str, list[Json]]:
    """Settings whose values are not the same in all columns, with the value of each column; None where it has none."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = {name: [column.get(name) for column in columns.values()] for name in names}
    return {
        name.removeprefix("section."): values for name, values in rows.items() if any(v != values[0] for v in values)
    }


def _value(value: Json) -> str:
    return MISSING if value is None else str(value)
