"""fastbn.jax: beside JAX's own arithmetic and jax.grad of it, plain and under jax.jit."""

import functools

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

ours = pytest.importorskip("fastbn.jax")

# Relative to max(1, |value|), against NumPy-free JAX arithmetic in float32 on the same numbers: that has sums of some
# hundred terms, each off by 2^-24; bfloat16 results are rounded once, by half an eps of 2^-7.
NEAR = {"float32": 2e-5, "bfloat16": 2.0**-8 + 2e-5, "float16": 2.0**-11 + 2e-5}
LAYOUTS = {"nchw": ((6, 5, 4, 3), 1), "nhwc": ((6, 4, 3, 5), -1), "instance": ((6, 5, 4, 3), (0, 1))}


def theirs(x, gamma, beta, axis, eps, frozen=None):
    axes = tuple(a % x.ndim for a in ((axis,) if isinstance(axis, int) else axis))
    x = x.astype(jnp.float32)
    others = tuple(a for a in range(x.ndim) if a not in axes)
    place = [x.shape[a] if a in axes else 1 for a in range(x.ndim)]
    mean, var = (jnp.mean(x, others), jnp.var(x, others)) if frozen is None else frozen
    y = (x - mean.reshape(place)) / jnp.sqrt(var.reshape(place) + eps) * gamma.reshape(place) + beta.reshape(place)
    return y, mean, var


def data(rng, shape, axis, dtype):
    axes = (axis,) if isinstance(axis, int) else axis
    channels = tuple(shape[a] for a in axes)
    x, dy = (jnp.asarray(rng.normal(1, 2, shape), dtype) for _ in range(2))
    small = [jnp.asarray(rng.normal(1, 1, channels), jnp.float32) for _ in range(3)]
    return x, dy, *small, jnp.asarray(rng.uniform(0.5, 2, channels), jnp.float32)


def near(got, wanted, dtype):
    got, wanted = (np.asarray(a, np.float64) for a in (got, wanted))
    assert got.shape == wanted.shape
    assert (np.abs(got - wanted) / np.maximum(1, np.abs(wanted))).max() <= NEAR[dtype]


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("jit", [False, True], ids=["plain", "jit"])
@pytest.mark.parametrize("evaluate", [False, True], ids=["training", "evaluation"])
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS.values(), ids=LAYOUTS)
def test_values_and_gradients(shape, axis, evaluate, jit, dtype, rng):
    x, dy, gamma, beta, *statistics = data(rng, shape, axis, dtype)
    frozen = tuple(statistics) if evaluate else None

    def mine(x, gamma, beta):
        y, mean, var = ours.batch_norm(x, gamma, beta, axis=axis, eps=1e-3, frozen=frozen)
        return (y * dy).astype(jnp.float32).sum(), (y, mean, var)

    def wanted(x, gamma, beta):
        y, mean, var = theirs(x, gamma, beta, axis, 1e-3, frozen)
        return (y * dy.astype(jnp.float32)).sum(), (y, mean, var)

    run = jax.jit if jit else lambda f: f
    (_, found), gradients = run(jax.value_and_grad(mine, (0, 1, 2), has_aux=True))(x, gamma, beta)
    (_, expected), exact = jax.value_and_grad(wanted, (0, 1, 2), has_aux=True)(x.astype(jnp.float32), gamma, beta)
    assert [a.dtype for a in (*found, *gradients)] == [x.dtype, *[jnp.float32] * 2, x.dtype, *[jnp.float32] * 2]
    near(found[0], expected[0], dtype)
    near(gradients[0], exact[0], dtype)
    for got, value in zip((*found[1:], *gradients[1:]), (*expected[1:], *exact[1:]), strict=True):
        near(got, value, "float32")


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("evaluate", [False, True])
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS.values(), ids=LAYOUTS)
def test_gradients_of_gradients(shape, axis, evaluate, jit, rng):
    """Of a penalty on all first gradients, with respect to x, gamma and dy."""
    x, dy, gamma, beta, mean, var = data(rng, shape, axis, "float32")
    frozen = (mean, var) if evaluate else None
    weights = [jnp.asarray(rng.normal(size=a.shape), jnp.float32) for a in (x, gamma, beta)]

    def penalty(normalize, x, gamma, beta, dy):
        first = jax.grad(lambda *given: (normalize(*given) * dy).sum(), argnums=(0, 1, 2))(x, gamma, beta)
        return sum((w * a**2).sum() for w, a in zip(weights, first, strict=True))

    def own(x, gamma, beta):
        return ours.batch_norm(x, gamma, beta, axis=axis, eps=1e-3, frozen=frozen)[0]

    def plain(x, gamma, beta):
        return theirs(x, gamma, beta, axis, 1e-3, frozen)[0]

    found, wanted = (
        (jax.jit if jit else lambda f: f)(jax.grad(functools.partial(penalty, f), argnums=(0, 1, 2, 3)))(
            x, gamma, beta, dy
        )
        for f in (own, plain)
    )
    for got, right in zip(found, wanted, strict=True):
        size = float(jnp.abs(right).max())
        near(got / max(1, size), right / max(1, size), "float32")


