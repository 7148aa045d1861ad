# SPDX-License-Identifier: Apache-2.0
"""DC-Former's backbone against its authors' code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from m2jax.models import params as params_lib
from m2jax.models.class_tokens import ClassTokens, ClassTokenTower, resized_positions
from tests.golden import fixtures

AREA = "downstream"
CAMERA_WEIGHT = 3.0  # the fixture's


def is_tokens(file):
    return {"img", "cam", "out_no_sie", "pe_src", "stride"} <= fixtures.keys(file)


def config_of(golden):
    parameter = {k.removeprefix("param__"): v for k, v in golden.items() if k.startswith("param__")}
    blocks = {int(k.split(".")[1]) for k in parameter if k.startswith("blocks.")}
    return parameter, ClassTokens(
        width=golden["out"].shape[-1],
        layers=len(blocks),
        heads=int(golden["heads"]),
        mlp_width=parameter["blocks.0.mlp.fc1.weight"].shape[0],
        tokens=golden["out"].shape[1],
        height=golden["img"].shape[2],
        image_width=golden["img"].shape[3],
        patch_size=int(golden["patch"]),
        stride=tuple(int(s) for s in golden["stride"]),
        cameras=parameter["sie_embed"].shape[0],
        side_weight=CAMERA_WEIGHT,
    )


def params_of(parameter, cfg):
    """The fixture's parameters in our layout; layers are stacked."""

    def stacked(name, part=None):
        arrays = [parameter[f"blocks.{i}.{name}"] for i in range(cfg.layers)]
        if part is not None:
            arrays = [np.split(a, 3)[part] for a in arrays]
        return jnp.stack([a.T for a in arrays])

    def linear(name, part=None):
        return {"kernel": stacked(f"{name}.weight", part), "bias": stacked(f"{name}.bias", part)}

    def norm(name):
        return {"scale": stacked(f"{name}.weight"), "bias": stacked(f"{name}.bias")}

    blocks = {
        "attn_norm": norm("norm1"),
        **{name: linear("attn.qkv", part) for part, name in enumerate("qkv")},
        "out": linear("attn.proj"),
        "ffn_norm": norm("norm2"),
        "fc1": linear("mlp.fc1"),
        "fc2": linear("mlp.fc2"),
    }
    return {
        "kernel": jnp.asarray(parameter["patch_embed.proj.weight"].transpose(2, 3, 1, 0)),
        "bias": jnp.asarray(parameter["patch_embed.proj.bias"]),
        "cls_tokens": jnp.asarray(parameter["cls_token"][0]),
        "positions": jnp.asarray(parameter["pos_embed"][0]),
        "cameras": jnp.asarray(parameter["sie_embed"][:, 0]),
        "stack": {"blocks": blocks},
        "norm": {
            "scale": jnp.asarray(parameter["norm.weight"]),
            "bias": jnp.asarray(parameter["norm.bias"]),
        },
    }


@pytest.mark.parametrize("case", fixtures.cases(AREA, "class-token transformer", is_tokens))
def test_tokens(case):
    golden = fixtures.arrays(case)
    parameter, cfg = config_of(golden)
    assert cfg.grid == tuple(golden["num_yx"])
    abstract = params_lib.abstract_of(lambda rngs: ClassTokenTower(rngs, cfg))
    params = params_of(parameter, cfg)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda x: x.shape, abstract.params)
    model = nnx.merge(abstract.graph, params)
    pixels = jnp.asarray(golden["img"].transpose(0, 2, 3, 1))
    seen = model(pixels, jnp.asarray(golden["cam"]))
    np.testing.assert_allclose(seen, golden["out"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model(pixels), golden["out_no_sie"], rtol=1e-5, atol=1e-5)
    flat = seen.reshape(len(seen), -1)
    np.testing.assert_allclose(flat, golden["concat"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", fixtures.cases(AREA, "class-token transformer", is_tokens))
def test_positions(case):
    golden = fixtures.arrays(case)
    _, cfg = config_of(golden)
    source, wanted = (jnp.asarray(golden[key][0]) for key in ("pe_src", "pe_resized"))
    new = jnp.full_like(wanted, 7.0)
    found = resized_positions(source, 1, cfg.grid, new)
    np.testing.assert_allclose(found[cfg.tokens :], wanted[cfg.tokens :], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found[: cfg.tokens], new[: cfg.tokens])
