"""Vector-Jacobian products."""

import torch


def vjps(out, leaves, chunk, mean=False, tick=None, into=None, rows=None):
    """The Jacobians of `out` `[n, d_out]` with respect to each of `leaves` `[n, d_in]`, where row i depends on row i alone.

    Args:
        chunk: How many output dimensions go back at once.
        mean: Only the mean over rows.
        tick: Called with the number of dimensions that are done.
        into: Where to write, for more rows than these; None: new tensors.
        rows: Which rows of `into` these are; with `mean` the number of all rows, and `into` is added to.

    Returns:
        For each leaf `[n, d_out, d_in]`, or `[d_out, d_in]`.
    """
    n, d_out = out.shape
    found = into if into is not None else [torch.empty(*([] if mean else [n]), d_out, leaf.shape[-1], dtype=leaf.dtype) for leaf in leaves]
    for start in range(0, d_out, chunk):
        dims = torch.arange(start, min(start + chunk, d_out), device=out.device)
        ones = torch.nn.functional.one_hot(dims, d_out).to(out.dtype)[:, None].expand(-1, n, -1)
        grads = torch.autograd.grad(out, leaves, ones, retain_graph=start + chunk < d_out, is_grads_batched=True)
        for matrix, grad in zip(found, grads, strict=True):
            if into is not None and mean:
                matrix[start : start + chunk] += grad.sum(1) / rows
            elif into is not None:
                matrix[rows, start : start + chunk] = grad.transpose(0, 1)
            elif mean:
                matrix[start : start + chunk] = grad.mean(1)
            else:
                matrix[:, start : start + chunk] = grad.transpose(0, 1)
        if tick is not None:
            tick(len(dims))
    return found
