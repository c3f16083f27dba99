"""Devices share the work of every stage under every layout: no product is computed twice, and little travels."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax.core import masking, row_sharding
from rlhf_jax.runtime import program_costs
from rlhf_jax.runtime.programs import make_placement
from tests.support import tiny
from tests.support.layouts import BULK, CASES, DEVICES, LAYOUTS, MODEL, ROWS, Measured, measure, measure_bulk

OFFLINE = [name for name in CASES if name not in ("ppo", "grpo", "online_dpo")]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.nightly
def test_every_stage_and_layout_shares_the_work(name, layout):
    assert_shares(measure(name, LAYOUTS[layout]))


@pytest.mark.parametrize("layout", ["data=8", "fsdp=8", "pmap=8"])
@pytest.mark.parametrize("name", OFFLINE)
@pytest.mark.nightly
def test_only_weights_and_their_gradients_travel(name, layout):
    assert_moves_weights(measure(name, LAYOUTS[layout]), fsdp=layout == "fsdp=8")


WHOLE = {"fsdp=8": r"(embedding|kernel)$"}
"""Parameters that devices gather whole, by the layout. Under the others, no device ever has all of a matrix that is
split: it computes with its part or, with fsdp x tensor, gathers its part of each layer."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.nightly
def test_no_parameter_is_gathered_whole_except_where_the_table_says_so(name, layout):
    found = measure(name, LAYOUTS[layout]).whole
    assert unlisted(found, layout) == set()
    assert bool(found) == (layout in WHOLE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BULK)
@pytest.mark.nightly
def test_nor_is_one_where_samples_are_drawn_and_scored_in_bulk(name, layout):
    assert unlisted(measure_bulk(name, LAYOUTS[layout]).whole, layout) == set()


def unlisted(paths: frozenset[str], layout: str) -> set[str]:
    """Parameters that the table does not name for a layout."""
    return {path for path in paths if layout not in WHOLE or not re.search(WHOLE[layout], path)}


SEQUENCES = {"sft": (1, 0), "reward_model": (2, 0), "dpo": (2, 2), "kto": (1, 3)}
"""Sequences per row that a step reads with a gradient and without: by the reference, and KTO's mismatched ones."""


@pytest.mark.parametrize("layout", ["data=2 x tensor=4", "fsdp=4 x tensor=2"])
@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.nightly
def test_activations_travel_twice_a_layer_and_pass_where_layers_are_split(name, layout):
    measured, where = measure(name, LAYOUTS[layout]), LAYOUTS[layout]
    learned, read = SEQUENCES[name]
    activations = 4 * ROWS // where.row_devices * (tiny.PROMPT + tiny.RESPONSE) * MODEL.d_model
    reductions = 2 * MODEL.n_layers + 1  # with that of the embedding, or of the head's gradient
    weights = measured.trained + (2 * measured.trained + measured.frozen if where.fsdp > 1 else 0)
    ideal = activations * reductions * (2 * learned + read) + weights / where.tensor
    assert sum(measured.costs.bytes.values()) < 1.5 * ideal


@pytest.mark.nightly
def test_packed_pairs_share_the_work_and_stay_where_they_are():
    measured = measure("dpo, packed", LAYOUTS["fsdp=8"])
    assert_shares(measured)
    assert_moves_weights(measured, fsdp=True)


BULK_LAYOUTS = [(name, layout) for name in BULK for layout in LAYOUTS]
QUICK = [("score", "fsdp=8")]


@pytest.mark.parametrize(
    ("name", "layout"),
    [each if each in QUICK else pytest.param(*each, marks=pytest.mark.nightly) for each in BULK_LAYOUTS],
)
def test_sampling_and_scoring_in_bulk_share_the_work(name, layout):
    measured = measure_bulk(name, LAYOUTS[layout])
    assert_shares(measured)
    if layout in ("data=8", "pmap=8"):
        assert sum(measured.costs.bytes.values()) < 0.05 * measured.frozen  # the results alone
    if name != "generate" and layout == "fsdp=8":
        assert 0.5 * measured.frozen < sum(measured.costs.bytes.values()) < 1.1 * measured.frozen


def assert_shares(measured: Measured) -> None:
    """All devices together compute the FLOPs of the jaxpr, which knows nothing of devices."""
    assert measured.costs.flops * DEVICES == pytest.approx(measured.flops, rel=0.1)


def assert_moves_weights(measured: Measured, *, fsdp: bool) -> None:
    """One gradient is reduced; with split weights, those of every network are gathered, for each pass at most."""
    ideal = measured.trained + (2 * measured.trained + measured.frozen if fsdp else 0)
    assert measured.trained < sum(measured.costs.bytes.values()) < 1.1 * ideal


BATCH, WIDTH = 16, 32
ARGS = jnp.ones((BATCH, WIDTH)), jnp.ones((WIDTH, WIDTH))


def test_rows_taken_from_a_batch_are_split_again():
    """Rows gathered by number may lie on any device: without a constraint, every device would compute all of them."""
    mesh = make_placement(LAYOUTS["fsdp=4 x tensor=2"], seeds=1).mesh  # type: ignore[union-attr]
    rows, weights = NamedSharding(mesh, row_sharding.ROWS), NamedSharding(mesh, P(None, "tensor"))

    def of_some(x, weights):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return masking.take_rows(x, jax.random.permutation(jax.random.key(0), BATCH), ()) @ weights

    compiled = jax.jit(of_some, in_shardings=(rows, weights)).lower(*ARGS).compile()
    assert program_costs.of_compiled(compiled).flops == 2 * BATCH * WIDTH**2 / DEVICES
