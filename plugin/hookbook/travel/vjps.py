"""Vector-Jacobian products."""

import torch


def vjps(out, leaves, states, chunk, mean=False, tick=None, into=None, rows=None):
    """The Jacobians of `out` `[n, d_out]` with respect to each of `leaves` `[n, d_in]`, where row i depends on row i alone.

    Args:
        states: For each leaf `[n, d_in]`, which its Jacobian is applied to.
        chunk: How many output dimensions go back at once.
        mean: Only the mean over rows.
        tick: Called with the number of dimensions that are done.
        into: Where to write, for more rows than these; None: new tensors.
        rows: Which rows of `into` these are; with `mean` the number of all rows, and `into` is added to.

    Returns:
        For each leaf `[n, d_out, d_in]`, or `[d_out, d_in]`; and after these for each leaf its Jacobians times its states, `[n, d_out]`.
    """
    n, d_out = out.shape
    found = into if into is not None else [torch.empty(*([] if mean else [n]), d_out, leaf.shape[-1], dtype=leaf.dtype) for leaf in leaves]
    products = [torch.empty(n, d_out, dtype=leaf.dtype) for leaf in leaves]
    for start in range(0, d_out, chunk):
        dims = torch.arange(start, min(start + chunk, d_out), device=out.device)
        ones = torch.nn.functional.one_hot(dims, d_out).to(out.dtype)[:, None].expand(-1, n, -1)
        grads = torch.autograd.grad(out, leaves, ones, retain_graph=start + chunk < d_out, is_grads_batched=True)
        for matrix, product, state, grad in zip(found, products, states, grads, strict=True):
            product[:, start : start + chunk] = torch.einsum("cnd,nd->nc", grad, state.to(grad.device))
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
    return [*found, *products]
