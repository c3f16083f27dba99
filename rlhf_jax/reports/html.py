"""The report: one self-contained HTML file of one or several runs, and a script file with the samples beyond it.

Tables are HTML. Curves, charts and the explorer of samples are drawn by the scripts in `assets` from one JSON object.
"""

import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from rlhf_jax.reports import charts, style
from rlhf_jax.reports.calibration_section import calibration
from rlhf_jax.reports.cautions import of_several
from rlhf_jax.reports.curve_data import curves
from rlhf_jax.reports.data_section import data
from rlhf_jax.reports.markup import chart, text
from rlhf_jax.reports.origins import origins
from rlhf_jax.reports.results_section import equal_kl, first_screen, mistrusted, results
from rlhf_jax.reports.run import Run
from rlhf_jax.reports.sample_data import embedded, samples, script
from rlhf_jax.reports.settings import configs
from rlhf_jax.reports.snapshot import Snapshot
from rlhf_jax.reports.stage_sections import stages
from rlhf_jax.runtime.files import write_text
from rlhf_jax.types import Json

FRONTIER = (
    "Bars: ±1 standard error over prompts; with several seeds, small points are seeds and the large one is their mean, "
    "with the standard error over seeds. Green: Best-of-N for every n up to the pool size (band: ±1 standard error), "
    "shifted so that n = 1 is at the reference's score, since it is measured on other prompts."
)
BEST_OF_N = (
    "Gain from choosing the best of n by the reward model, in the reward model's score and in the judge's; an unbiased "
    "estimate for every n from one pool of samples per prompt. Bands: ±1 standard error over prompts. Where the lines "
    "diverge, the reward model is being over-optimised (Gao et al. 2022, fig. 1)."
)
LENGTHS = (
    "Small points: answers. Large points: means over fifths of a method's answers by length, ± standard error. A slope "
    "means that longer answers score differently."
)
CHECKPOINTS = "One line per method and seed, one point per checkpoint."

SCRIPTS = ("uPlot.iife.min.js", "charts.js", "curves.js", "tokens.js", "explorer.js")


class Page(NamedTuple):
    """A report: its HTML, and the script with the samples that are not in it, if there are any."""

    html: str
    samples: str | None


def write_page(runs: Sequence[Run], path: Path) -> None:
    """Write a report and, before it, the samples that it does not hold, to a script named after it."""
    beside, end = path.with_suffix(".samples.js"), mark(runs)
    made = page(named([Snapshot(run) for run in runs]), beside.name)
    if made.samples is None:
        beside.unlink(missing_ok=True)
    else:
        write_text(beside, made.samples)
    write_text(path, made.html + end)


def mark(runs: Sequence[Run]) -> str:
    """Return a comment at the end of a page that identifies the complete stages of its runs."""
    found = hashlib.sha256()
    for run in runs:
        for name in sorted(filter(run.is_complete, run.stages)):
            found.update(f"{name} {(run.directory(name) / 'complete.json').read_text()}".encode())
    return f"\n<!-- {found.hexdigest()} -->\n"


def named(runs: Sequence[Run]) -> dict[str, Run]:
    """Name runs after their directories, with as many parents as tell them apart."""
    paths = [run.workdir.resolve() for run in runs]
    parts = 1
    while len({path.parts[-parts:] for path in paths}) < len(set(paths)):
        parts += 1
    return {"/".join(path.parts[-parts:]): run for path, run in zip(paths, runs, strict=True)}


