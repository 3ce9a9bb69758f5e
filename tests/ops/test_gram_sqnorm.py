"""The Gram form equals the direct form on geometries drawn at random; its table of shapes is in test_conv_grad_sqnorm.py."""

from __future__ import annotations

import numpy as np
import pytest
from test_conv_grad_sqnorm import CPU, F32, TOLERANCES, by_autograd, inputs

from infoutil_fast.ops.sqnorms import gram_sqnorm


@pytest.mark.parametrize("backend", CPU)
def test_any_geometry(backend: str, rng: np.random.Generator) -> None:
    done = 0
    while done < 60:
        (h, w), (kh, kw) = rng.integers(1, 12, 2).tolist(), rng.integers(1, 5, 2).tolist()
        stride, dilation = tuple(rng.integers(1, 4, 2).tolist()), tuple(rng.integers(1, 4, 2).tolist())
        padding = tuple(rng.integers(0, 5, 2).tolist())
        if h + 2 * padding[0] <= dilation[0] * (kh - 1) or w + 2 * padding[1] <= dilation[1] * (kw - 1):
            continue
        done += 1
        c, o = rng.integers(1, 40, 2).tolist()
        x, g, options = inputs((2, c, o, h, w, (kh, kw), stride, padding, dilation, 1), "channels_last", F32)
        got, want = gram_sqnorm(x, g, *options[:-1], backend=backend).double(), by_autograd(x, g, options)
        # of the largest that it can be, too: where it is far below, products of both signs cancel
        scale = x.double().square().sum((1, 2, 3)) * g.double().square().sum((1, 2, 3))
        assert ((got - want).abs() <= TOLERANCES[F32] * want + 1e-7 * scale).all(), (h, w, c, o, options)
