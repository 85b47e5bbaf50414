"""Compressive memories against their naive twin: both rules, any number of memories, any turns."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from newllm.ops import memory, reference
from newllm.ops.linear_attention import feature_map


def naive(q, k, v, matrix, normaliser, turns, delta):
    """Segment by segment, token by token; q, k, v are not yet features."""
    B, H, G, S, _ = q.shape
    N = matrix.shape[1]
    states = [[[(matrix[b, n, h], normaliser[b, n, h]) for h in range(H)] for n in range(N)] for b in range(B)]
    reads = torch.zeros(B, N, H, G, S, v.shape[-1], dtype=q.dtype)
    for b in range(B):
        for h in range(H):
            for g in range(G):
                for n in range(N):
                    for s in range(S):
                        reads[b, n, h, g, s] = reference.read_memory(q[b, h, g, s], *states[b][n][h])
                n = int(turns[b, g])
                if n >= 0:
                    states[b][n][h] = reference.write_memory(k[b, h, g], v[b, h, g], *states[b][n][h], delta)
    after = [[[states[b][n][h] for h in range(H)] for n in range(N)] for b in range(B)]
    return reads, *(
        torch.stack([torch.stack([torch.stack([head[i] for head in heads]) for heads in row]) for row in after])
        for i in (0, 1)
    )


@given(
    G=st.integers(1, 6),
    S=st.integers(1, 3),
    N=st.integers(1, 3),
    delta=st.booleans(),
    full=st.booleans(),
    block=st.integers(1, 4),
    data=st.data(),
)
def test_reading_and_writing_segments_equals_the_naive_twin(G, S, N, delta, full, block, data):
    B, H, d, dv = 2, 2, 3, 4
    torch.manual_seed(G * 100 + S)
    turns = torch.tensor([[data.draw(st.integers(-1, N - 1)) for _ in range(G)] for _ in range(B)])
    q, k = torch.randn(2, B, H, G, S, d, dtype=torch.float64)
    v = torch.randn(B, H, G, S, dv, dtype=torch.float64)
    matrix = torch.randn(B, N, H, d, dv, dtype=torch.float64) * full
    normaliser = torch.rand(B, N, H, d, dtype=torch.float64) * full
    writes = data.draw(st.integers(0, G))
    written = torch.where(torch.arange(G) < writes, turns, -1)
    reads, matrix_after, normaliser_after = naive(q, k, v, matrix, normaliser, written, delta)
    old, memory.BLOCK = memory.BLOCK, block
    try:
        features = feature_map(q), feature_map(k)
        found, *after = memory.read_segments(*features, v, matrix, normaliser, turns, delta=delta, writes=writes)
    finally:
        memory.BLOCK = old
    torch.testing.assert_close(found.reads, reads, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(after[0], matrix_after, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(after[1], normaliser_after, rtol=1e-10, atol=1e-10)
    if writes < G:  # what the last segment found is what the memories hold
        torch.testing.assert_close(found.normalisers[:, :, :, -1], normaliser_after, rtol=1e-10, atol=1e-10)


def test_the_delta_rule_writes_a_known_association_once():
    k = feature_map(torch.randn(1, 1, 1, 4, dtype=torch.float64))  # a segment of one token
    v = torch.randn(1, 1, 1, 4, dtype=torch.float64)
    turns = torch.zeros(1, dtype=torch.long)
    nothing = torch.zeros(1, 1, 1, 4, 4, dtype=torch.float64), torch.zeros(1, 1, 1, 4, dtype=torch.float64)
    once = memory.write(k, v, *nothing, turns, delta=True)
    twice = memory.write(k, v, *once, turns, delta=True)
    torch.testing.assert_close(twice[0], once[0])
    # The normaliser counts both: what is read halves, and stays so however often it is written.
    for _ in range(3):
        torch.testing.assert_close(memory.read(k, twice[0][:, 0], twice[1][:, 0])[0], v / 2)
        twice = memory.write(k, v, *twice, turns, delta=True)
    assert not torch.allclose(memory.write(k, v, *once, turns, delta=False)[0], once[0])


def test_a_memory_of_orthogonal_keys_answers_each_with_its_value():
    """An oracle that owes nothing to our code: orthogonal features make the read exact."""
    k, v = torch.eye(6)[None, None], torch.randn(1, 1, 6, 5)
    empty = torch.zeros(1, 1, 1, 6, 5), torch.zeros(1, 1, 1, 6)
    matrix, normaliser = memory.write(k, v, *empty, torch.zeros(1, dtype=torch.long), delta=False)
    read, mass = memory.read(k, matrix[:, 0], normaliser[:, 0])
    torch.testing.assert_close(read, v)
    assert (mass == 1).all()