def page(runs: Mapping[str, Run], samples_file: str) -> Page:
    """Render a report of named runs, which loads the samples beyond it from `samples_file` in its directory."""
    found, title = samples(runs), " and ".join(runs) if len(runs) < 3 else f"{len(runs)} runs"
    payload = {
        "palette": {name: [style.PALETTE[name], style.DARK[style.PALETTE[name]]] for name in style.PALETTE},
        "curves": curves(runs),
        "charts": charts.all_charts(runs),
        "samples": {
            "writers": found.writers,
            "rows": found.inline,
            "more": 0 if found.rest is None else len(found.rest["writer"]),
            "file": samples_file,
            "tokens": found.with_tokens,
            "compare": found.default,
        },
    }
    sections = [*_sections(runs, payload)]
    links = "".join(f'<a href="#{name}">{text(heading)}</a>' for name, heading, _ in sections)
    body = "".join(
        f'<section id="{name}"><h2>{text(heading)}</h2>{content}</section>' for name, heading, content in sections
    )
    several = len(runs) > 1
    heads = mistrusted(of_several(runs)) + "".join(
        (f'<article class="run"><h2>{text(name)}</h2>' if several else "")
        + first_screen(run)
        + ("</article>" if several else "")
        for name, run in runs.items()
    )
    css = f":root {{ {_colours(0)} }} @media (prefers-color-scheme: dark) {{ :root {{ {_colours(1)} }} }}"
    return Page(
        "\n".join(
            [
                "<!DOCTYPE html>",
                '<html lang="en"><head><meta charset="utf-8">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                f"<title>{text(title)} · rlhf_jax</title>",
                f"<style>{css}\n{_asset('uPlot.min.css')}\n{_asset('report.css')}</style></head>",
                f'<body><a class="skip" href="#main">Skip to the content</a><nav aria-label="Sections">{links}</nav>',
                f'<main id="main"><header><h1>{text(title)}</h1>{heads}</header>{body}</main>',
                f'<script type="application/json" id="report-data">{embedded(payload)}</script>',
                *(f"<script>{_asset(name)}</script>" for name in SCRIPTS),
                "</body></html>",
                "",
            ]
        ),
        None if found.rest is None else script(found.rest),
    )


def _sections(runs: Mapping[str, Run], payload: Mapping[str, Json]) -> list[tuple[str, str, str]]:
    """Id, heading and content of each section that has something to show."""
    drawn = payload["charts"]

    def of_runs(render: Mapping[str, str]) -> str:
        several = len([content for content in render.values() if content]) > 1
        return "".join(
            (f"<h3>{text(name)}</h3>" if several and content else "") + content for name, content in render.items()
        )

    def each(name: str, title: str, caption: str, *, headed: bool = False) -> str:
        ids = {run: f"{name}-{i}" for i, run in enumerate(runs) if f"{name}-{i}" in drawn}
        return of_runs({run: chart(place, title, caption, headed=headed) for run, place in ids.items()})

    evaluated = {name: run for name, run in runs.items() if run.of_kind("evaluate", complete=True)}
    frontier = chart("frontier", "Score against KL", FRONTIER, headed=False) if "frontier" in drawn else ""
    frontier += each("checkpoints", "Score against KL at every checkpoint", CHECKPOINTS, headed=True)
    found = [
        ("results", "Results", of_runs({name: results(run) for name, run in evaluated.items()})),
        ("curves", "Curves", '<div id="curves-view"></div>' if payload["curves"] else ""),
        ("samples", "Samples", '<div id="samples-view"></div>' if payload["samples"]["writers"] else ""),
        ("frontier", "Score against KL", frontier + of_runs({name: equal_kl(run) for name, run in runs.items()})),
        ("best-of-n", "Best-of-N", each("best-of-n", "Best-of-N, by the reward model and by the judge", BEST_OF_N)),
        (
            "calibration",
            "Reward model",
            of_runs({name: calibration(run, i) for i, (name, run) in enumerate(runs.items())}),
        ),
        ("lengths", "Length", each("lengths", "Length against score", LENGTHS)),
        ("data", "Data", of_runs({name: data(run) for name, run in runs.items()})),
        ("configs", "Configs", configs(runs)),
        ("throughput", "Throughput", of_runs({name: stages(run) for name, run in runs.items()})),
        ("origins", "Where the numbers come from", of_runs({name: origins(run) for name, run in runs.items()})),
    ]
    return [section for section in found if section[2]]


def _asset(name: str) -> str:
    return resources.files("rlhf_jax.reports").joinpath("assets", name).read_text(encoding="utf-8")


def _colours(scheme: int) -> str:
    """CSS variables of a colour scheme: 0 for light, 1 for dark."""
    roles = {"ink": style.INK, "muted": style.MUTED, "rule": style.RULE, "paper": style.PAPER, **style.PALETTE}
    return " ".join(f"--{name}: {style.DARK[colour] if scheme else colour};" for name, colour in roles.items())
