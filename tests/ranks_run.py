"""What the tests of `fastbn.distributed` run on every rank, under mpiexec or in processes of torch.distributed.

`mpiexec -n 4 python tests/ranks_run.py mpi` runs all scenarios, and rank 0 prints as JSON what came of each: null, or
the first rank's failure. A scenario is a function of the ranks and of the communicator they are made from.
"""

import json
import os
import re
import signal
import sys
import time
import traceback
import warnings

import numpy as np
import pytest

import fastbn
from fastbn import reference

C = 5
EPS = 2.0**-52


def refused(call, words):
    """The words that must be in the RanksError that `call` raises."""
    with pytest.raises(fastbn.RanksError, match=re.escape(words)) as error:
        call()
    return str(error.value)


class Batch:
    """A batch of `sizes` samples on each rank, the same on all; `mine` takes this rank's part."""

    def __init__(self, ranks, sizes, dtype=np.float64, mean=3.0, seed=0, shape=(C, 4, 3), axis=1):
        rng = np.random.default_rng([seed, len(sizes)])
        total = sum(sizes)
        self.x = rng.normal(mean, 2, (total, *shape)).astype(dtype)
        self.x += rng.normal(0, 1, shape[0]).astype(dtype)[:, None, None]
        self.dy = rng.normal(0.5, 1, (total, *shape)).astype(dtype)
        self.gamma, self.beta = rng.normal(1, 0.5, shape[0]), rng.normal(0, 1, shape[0])
        if axis == -1:
            self.x, self.dy = (np.ascontiguousarray(a.transpose(0, 2, 3, 1)) for a in (self.x, self.dy))
        start = sum(sizes[: ranks.rank])
        self.part = slice(start, start + sizes[ranks.rank])

    def mine(self, array):
        return array[self.part]


def sizes_of(ranks):
    """Uneven: 3, 1, 6, 2, 3, ..."""
    return [(3, 1, 6, 2)[r % 4] for r in range(ranks.size)]


def same_everywhere(ranks, comm, *arrays):
    """The same bits on all ranks."""
    bits = b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)
    everywhere = gather(ranks, comm, bits)
    assert everywhere.count(bits) == len(everywhere), "ranks have different bits"


