# SPDX-License-Identifier: Apache-2.0
"""Three ways to count matrix products, each against sums done by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2jax import config
from m2jax.config import UserError
from m2jax.config_files import load_config
from m2jax.dist.mesh import make_mesh
from m2jax.dist.topology import CHIPS
from m2jax.plan import flops, hlo, loops
from m2jax.plan.compile import model_flops
from m2jax.train.flops import TraceError
from m2jax.train.image_text import ImageTextTask
from m2jax.train.m2_objectives import M2Task
from m2jax.train.sycoca import SyCoCaTask
from m2jax.train.visual_tokenizer import VisualTokenizerTask

SIZES = {"x": (8, 16), "w": (5, 16, 16)}


def shapes(*sizes: tuple[int, ...]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]


def stack(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def test_a_scan_counts_every_iteration() -> None:
    jaxpr = jax.make_jaxpr(stack)(*shapes(*SIZES.values()))
    assert flops.traced(jaxpr) == 5 * 2 * 8 * 16 * 16


def test_recomputation_is_counted_in_the_trace() -> None:
    def loss(keep: bool):
        body = lambda x, w: (jnp.tanh(jnp.tanh(x @ w) @ w), None)  # noqa: E731
        scanned = body if keep else jax.checkpoint(body)
        return lambda x, w: jax.lax.scan(scanned, x, w)[0].sum()

    one = 2 * 8 * 16 * 16
    counts = [
        flops.traced(jax.make_jaxpr(jax.grad(loss(keep), argnums=(0, 1)))(*shapes(*SIZES.values())))
        for keep in (True, False)
    ]
    assert counts[0] == 5 * (2 + 4) * one
    assert counts[1] in (5 * (2 + 4 + 1) * one, 5 * (2 + 4 + 2) * one)  # the last may be dropped


def test_other_forms() -> None:
    a, b = shapes((4, 8, 3), (4, 3, 5))
    assert flops.traced(jax.make_jaxpr(jnp.matmul)(a, b)) == 2 * 4 * 8 * 3 * 5
    image, kernel = shapes((2, 8, 8, 3), (3, 3, 3, 7))
    convolve = lambda x, k: jax.lax.conv_general_dilated(  # noqa: E731
        x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert flops.traced(jax.make_jaxpr(convolve)(image, kernel)) == 2 * (2 * 6 * 6 * 7) * 27
    either = lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ x, lambda: x)  # noqa: E731
    assert flops.traced(jax.make_jaxpr(either)(*shapes((4, 4)))) == 2 * 4**3
    forever = lambda x: jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ x, x)  # noqa: E731
    with pytest.raises(TraceError, match="while"):
        flops.traced(jax.make_jaxpr(forever)(*shapes((4, 4))))


def test_shards_count_on_every_device() -> None:
    mesh = make_mesh(config.Mesh(fsdp=2, model=2))
    spec = jax.sharding.PartitionSpec("data", None)
    mapped = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=spec, out_specs=spec)
    jaxpr = jax.make_jaxpr(mapped)(*shapes((8, 16)))
    assert flops.traced(jaxpr) == 8 * 2 * 4 * 4 * 16  # eight devices, 4 rows each


LINE = """\
ENTRY %main (a: bf16[64,52,12,32], b: bf16[64,52,12,32]) -> bf16[64,12,52,52] {
  %a = bf16[64,52,12,32]{3,2,1,0} parameter(0)
  %b = bf16[64,52,12,32]{3,2,1,0} parameter(1)
  ROOT %c = RESULT
}
"""


def one_line(result: str) -> float:
    module = hlo.parse(LINE.replace("RESULT", result))
    computation = module.computations["main"]
    return flops.instruction_flops(module, computation, computation.root)


def test_batched_products_that_the_tpu_compiler_writes_as_convolutions() -> None:
    """Of 64 x 12 taps per output one meets a number: 2 x batch x heads x queries x keys x dim."""
    counted = one_line(
        "bf16[64,12,52,52]{2,3,1,0} convolution(%a, %b), "
        "window={size=64x12 stride=63x11 lhs_dilate=64x12}, dim_labels=0b1f_0o1i->01bf"
    )
    assert counted == 2 * 64 * 12 * 52 * 52 * 32


@pytest.mark.parametrize(
    ("size", "window", "stride", "hole", "spread", "pad"),
    [(8, 3, 1, 1, 1, 0), (8, 3, 2, 1, 1, 1), (5, 3, 1, 2, 1, 2), (9, 3, 1, 1, 2, 0)],
)
def test_taps_against_a_convolution_of_ones(
    size: int, window: int, stride: int, hole: int, spread: int, pad: int
) -> None:
    """A convolution of ones with ones sums to the number of pairs that meet."""
    out = jax.lax.conv_general_dilated(
        jnp.ones((1, 1, size)), jnp.ones((1, 1, window)), (stride,), [(pad, pad)],
        lhs_dilation=(hole,), rhs_dilation=(spread,),
    )  # fmt: skip
    found = flops._taps(size, window, out.shape[2], stride, hole, spread, pad)
    assert found == int(out.sum())


@pytest.mark.parametrize("target", ["__cublas$gemm", "__cublas$lt$matmul"])
def test_products_of_a_library(target: str) -> None:
    counted = one_line(
        "bf16[64,12,52,52]{3,2,1,0} custom-call(%a, %b), "
        f'custom_call_target="{target}", backend_config={{"gemm_backend_config":'
        '{"dot_dimension_numbers":{"lhs_batch_dimensions":["0","2"]}}}'
    )
    assert counted == 2 * 64 * 12 * 52 * 52 * 32
    plain = "bf16[64,12,52,64]{3,2,1,0} dot(%a, %b), lhs_contracting_dims={1,3}"
    assert one_line(plain) == 2 * (64 * 12 * 52 * 64) * 52 * 32


@pytest.mark.parametrize(("called", "product"), [
    ("jit(step)/while/body/contrastive_sums/pallas_call", 1), ("jit(step)/other/pallas_call", 0),
])  # fmt: skip
def test_products_of_our_own_kernels(called: str, product: int) -> None:
    text = (
        "ENTRY %main (a: bf16[8,16], i: s32[8], b: bf16[32,16]) -> f32[2,8] {\n"
        "  %a = bf16[8,16] parameter(0)\n  %i = s32[8] parameter(1)\n"
        "  %b = bf16[32,16] parameter(2)\n"
        '  ROOT %c = f32[2,8] custom-call(%a, %i, %b), custom_call_target="__gpu$xla.gpu.triton", '
        f'metadata={{op_name="{called}"}}\n}}\n'
    )
    module = hlo.parse(text)
    work, _ = flops.of_program(module, loops.walk(module), CHIPS["h200"])
    assert work == product * 2 * 8 * 32 * 16


@pytest.mark.parametrize(("dtype", "kind", "faster"), [
    ("bf16", "v5e", 1), ("s8", "v5e", 2), ("f8e4m3fn", "v5e", 2), ("s8", "v4", 1),
])  # fmt: skip
def test_products_of_8_bits_have_a_peak_of_their_own(dtype: str, kind: str, faster: int) -> None:
    text = (
        "ENTRY %main (a: TYPE[8,16], b: TYPE[16,32]) -> f32[8,32] {\n"
        "  %a = TYPE[8,16] parameter(0)\n  %b = TYPE[16,32] parameter(1)\n"
        "  ROOT %c = f32[8,32] dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n}\n"
    )
    module = hlo.parse(text.replace("TYPE", dtype))
    work, seconds = flops.of_program(module, loops.walk(module), CHIPS[kind])
    assert work == 2 * 8 * 16 * 32
    assert seconds * CHIPS[kind].peak_flops * faster == pytest.approx(work)


def experiment(**model: object) -> config.Experiment:
    sizes = config.resolve(config.Model(**{"width": 96, "dtype": "float32", **model}))  # type: ignore[arg-type]
    return config.Experiment(model=sizes, data=config.Data(batch_size=16, views=2))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_trace_against_the_sizes_of_the_model(remat: str) -> None:
    """6 x parameters x tokens and attention, within what heads, patches and the loss add."""
    toy = experiment(remat=remat)
    needed = model_flops(toy, make_mesh(toy.mesh))
    sized = flops.from_sizes(toy, ImageTextTask(toy).model)
    assert 1.0 <= needed / sized < 1.12


@pytest.mark.parametrize("patches", ["all", "high"])
def test_the_trace_against_the_sizes_with_heads(patches: str) -> None:
    """The same of SyCoCa; what is left out is relatively less, so the bound is sharper."""
    toy = experiment(remat="full")
    loss = config.Loss(
        caption=config.Caption(weight=2.0, positions=2, patches=patches),
        masked_image=config.MaskedImage(weight=1.0),
    )
    toy = dataclasses.replace(toy, loss=loss)
    needed = model_flops(toy, make_mesh(toy.mesh))
    assert 1.0 <= needed / flops.from_sizes(toy, SyCoCaTask(toy).model) < 1.06


def test_the_trace_against_the_sizes_with_masked_modelling() -> None:
    """The same of M2: two passes over image and text, and the frozen tokenizer's one forward."""
    toy = experiment(remat="full")
    loss = config.Loss(
        masked_text=config.MaskedText(weight=1.0, positions=2),
        masked_tokens=config.MaskedTokens(weight=1.0, positions=2),
    )
    toy = dataclasses.replace(toy, loss=loss)
    needed = model_flops(toy, make_mesh(toy.mesh))
    assert 1.0 <= needed / flops.from_sizes(toy, M2Task(toy).model) < 1.06


