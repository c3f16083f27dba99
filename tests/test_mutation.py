"""The mutation tool: what it changes, which tests it runs, and that it tells a noticed change from a survivor."""

import pytest

from tests import mutation

SOURCE = """
Number = int | float

def f(x: int | None, mask) -> int | float:
    if x < 0:
        raise ValueError(f"{x - 1}")
    return jnp.where(~mask, -x + 1, jnp.maximum(x, 2))
"""


def test_each_mutant_has_one_change_outside_types_and_errors():
    found = [(mutant.line, mutant.before, mutant.after) for mutant in mutation.mutants_of("core/f", SOURCE)]
    where = "jnp.where(~mask, -x + 1, jnp.maximum(x, 2))"
    assert found == [
        (5, "x < 0", "x >= 0"),
        (7, where, "jnp.where(~mask, jnp.maximum(x, 2), -x + 1)"),
        (7, where, "-x + 1"),
        (7, "~mask", "mask"),
        (7, "-x + 1", "-x - 1"),
        (7, "jnp.maximum(x, 2)", "jnp.minimum(x, 2)"),
        (7, "-x", "x"),
    ]
    sources = [mutant.source for mutant in mutation.mutants_of("core/f", SOURCE)]
    assert len(set(sources)) == len(sources)


def test_a_modules_own_tests_run_first_and_those_of_the_whole_room_last():
    paths = mutation.tests_of("core/kl")
    assert paths[0] == "tests/core/test_kl.py"
    assert paths[-2:] == ["tests/core/test_goldens.py", "tests/core/test_axes.py"]


def test_tests_that_name_the_changed_function_or_a_caller_run_before_the_others():
    (deviation,) = (
        mutant
        for mutant in mutation.mutants("core/advantages")
        if mutant.before == "squares / (count - 1).astype(groups.dtype)"
    )
    assert deviation.function == "_deviation"
    named = mutation.tests_naming(deviation, mutation.tests_of("core/advantages"))
    file = "tests/core/test_group_advantages.py"
    assert f"{file}::test_advantages_are_the_papers_formulas" in named  # by CRITIC_FREE, and COMPUTE of the tests
    assert not any("test_advantages.py" in name or "test_axes.py" in name for name in named)


@pytest.mark.nightly
def test_the_modules_by_default_are_those_of_core(capsys):
    assert mutation.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 200 and all(line.startswith("rlhf_jax/core/") for line in lines)
    with pytest.raises(SystemExit):
        mutation.main(["core/kk"])
    assert "core/kk" in capsys.readouterr().err


@pytest.mark.nightly
def test_a_survivor_is_printed_with_its_place(monkeypatch, capsys):
    """A change in a line that tests read, and one in a function that nothing calls."""
    source = (mutation.PACKAGE / "core" / "interpolation.py").read_text()
    unread = source + "\n\ndef _unread(x):\n    return x + 1\n"
    first, *_ = mutation.mutants_of("core/interpolation", source)
    (other,) = (mutant for mutant in mutation.mutants_of("core/interpolation", unread) if mutant.before == "x + 1")
    monkeypatch.setattr(mutation, "mutants", lambda module: iter([first, other]))
    assert mutation.main(["core/interpolation", "--jobs=1"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        f"rlhf_jax/core/interpolation.py:{other.line}: x + 1 -> x - 1  (survived)",
        "core/interpolation: 1 noticed, 1 survived, 0 timed out; 0 known to change nothing",
    ]