def test_gradients_of_gradients_without_parameters(rng):
    x, dy, gamma, *_ = data(rng, (6, 5, 4), 1, "float32")

    def penalty(normalize, x):
        return (jax.grad(lambda x: (normalize(x) * dy).sum())(x) ** 2).sum()

    got = jax.grad(functools.partial(penalty, lambda x: ours.batch_norm(x, eps=1e-3)[0]))(x)
    one = jnp.ones_like(gamma)
    wanted = jax.grad(functools.partial(penalty, lambda x: theirs(x, one, 0 * one, 1, 1e-3)[0]))(x)
    near(got, wanted, "float32")
    with pytest.raises(ValueError, match=r"Pure callbacks do not support JVP"):  # a third one
        jax.grad(lambda x: jax.grad(functools.partial(penalty, lambda x: ours.batch_norm(x)[0]))(x).sum())(x)


def test_the_bits_are_those_of_fastbn(rng):
    import fastbn

    x, dy, gamma, beta, *_ = data(rng, *LAYOUTS["nchw"], "float32")
    y, back = jax.vjp(lambda *a: ours.batch_norm(*a)[0], x, gamma, beta)
    wanted, saved = fastbn.forward(np.asarray(x), np.asarray(gamma), np.asarray(beta))
    np.testing.assert_array_equal(y, wanted)
    for got, value in zip(back(dy), fastbn.backward(np.asarray(dy), saved), strict=True):
        np.testing.assert_array_equal(got, value)


def test_parameters_that_are_left_out_or_of_another_type(rng):
    x, dy, gamma, beta, *_ = data(rng, *LAYOUTS["nchw"], "float32")
    y = ours.batch_norm(x, beta=beta)[0]
    near(y, theirs(x, jnp.ones(5), beta, 1, 1e-5)[0], "float32")
    half = gamma.astype(jnp.bfloat16)
    (dgamma,) = jax.vjp(lambda g: ours.batch_norm(x, g)[0], half)[1](dy)
    assert dgamma.dtype == jnp.bfloat16
    (wanted,) = jax.vjp(lambda g: theirs(x, g, jnp.zeros(5), 1, 1e-5)[0], gamma)[1](dy)
    near(dgamma, wanted, "bfloat16")


def test_statistics_are_constants(rng):
    """mean, var and what `frozen` holds have gradient 0, in words of the docstring: they are for running statistics."""
    x, _, gamma, beta, mean, var = data(rng, *LAYOUTS["nchw"], "float32")
    assert not jax.grad(lambda x: ours.batch_norm(x, gamma, beta)[1].sum() + ours.batch_norm(x)[2].sum())(x).any()
    assert not jax.grad(lambda m: ours.batch_norm(x, frozen=(m, var))[0].sum())(mean).any()


def test_vmap(rng):
    x, _, gamma, beta, *_ = data(rng, (3, 6, 5), -1, "float32")
    y, mean, _ = jax.vmap(lambda x: ours.batch_norm(x, gamma, beta))(x)
    for i in range(3):
        wanted = ours.batch_norm(x[i], gamma, beta)
        np.testing.assert_array_equal(y[i], wanted[0])
        np.testing.assert_array_equal(mean[i], wanted[1])


def test_large_arrays_under_jit(rng):
    """JAX hands large arrays over while they are still being made: a callback that asks JAX for anything hangs."""
    x = jnp.asarray(rng.normal(size=(64, 16, 32, 32)), jnp.float32)

    @jax.jit
    def step(x):
        return ours.batch_norm(jnp.sin(ours.batch_norm(x * 2)[0]))[0]

    assert abs(float(jax.grad(lambda x: (step(x) ** 2).sum())(x).sum())) < 1.0  # dx sums to 0 by channel


def test_wrong_arguments_are_named_while_tracing(rng):
    x, _, gamma, *_ = data(rng, *LAYOUTS["nchw"], "float32")
    run = jax.jit(lambda x, **more: ours.batch_norm(x, **more))
    with pytest.raises(ValueError, match=r"fastbn\.jax\.batch_norm: gamma has shape \(4,\); expected \(5,\)"):
        run(x, gamma=gamma[:4])
    with pytest.raises(ValueError, match=r"fastbn\.jax\.batch_norm: x has shape \(5,\); expected at least two axes"):
        run(gamma)
    with pytest.raises(TypeError, match=r"fastbn\.jax\.batch_norm: x is a int32 array"):
        run(x.astype(jnp.int32))
    with pytest.raises(ValueError, match=r"fastbn\.jax\.batch_norm: eps is int 0"):
        ours.batch_norm(x, eps=0)
    with pytest.raises(np.exceptions.AxisError, match=r"fastbn\.jax\.batch_norm: axis=4 is out of range"):
        ours.batch_norm(x, axis=4)
    with pytest.raises(TypeError, match=r"fastbn\.jax\.batch_norm: frozen is .*; expected a pair \(mean, var\)"):
        ours.batch_norm(x, frozen=gamma)