@pytest.mark.parametrize("target", ["features", "pixels"])
def test_the_trace_against_the_sizes_of_a_tokenizer_that_learns(target: str) -> None:
    toy = experiment(remat="full")
    tokenizer = config.VisualTokenizer(weight=1.0, target=target, decoder_layers=2)
    init = "a/run" if target == "features" else ""
    toy = dataclasses.replace(
        toy,
        loss=config.Loss(visual_tokenizer=tokenizer),
        finetune=config.Finetune(init=init),
        eval=config.Eval(suite=""),
    )
    needed = model_flops(toy, make_mesh(toy.mesh))
    assert (
        1.0 <= needed / flops.from_sizes(toy, VisualTokenizerTask(toy).model) < 1.04
    )  # the teacher's head


def test_the_sizes_by_hand() -> None:
    toy = experiment()
    d, rows = 96, 16
    image, text = 17, 12  # tokens: 4 x 4 patches and [CLS]; max_text_len
    weights = 12 * d * d * 3  # per token: three layers
    by_hand = rows * (
        2 * (6 * image * weights + 12 * 3 * image**2 * d)
        + 2 * (6 * text * weights + 12 * 3 * text**2 * d)
    )
    assert flops.from_sizes(toy, ImageTextTask(toy).model) == by_hand
    assert np.isclose(
        flops.from_sizes(
            dataclasses.replace(toy, data=dataclasses.replace(toy.data, batch_size=32)),
            ImageTextTask(toy).model,
        ),
        2 * by_hand,
    )


def test_bad_policies_are_refused() -> None:
    with pytest.raises(UserError, match="attention"):
        load_config("emoji", ["model.remat=some"])
