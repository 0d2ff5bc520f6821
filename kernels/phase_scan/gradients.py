# ruff: noqa: RUF005  (Triton has no unpacking in tuples)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="import-untyped, assignment"
"""Cotangents and gradients of a tile of the backward, row by row; `backward.py` has the formulas.

Shapes: tuples of R tiles [G, BD], as `tiles.py` explains.
"""

import triton
import triton.language as tl

from kernels.phase_scan.tiles import load_rows, rows_at, store_rows


@triton.jit
def read_cotangents(
    dy,
    dread_offset,
    p_re_RGD,
    p_im_RGD,
    p_mass_RGD,
    u_re_RGD,
    u_im_RGD,
    mass_RGD,
    cos_RGD,
    sin_RGD,
    row,
    left,
    column,
    OFFSET: tl.constexpr,
    EPSILON: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    BD: tl.constexpr,
    NORM: tl.constexpr,
    IMAGINARY: tl.constexpr,
):
    """Return b = g exp(i p) of a tile and the cotangents of the sums of masses; store those of the reader's offset."""
    WIDTH: tl.constexpr = 2 * D if IMAGINARY else D
    b_re_RGD = ()
    b_im_RGD = ()
    dsum_RGD = ()
    for r in tl.static_range(R):
        g_re_GD = load_rows(dy, r, row, left, column, WIDTH, D, R, G, BD).to(tl.float32)
        g_im_GD = tl.zeros_like(g_re_GD)
        if IMAGINARY:
            g_im_GD = load_rows(dy + D, r, row, left, column, WIDTH, D, R, G, BD).to(tl.float32)
        h_re_GD, h_im_GD = p_re_RGD[r] + u_re_RGD[r], p_im_RGD[r] + u_im_RGD[r]
        z_re_GD = cos_RGD[r] * h_re_GD + sin_RGD[r] * h_im_GD
        z_im_GD = cos_RGD[r] * h_im_GD - sin_RGD[r] * h_re_GD
        if NORM:
            factor_GD = 1.0 / (p_mass_RGD[r] + mass_RGD[r] + EPSILON)
            g_re_GD *= factor_GD
            g_im_GD *= factor_GD
            dsum_RGD = dsum_RGD + (-(g_re_GD * z_re_GD + g_im_GD * z_im_GD) * factor_GD,)
        if OFFSET:
            dread_GD = g_re_GD * z_im_GD - g_im_GD * z_re_GD
            store_rows(dread_offset, dread_GD, r, row, left, column, D, D, R, G, BD)
        b_re_RGD = b_re_RGD + (g_re_GD * cos_RGD[r] - g_im_GD * sin_RGD[r],)
        b_im_RGD = b_im_RGD + (g_re_GD * sin_RGD[r] + g_im_GD * cos_RGD[r],)
    return b_re_RGD, b_im_RGD, dsum_RGD


@triton.jit
def store_gradients(
    dx,
    domega,
    dmass,
    dlog_decay,
    dwrite_offset,
    dchannel,
    mu_re_RGD,
    mu_im_RGD,
    mu_mass_RGD,
    p_re_RGD,
    p_im_RGD,
    p_mass_RGD,
    u_re_RGD,
    u_im_RGD,
    x_RGD,
    mass_RGD,
    cos_RGD,
    sin_RGD,
    row,
    left,
    column,
    MASS: tl.constexpr,
    DECAY: tl.constexpr,
    OFFSET: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    BD: tl.constexpr,
    NORM: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
):
    """Store the gradients of a tile from mu; return the sum `dchannel` of those of decays per channel."""
    for r in tl.static_range(R):
        mu_re_GD, mu_im_GD = mu_re_RGD[r], mu_im_RGD[r]
        domega_GD = mu_re_GD * p_im_RGD[r] - mu_im_GD * p_re_RGD[r]
        store_rows(domega, domega_GD, r, row, left, column, D, D, R, G, BD)
        du_GD = mu_re_GD * cos_RGD[r] + mu_im_GD * sin_RGD[r]
        dmass_GD = du_GD * x_RGD[r]
        dgate_GD = mu_re_GD * p_re_RGD[r] + mu_im_GD * p_im_RGD[r]
        if NORM:
            dmass_GD += mu_mass_RGD[r]
            dgate_GD += mu_mass_RGD[r] * p_mass_RGD[r]
        if MASS:
            store_rows(dx, du_GD * mass_RGD[r], r, row, left, column, D, D, R, G, BD)
            store_rows(dmass, dmass_GD, r, row, left, column, D, D, R, G, BD)
        else:
            store_rows(dx, du_GD, r, row, left, column, D, D, R, G, BD)
        if OFFSET:
            dwrite_GD = mu_im_GD * u_re_RGD[r] - mu_re_GD * u_im_RGD[r]
            store_rows(dwrite_offset, dwrite_GD, r, row, left, column, D, D, R, G, BD)
        if PER_CHANNEL:
            if left is not None:
                dgate_GD = tl.where(rows_at(r, R, G) < left, dgate_GD, 0.0)
            dchannel += dgate_GD
        elif DECAY:
            store_rows(dlog_decay, dgate_GD, r, row, left, column, D, D, R, G, BD)
    return dchannel