def against_the_whole(ranks, comm, sizes, dtype=np.float64, mean=3.0, axis=1, near=1e-12, reduce_params=True):
    batch = Batch(ranks, sizes, dtype, mean, axis=axis)
    x, dy = batch.mine(batch.x), batch.mine(batch.dy)
    y, saved = fastbn.forward(x, batch.gamma, batch.beta, axis=axis, comm=ranks)
    want_y, whole = reference.forward(batch.x, batch.gamma, batch.beta, axis=axis)
    found, want = saved.moments, whole.moments
    assert found.count == want.count
    assert type(found.count) is int
    for a, b in zip(found.exact(), want.exact(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    same_everywhere(ranks, comm, *found.exact())
    scale = max(1.0, float(np.abs(want_y).max()))
    np.testing.assert_allclose(y, batch.mine(want_y), rtol=0, atol=near * scale)
    dx, dgamma, dbeta = fastbn.backward(dy, saved, reduce_params=reduce_params)
    want_dx, want_dgamma, want_dbeta = reference.backward(batch.dy, whole)
    np.testing.assert_allclose(dx, batch.mine(want_dx), rtol=0, atol=near * max(1.0, float(np.abs(want_dx).max())))
    if not reduce_params:  # of this rank's dy, with xhat of the whole batch
        over = tuple(a for a in range(4) if a != axis % 4)
        xhat = reference.forward(batch.x, axis=axis)[0]
        want_dgamma, want_dbeta = (batch.mine(batch.dy * xhat)).sum(over), dy.astype(np.float64).sum(over)
    size = float(np.abs(batch.dy).sum())
    np.testing.assert_allclose(dgamma, want_dgamma, rtol=0, atol=near * size)
    np.testing.assert_allclose(dbeta, want_dbeta, rtol=0, atol=near * size)
    if reduce_params:
        same_everywhere(ranks, comm, dgamma, dbeta)
    assert y.dtype == dx.dtype == x.dtype
    return saved


def uneven_ranks(ranks, comm):
    against_the_whole(ranks, comm, sizes_of(ranks))


def parameters_of_this_rank(ranks, comm):
    against_the_whole(ranks, comm, sizes_of(ranks), reduce_params=False)


def float32_far_from_0(ranks, comm):
    against_the_whole(ranks, comm, sizes_of(ranks), np.float32, mean=1e4, near=2e-6)


def float64_far_from_0(ranks, comm):
    """A mean of 1e9 in one float64 would be off by 6e-8 of the standard deviation; the pair isn't."""
    against_the_whole(ranks, comm, sizes_of(ranks), mean=1e9, near=1e-13)


def channels_last(ranks, comm):
    against_the_whole(ranks, comm, sizes_of(ranks), axis=-1)


def float16(ranks, comm):
    against_the_whole(ranks, comm, sizes_of(ranks), np.float16, near=2e-3)


def an_empty_rank(ranks, comm):
    sizes = sizes_of(ranks)
    for empty in range(ranks.size):
        against_the_whole(ranks, comm, [0 if r == empty else n for r, n in enumerate(sizes)])


def one_rank_with_all(ranks, comm):
    for full in range(ranks.size):
        against_the_whole(ranks, comm, [3 if r == full else 0 for r in range(ranks.size)])


def all_ranks_empty(ranks, comm):
    x = np.ones((0, C), np.float32)
    y, saved = fastbn.forward(x, comm=ranks)
    assert saved.moments.count == 0
    dx, dgamma, _ = fastbn.backward(y, saved)
    assert dx.shape == (0, C)
    assert not dgamma.any()


def one_value_on_each_rank(ranks, comm):
    """The global count decides: no warning, and statistics."""
    x = np.full((1, 2), [1.0, 5.0]) + ranks.rank
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y, saved = fastbn.forward(x, comm=ranks)
    whole = np.full((ranks.size, 2), [1.0, 5.0]) + np.arange(ranks.size)[:, None]
    np.testing.assert_allclose(y[0], reference.forward(whole)[0][ranks.rank], atol=1e-14)
    assert saved.moments.count == ranks.size


def one_value_in_all(ranks, comm):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fastbn.forward(np.ones((int(ranks.rank == 0), 2)), comm=ranks)
    assert [w.category for w in seen] == [fastbn.OneValueWarning]


def the_same_bits_every_time(ranks, comm):
    batch = Batch(ranks, sizes_of(ranks), np.float32)
    runs = []
    for _ in range(3):
        time.sleep(0.002 * np.random.default_rng().random())  # ranks come in any order
        y, saved = fastbn.forward(batch.mine(batch.x), comm=ranks)
        dx, dgamma, _ = fastbn.backward(batch.mine(batch.dy), saved, reduce_params=True)
        runs.append(y.tobytes() + dx.tobytes() + dgamma.tobytes() + saved.moments.exact()[1].tobytes())
    assert runs[0] == runs[1] == runs[2]


def the_same_bits_as_any_engine(ranks, comm):
    """The tree is that of `fastbn.distributed.tree`, whoever carries the messages."""
    batch = Batch(ranks, sizes_of(ranks))
    local = fastbn.moments(batch.mine(batch.x))
    found = local.allreduce(ranks).exact()

    class Given:
        def allgather(self, data):
            return np.frombuffer(b"".join(gather(ranks, comm, data.tobytes()))).reshape(ranks.size, -1)

    for a, b in zip(found, local.allreduce(Given()).exact(), strict=True):
        assert a.tobytes() == b.tobytes()


def one_message_a_pass(ranks, comm):
    batch = Batch(ranks, sizes_of(ranks))
    before = ranks.calls
    _, saved = fastbn.forward(batch.mine(batch.x), comm=ranks)
    assert ranks.calls == before + 1
    fastbn.backward(batch.mine(batch.dy), saved)
    assert ranks.calls == before + 2
    fastbn.backward(batch.mine(batch.dy), saved, need=(False, True, True))
    assert ranks.calls == before + 2


def frozen_statistics_send_nothing(ranks, comm):
    batch = Batch(ranks, sizes_of(ranks))
    before = ranks.calls
    frozen = np.linspace(0, 1, C), np.linspace(1, 2, C)
    y, saved = fastbn.forward(batch.mine(batch.x), batch.gamma, frozen=frozen, comm=ranks)
    assert ranks.calls == before
    want, whole = reference.forward(batch.mine(batch.x), batch.gamma, frozen=frozen)
    np.testing.assert_allclose(y, want, atol=1e-12)
    dx, _, _ = fastbn.backward(batch.mine(batch.dy), saved)
    np.testing.assert_allclose(dx, reference.backward(batch.mine(batch.dy), whole)[0], atol=1e-12)
    assert ranks.calls == before


def with_weights_activation_and_residual(ranks, comm):
    """All that a call may ask for beside; weights of 0 on all of one rank, and NaN where they are 0."""
    batch = Batch(ranks, sizes_of(ranks))
    rng = np.random.default_rng(8)
    weights = rng.random((len(batch.x), 4, 3)) * (rng.random((len(batch.x), 4, 3)) > 0.3)
    weights[: sizes_of(ranks)[0]] = 0
    residual = rng.normal(size=batch.x.shape)
    for masked in ("normalize", "zero", "keep"):
        x = batch.x if masked == "normalize" else np.where(weights[:, None] == 0, np.nan, batch.x)
        more = {"activation": "gelu", "masked": masked}
        _, whole = fastbn.forward(x, batch.gamma, batch.beta, weights=weights, residual=residual, **more)
        want = fastbn.backward(batch.dy, whole)
        _, saved = fastbn.forward(
            *(batch.mine(x), batch.gamma, batch.beta), weights=batch.mine(weights), residual=batch.mine(residual),
            comm=ranks, **more
        )  # fmt: skip
        np.testing.assert_allclose(saved.moments.exact()[1], whole.moments.exact()[1], rtol=1e-12)
        assert saved.moments.count == pytest.approx(weights.sum(), rel=1e-14)
        dx, dgamma, dbeta, dr = fastbn.backward(batch.mine(batch.dy), saved, reduce_params=True)
        np.testing.assert_allclose(dx, batch.mine(want[0]), atol=1e-12)
        np.testing.assert_allclose(dgamma, want[1], atol=1e-11)
        np.testing.assert_allclose(dbeta, want[2], atol=1e-11)
        np.testing.assert_allclose(dr, batch.mine(want[3]), atol=1e-13)


def all_weights_0(ranks, comm):
    """No statistics: what is normalized is beta."""
    x = np.random.default_rng(ranks.rank).normal(size=(3, C))
    y, saved = fastbn.forward(x, beta=np.arange(C), weights=np.zeros(3), comm=ranks)
    np.testing.assert_array_equal(y, np.broadcast_to(np.arange(C), (3, C)))
    dx, _, _ = fastbn.backward(x, saved)
    assert not dx.any()


def not_finite_on_one_rank(ranks, comm):
    batch = Batch(ranks, sizes_of(ranks))
    x = batch.mine(batch.x).copy()
    if ranks.rank == ranks.size - 1:
        x[0, 1] = np.nan
        x[0, 2] = np.inf
    _, saved = fastbn.forward(x, comm=ranks)
    mean, var = saved.moments.exact()
    assert list(np.isfinite(mean)) == list(np.isfinite(var)) == [True, False, False, True, True]
    same_everywhere(ranks, comm, mean, var)
    assert np.isnan(var[2])


def other_channels(ranks, comm):
    x = np.ones((4, C + (ranks.rank == 1)))
    text = refused(lambda: fastbn.forward(x, comm=ranks), f"{C + 1} channels of float64")
    assert f"{C} channels of float64" in text
    assert "rank 1" in text
    large = np.ones((4, 3000 if ranks.rank == 0 else 2))  # no frame and no eager message is as large
    refused(lambda: fastbn.forward(large, comm=ranks), "3000 channels")
    uneven_ranks(ranks, comm)  # all know of it, and go on


def other_dtype(ranks, comm):
    x = np.ones((4, C), np.float32 if ranks.rank else np.float64)
    refused(lambda: fastbn.forward(x, comm=ranks), "of float32")
    uneven_ranks(ranks, comm)


def other_eps(ranks, comm):
    refused(lambda: fastbn.forward(np.ones((4, C)), eps=1e-3 if ranks.rank else 1e-5, comm=ranks), "eps 0.001")
    uneven_ranks(ranks, comm)


def a_rank_that_refuses_its_arguments(ranks, comm):
    """It raises its own error; the others hear of it at once."""
    gamma = np.ones(C + 1) if ranks.rank == ranks.size - 1 else np.ones(C)
    start = time.monotonic()
    if ranks.rank == ranks.size - 1:
        with pytest.raises(ValueError, match="gamma has shape"):
            fastbn.forward(np.ones((4, C)), gamma, comm=ranks)
    else:
        text = refused(lambda: fastbn.forward(np.ones((4, C)), gamma, comm=ranks), f"rank {ranks.size - 1} failed")
        assert "ValueError: fastbn.forward: gamma has shape (6,)" in text
    assert time.monotonic() - start < 10
    uneven_ranks(ranks, comm)


def a_backward_pass_too_few(ranks, comm):
    """The next call of this rank meets the backward pass of the others."""
    x = np.ones((4, C))
    y, saved = fastbn.forward(x, comm=ranks)
    call = (lambda: fastbn.forward(x, comm=ranks)) if ranks.rank == 0 else (lambda: fastbn.backward(y, saved))
    refused(call, "rank 0 is at forward pass")


def another_layers_backward(ranks, comm):
    first, second = (fastbn.forward(np.ones((4, C)), comm=ranks) for _ in range(2))
    y, saved = first if ranks.rank == 0 else second
    refused(lambda: fastbn.backward(y, saved), "is at backward pass of forward")


def a_call_too_few_at_the_end(ranks, comm):
    if ranks.rank == 0:
        refused(ranks.check, "rank 0 is at Ranks.check")
    else:
        refused(lambda: fastbn.forward(np.ones((4, C)), comm=ranks), "rank 0 is at Ranks.check")
    ranks.check()


def many_channels(ranks, comm):
    """1 MB: messages that MPI doesn't send before the receiver asks, and frames that grow."""
    x = np.random.default_rng(ranks.rank).normal(ranks.rank, 1, (2, 40_000))
    _, saved = fastbn.forward(x, comm=ranks)
    whole = [np.random.default_rng(r).normal(r, 1, (2, 40_000)) for r in range(ranks.size)]
    np.testing.assert_allclose(saved.moments.exact()[1], np.concatenate(whole).var(0), rtol=1e-12)


def no_channels(ranks, comm):
    y, saved = fastbn.forward(np.ones((3, 0)), comm=ranks)
    assert y.shape == (3, 0)
    assert saved.moments.count in (0, 3 * ranks.size)


def in_parts(ranks, comm):
    """moments, allreduce, normalize; two layers at once, and waited for in another order."""
    batches = [Batch(ranks, sizes_of(ranks), seed=s) for s in (1, 2)]
    pending = [fastbn.moments(b.mine(b.x)).allreduce(ranks, wait=False) for b in batches]
    found = [p.wait() for p in reversed(pending)][::-1]
    assert all(p.ready() for p in pending)
    for b, moments in zip(batches, found, strict=True):
        y, saved = fastbn.normalize(b.mine(b.x), moments, b.gamma, b.beta, comm=ranks)
        want, whole = reference.forward(b.x, b.gamma, b.beta)
        np.testing.assert_allclose(y, b.mine(want), atol=1e-13)
        dx, _, _ = fastbn.backward(b.mine(b.dy), saved)
        np.testing.assert_allclose(dx, b.mine(reference.backward(b.dy, whole)[0]), atol=1e-13)


def a_layer(ranks, comm):
    batch = Batch(ranks, sizes_of(ranks), np.float32)
    bn = fastbn.BatchNorm(C, comm=ranks, reduce_params=True)
    bn.gamma[...], bn.beta[...] = batch.gamma, batch.beta
    alone = fastbn.BatchNorm(C)
    alone.gamma[...], alone.beta[...] = batch.gamma, batch.beta
    y, want = bn(batch.mine(batch.x)), alone(batch.x)
    np.testing.assert_allclose(y, batch.mine(want), atol=2e-6)
    dx, want_dx = bn.backward(batch.mine(batch.dy)), alone.backward(batch.dy)
    np.testing.assert_allclose(dx, batch.mine(want_dx), atol=2e-6)
    np.testing.assert_allclose(bn.dgamma, alone.dgamma, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(bn.running.var, alone.running.var, rtol=1e-6)
    same_everywhere(ranks, comm, bn.running.mean, bn.running.var, bn.dgamma)
    calls = ranks.calls
    bn.eval()(batch.mine(batch.x))
    assert ranks.calls == calls


def recalibrated(ranks, comm):
    """Batches of each rank, none on the first; an empty rank knows no dtype."""
    batch = Batch(ranks, [0, *sizes_of(ranks)[1:]])
    bn = fastbn.BatchNorm(C, ddof=0)
    mine = list(batch.mine(batch.x)[:, None])
    found = fastbn.recalibrate(mine, bn, comm=ranks)
    for a, b in zip(found.exact(), reference.moments(batch.x).exact(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13)
    assert (found.dtype, bn.running.batches) == (np.float64, len(batch.x))
    same_everywhere(ranks, comm, bn.running.mean, bn.running.var)
    wrong = mine if ranks.rank else [np.ones((2, C + 1))]
    with pytest.raises(fastbn.RanksError if ranks.rank else ValueError, match="channels of shape"):
        fastbn.recalibrate(wrong, bn, comm=ranks)


SCENARIOS = [
    *(uneven_ranks, parameters_of_this_rank, float32_far_from_0, float64_far_from_0, channels_last, float16),
    *(an_empty_rank, one_rank_with_all, all_ranks_empty, one_value_on_each_rank, one_value_in_all),
    *(the_same_bits_every_time, the_same_bits_as_any_engine, one_message_a_pass, frozen_statistics_send_nothing),
    *(
        with_weights_activation_and_residual,
        all_weights_0,
        not_finite_on_one_rank,
        other_channels,
        other_dtype,
        other_eps,
        a_rank_that_refuses_its_arguments,
    ),
    *(a_backward_pass_too_few, another_layers_backward, a_call_too_few_at_the_end, many_channels, no_channels),
    *(in_parts, a_layer, recalibrated),
]


def gather(ranks, comm, data):
    """Of bytes, by the library's own means: the judge of what went through fastbn.distributed."""
    if hasattr(comm, "Get_rank"):
        return comm.allgather(data)
    if hasattr(comm, "exchange"):  # threads
        return comm.exchange(data)
    import torch.distributed as dist

    out = [None] * ranks.size
    dist.all_gather_object(out, data, group=comm)
    return out


def run_all(ranks, comm, scenarios=SCENARIOS):
    failures = {}
    for scenario in scenarios:
        try:
            scenario(ranks, comm)
            failure = b""
        except Exception:
            failure = f"rank {ranks.rank}: {traceback.format_exc()}".encode()
        failures[scenario.__name__] = next((f.decode() for f in gather(ranks, comm, failure) if f), None)
    return failures


# Ranks that are lost. `comm` is fastbn.Ranks with a short timeout; the survivors print what they were told.


def lose(ranks, how):
    x = np.ones((4, C))
    fastbn.forward(x, comm=ranks)
    if ranks.rank == ranks.size - 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "stopped":
            time.sleep(60)
        elif how == "raises":
            raise LookupError("an error of this rank's own")
        elif how == "leaves":
            return
    start = time.monotonic()
    try:
        fastbn.forward(x, comm=ranks)
    except fastbn.RanksError as error:
        print(f"LOST rank {ranks.rank} after {time.monotonic() - start:.2f} s: {error}", flush=True)
    try:
        fastbn.forward(x, comm=ranks)
    except fastbn.RanksError as error:
        print(f"AGAIN rank {ranks.rank}: {error}", flush=True)
    time.sleep(0.5)  # let the others speak
    if hasattr(ranks.comm, "Abort"):
        ranks.comm.Abort(3)
    os._exit(3)


def main():
    engine, *rest = sys.argv[1:]
    if engine == "mpi":
        from mpi4py import MPI

        comm = MPI.COMM_WORLD
    else:
        import torch.distributed as dist

        rank, size, place = int(rest.pop(0)), int(rest.pop(0)), rest.pop(0)
        dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=size)
        comm = dist.group.WORLD
    ranks = fastbn.Ranks(comm, timeout=float(rest[1]) if rest else 60)
    if rest:
        lose(ranks, rest[0])
    else:
        failures = run_all(ranks, comm)
        if ranks.rank == 0:
            print("RESULT " + json.dumps(failures), flush=True)


if __name__ == "__main__":
    main()
