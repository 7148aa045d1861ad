# SPDX-License-Identifier: Apache-2.0
import jax.numpy as jnp
import pytest

from m2jax.config import UserError
from m2jax.obs import profile
from m2jax.obs.memory import memory
from m2jax.obs.profile import Profiler


@pytest.mark.parametrize("spec", ["5", "5:5", "7:3", "a:b", "-1:3", "1:2:3"])
def test_a_spec_without_steps_is_refused(tmp_path, spec):
    with pytest.raises(UserError, match=r"log\.profile="):
        Profiler(spec, tmp_path)


def test_the_steps_asked_for_are_traced_and_no_other(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(profile.jax.profiler, "start_trace", lambda f: calls.append(("on", f)))
    monkeypatch.setattr(profile.jax.profiler, "stop_trace", lambda: calls.append(("off",)))
    for spec, steps, expected in (
        ("2:4", range(6), ["on", 2, 3, "off"]),
        ("2:9", range(4), ["on", 2, 3, "off"]),  # the run ends first
        ("2:4", range(3, 6), []),  # it went on from within
        ("", range(3), []),
    ):
        calls.clear()
        profiler = Profiler(spec, tmp_path)
        for step in steps:
            profiler.before(step)
            if calls and calls[-1] != ("off",):
                calls.append((step,))
            profiler.after(step, jnp.zeros(()))
        profiler.close()
        assert [call[0] for call in calls] == expected
    assert all(call[1] == tmp_path / "profile" for call in calls if call[0] == "on")


def test_memory_is_the_fullest_devices_where_devices_count():
    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    counting = [Device({"peak_bytes_in_use": n, "bytes_in_use": 1}) for n in (5, 9, 7)]
    assert memory(counting)["memory/device_peak"] == 9
    alone = memory([Device(None), Device({})])
    assert set(alone) == {"memory/host_peak"}
    held = bytearray(2**27)
    held[:: 2**12] = b"x" * len(held[:: 2**12])
    grown = memory([])["memory/host_peak"]
    assert 2**27 < grown < 2**38  # bytes, not kilobytes
