"""Tables on the host: rows by the host, in programs for CPU and, compiled only, for TPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import configs
from gemma_jax.nn import host
from tests import tpu

TABLE = np.random.default_rng(0).normal(size=(12, 3, 4)).astype(np.float32)
INDEX = np.asarray([[0, 5], [11, 5]])


@pytest.fixture(scope="module")
def table():
    return jax.device_put(TABLE, host.host_sharding())


@pytest.mark.parametrize("apply", [host.rows, jax.jit(host.rows)], ids=["alone", "in a program"])
def test_rows_of_a_table_on_the_host_come_to_the_device(table, apply):
    found = apply(table, jnp.asarray(INDEX))
    assert host.is_on_host(table)
    assert not host.is_on_host(found)
    np.testing.assert_array_equal(found, TABLE[INDEX])


def test_a_loop_reads_the_rows_that_its_steps_ask_for(table):
    """Each row says which is next, as tokens do."""

    @jax.jit
    def walk(table):
        def step(carry, _):
            row = host.rows(table, carry[None, None])[0, 0]
            return jnp.argmax(row.reshape(-1)).astype(jnp.int32), row

        return jax.lax.scan(step, jnp.int32(0), length=6)[1]

    want, at = [], 0
    for _ in range(6):
        want.append(TABLE[at])
        at = int(TABLE[at].argmax())
    np.testing.assert_array_equal(walk(table), want)


def test_what_is_kept_of_a_table_stays_where_it_is(table):
    for whole in (table, jnp.asarray(TABLE)):
        found = host.kept(whole, [2, 0], axis=1)
        assert host.is_on_host(found) == host.is_on_host(whole)
        np.testing.assert_array_equal(found, TABLE[:, [2, 0]])


def test_a_device_without_such_memory_is_named_with_what_it_has():
    class Memory:
        kind = "device"

    class Device:
        def addressable_memories(self):
            return [Memory()]

        def __repr__(self):
            return "device 0"

    class Sharding:
        device_set = frozenset((Device(),))

    with pytest.raises(ValueError, match=r"device 0 has no memory of kind 'pinned_host'.*; it has device"):
        host.host_sharding(Sharding())


@pytest.mark.slow
@tpu.needs_libtpu
def test_on_tpu_decoding_keeps_the_table_out_of_the_devices_memory():
    """Two layers in E2B's shape for a v5e: arguments of the device are less by the table, temporaries do not grow."""
    where, e2b = tpu.sharding(), configs.get("gemma-3n-e2b").decoder
    config = dataclasses.replace(e2b, name="few", layers=e2b.layers[:2])
    table = 2 * 262_144 * 2 * 256  # bytes
    there, here = (
        tpu.decode_program(tpu.abstract_model(config, where, is_table_on_host=is_there), where)
        for is_there in (True, False)
    )
    sizes, others = there.memory_analysis(), here.memory_analysis()
    assert sizes.host_argument_size_in_bytes == table
    assert others.host_argument_size_in_bytes == 0
    assert others.argument_size_in_bytes - sizes.argument_size_in_bytes == table
    assert sizes.host_temp_size_in_bytes < 2**20
    assert sizes.temp_size_in_bytes < others.temp_size_in_bytes + 2**20 < table
    text = there.as_text()
    assert 'custom_call_target="HostExecute"' in text  # the rows are gathered by the host,
    assert "custom-call-start" in text  # while the device goes on
