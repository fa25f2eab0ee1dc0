"""The Triton kernels behind `kernels.py`: GroupNorm, modulation, GELU and gate over feature maps in channels_last.

A feature map is (B, rows, channels) in memory, `rows` being its pixels. A program has one image, one chunk of its rows
and one block of channels, and leaves sums of its own, which a second, small kernel adds up: nothing is added up in an
order that changes. Rows of the modulation (B, channels) are `step` apart in memory. Arithmetic is float32, or float64
(`DOUBLE`) in tests. Per channel of an image there are

    scale A, centre M, shift T, and 1 / deviation r:    z = (x - M) A + T,    xhat = (x - M) r
"""

import triton
import triton.language as tl


@triton.jit
def _gelu(z):
    return 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))


@triton.jit
def _gelu_slope(z):
    return 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)


@triton.jit
def _channels_of(block, channels, BLOCK_C: tl.constexpr):
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    return c, c < channels


@triton.jit
def _tile(first, end, c, inside, channels, BLOCK_R: tl.constexpr):
    """Where the values of some rows of one image lie, and which of them there are."""
    r = first + tl.arange(0, BLOCK_R)
    return r[:, None] * channels + c[None, :], (r < end)[:, None] & inside[None, :]


@triton.jit
def _line(found, own, size, inside):
    """A, M and T of each channel."""
    a = tl.load(found + own, mask=inside, other=0.0)
    m = tl.load(found + size + own, mask=inside, other=0.0)
    return a, m, tl.load(found + 2 * size + own, mask=inside, other=0.0)


@triton.jit
def statistics(
    x, means, squares, rows, channels, chunk_rows, DOUBLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """For each chunk and channel the mean of x and the sum of squared differences from it: (B, chunks, channels)."""
    compute = tl.float64 if DOUBLE else tl.float32
    image, chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    c, inside = _channels_of(tl.program_id(2), channels, BLOCK_C)
    x += image.to(tl.int64) * rows * channels
    end = tl.minimum((chunk + 1) * chunk_rows, rows)
    mean = tl.zeros((BLOCK_C,), compute)
    square = tl.zeros((BLOCK_C,), compute)
    for first in range(chunk * chunk_rows, end, BLOCK_R):
        within, valid = _tile(first, end, c, inside, channels, BLOCK_R)
        values = tl.load(x + within, mask=valid, other=0.0).to(compute)
        before = (first - chunk * chunk_rows).to(compute)
        count = tl.minimum(end - first, BLOCK_R).to(compute)
        own = tl.sum(values, 0) / count
        differences = tl.where(valid, values - own[None, :], 0.0)
        step = own - mean  # two sets of values put together (Chan et al. 1979)
        square += tl.sum(differences * differences, 0) + step * step * (before * count / (before + count))
        mean += step * (count / (before + count))
    place = (image * chunks + chunk) * channels + c
    tl.store(means + place, mean, mask=inside)
    tl.store(squares + place, square, mask=inside)


@triton.jit
def coefficients(
    means, squares, weight, shift_of_norm, scale, shift, bias, out, step, rows, channels, chunks, chunk_rows,
    MODULATED: tl.constexpr, BIASED: tl.constexpr, DOUBLE: tl.constexpr, EPS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """From the chunks' statistics to A, M, T and r of each channel: (4, B, channels). A program has one group."""
    compute = tl.float64 if DOUBLE else tl.float32
    image, images, group = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    within = tl.arange(0, BLOCK_G)
    c, inside = group * GROUP + within, within < GROUP
    k = tl.arange(0, BLOCK_K)
    valid = (k < chunks)[:, None] & inside[None, :]
    place = (image * chunks + k[:, None]) * channels + c[None, :]
    moved = tl.zeros((BLOCK_G,), compute)
    if BIASED:
        moved = tl.load(bias + c, mask=inside, other=0.0).to(compute)
    mean = tl.load(means + place, mask=valid, other=0.0) + moved[None, :]
    square = tl.load(squares + place, mask=valid, other=0.0)
    count = tl.maximum(tl.minimum(rows - k * chunk_rows, chunk_rows), 0).to(compute)[:, None]
    total = rows * GROUP
    centre = tl.sum(tl.sum(tl.where(valid, count * mean, 0.0), 1), 0) / total
    apart = mean - centre
    variance = tl.sum(tl.sum(tl.where(valid, square + count * apart * apart, 0.0), 1), 0) / total
    r = 1 / tl.sqrt(variance + EPS)
    factor = tl.load(weight + c, mask=inside, other=0.0).to(compute)
    term = tl.load(shift_of_norm + c, mask=inside, other=0.0).to(compute)
    own = image * channels + c
    if MODULATED:
        times = 1 + tl.load(scale + image * step + c, mask=inside, other=0.0).to(compute)
        factor *= times
        term = term * times + tl.load(shift + image * step + c, mask=inside, other=0.0).to(compute)
    size = images * channels
    tl.store(out + own, factor * r, mask=inside)
    tl.store(out + size + own, centre - moved, mask=inside)
    tl.store(out + 2 * size + own, term, mask=inside)
    tl.store(out + 3 * size + own, tl.zeros((BLOCK_G,), compute) + r, mask=inside)


@triton.jit
def apply_gelu(
    x, found, y, rows, channels, chunk_rows, DOUBLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """y = GELU((x - M) A + T)."""
    compute = tl.float64 if DOUBLE else tl.float32
    image, images, chunk = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    c, inside = _channels_of(tl.program_id(2), channels, BLOCK_C)
    offset = image.to(tl.int64) * rows * channels
    own, size = image * channels + c, images * channels
    a, m, t = _line(found, own, size, inside)
    end = tl.minimum((chunk + 1) * chunk_rows, rows)
    for first in range(chunk * chunk_rows, end, BLOCK_R):
        within, valid = _tile(first, end, c, inside, channels, BLOCK_R)
        place = offset + within
        values = tl.load(x + place, mask=valid, other=0.0).to(compute)
        z = (values - m[None, :]) * a[None, :] + t[None, :]
        tl.store(y + place, _gelu(z).to(y.dtype.element_ty), mask=valid)


@triton.jit
def gradient_sums(
    x, dy, found, sums, rows, channels, chunk_rows, DOUBLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """For each chunk and channel the sums of dz, dz xhat and xhat: (3, B, chunks, channels), with dz = dy GELU'(z)."""
    compute = tl.float64 if DOUBLE else tl.float32
    image, images = tl.program_id(0), tl.num_programs(0)
    chunk, chunks = tl.program_id(1), tl.num_programs(1)
    c, inside = _channels_of(tl.program_id(2), channels, BLOCK_C)
    offset = image.to(tl.int64) * rows * channels
    own, size = image * channels + c, images * channels
    a, m, t = _line(found, own, size, inside)
    end = tl.minimum((chunk + 1) * chunk_rows, rows)
    slopes = tl.zeros((BLOCK_C,), compute)
    products = tl.zeros((BLOCK_C,), compute)
    centred = tl.zeros((BLOCK_C,), compute)
    for first in range(chunk * chunk_rows, end, BLOCK_R):
        within, valid = _tile(first, end, c, inside, channels, BLOCK_R)
        place = offset + within
        apart = tl.load(x + place, mask=valid, other=0.0).to(compute) - m[None, :]
        apart = tl.where(valid, apart, 0.0)
        dz = tl.load(dy + place, mask=valid, other=0.0).to(compute) * _gelu_slope(apart * a[None, :] + t[None, :])
        slopes += tl.sum(dz, 0)
        products += tl.sum(dz * apart, 0)
        centred += tl.sum(apart, 0)
    deviation = tl.load(found + 3 * size + own, mask=inside, other=0.0)
    place = (image * chunks + chunk) * channels + c
    tl.store(sums + place, slopes, mask=inside)
    tl.store(sums + size * chunks + place, products * deviation, mask=inside)
    tl.store(sums + 2 * size * chunks + place, centred * deviation, mask=inside)


@triton.jit
def gradient_coefficients(
    sums, found, weight, shift_of_norm, scale, out, step, rows, channels, chunks,
    MODULATED: tl.constexpr, DOUBLE: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """From the chunks' sums to D and E of dx = dz A + (x - M) D + E, and to each channel's gradients of the norm's
    weight and bias, of scale and shift, and of the bias before: (7, B, channels). A program has one group."""
    compute = tl.float64 if DOUBLE else tl.float32
    image, images, group = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    within = tl.arange(0, BLOCK_G)
    c, inside = group * GROUP + within, within < GROUP
    k = tl.arange(0, BLOCK_K)
    valid = (k < chunks)[:, None] & inside[None, :]
    place = (image * chunks + k[:, None]) * channels + c[None, :]
    own, size = image * channels + c, images * channels
    slopes = tl.sum(tl.load(sums + place, mask=valid, other=0.0), 0)
    products = tl.sum(tl.load(sums + size * chunks + place, mask=valid, other=0.0), 0)
    centred = tl.sum(tl.load(sums + 2 * size * chunks + place, mask=valid, other=0.0), 0)
    a = tl.load(found + own, mask=inside, other=0.0)
    r = tl.load(found + 3 * size + own, mask=inside, other=0.0)
    gain = tl.load(weight + c, mask=inside, other=0.0).to(compute)
    term = tl.load(shift_of_norm + c, mask=inside, other=0.0).to(compute)
    times = tl.zeros((BLOCK_G,), compute) + 1
    if MODULATED:
        times += tl.load(scale + image * step + c, mask=inside, other=0.0).to(compute)
    total = rows * GROUP
    mean_slope = tl.sum(a * slopes, 0) / total  # of dz A, the gradient of xhat times r
    mean_product = tl.sum(a * products, 0) / total
    tl.store(out + own, -r * mean_product, mask=inside)
    tl.store(out + size + own, tl.zeros((BLOCK_G,), compute) - mean_slope, mask=inside)
    tl.store(out + 2 * size + own, products * times, mask=inside)
    tl.store(out + 3 * size + own, slopes * times, mask=inside)
    tl.store(out + 4 * size + own, gain * products + term * slopes, mask=inside)
    tl.store(out + 5 * size + own, slopes, mask=inside)
    tl.store(out + 6 * size + own, a * slopes - rows * mean_slope - mean_product * centred, mask=inside)


@triton.jit
def gradient_of_input(
    x, dy, found, more, dx, rows, channels, chunk_rows,
    DOUBLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = dz A + (x - M) D + E."""
    compute = tl.float64 if DOUBLE else tl.float32
    image, images, chunk = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    c, inside = _channels_of(tl.program_id(2), channels, BLOCK_C)
    offset = image.to(tl.int64) * rows * channels
    own, size = image * channels + c, images * channels
    a, m, t = _line(found, own, size, inside)
    d = tl.load(more + own, mask=inside, other=0.0)
    e = tl.load(more + size + own, mask=inside, other=0.0)
    end = tl.minimum((chunk + 1) * chunk_rows, rows)
    for first in range(chunk * chunk_rows, end, BLOCK_R):
        within, valid = _tile(first, end, c, inside, channels, BLOCK_R)
        place = offset + within
        apart = tl.load(x + place, mask=valid, other=0.0).to(compute) - m[None, :]
        dz = tl.load(dy + place, mask=valid, other=0.0).to(compute) * _gelu_slope(apart * a[None, :] + t[None, :])
        tl.store(dx + place, (dz * a[None, :] + apart * d[None, :] + e[None, :]).to(dx.dtype.element_ty), mask=valid)


@triton.jit
def gate(
    x, h, factor, bias, y, step, rows, channels, chunk_rows,
    BIASED: tl.constexpr, DOUBLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = x + gate (h + bias)."""
    compute = tl.float64 if DOUBLE else tl.float32
    image, chunk = tl.program_id(0), tl.program_id(1)
    c, inside = _channels_of(tl.program_id(2), channels, BLOCK_C)
    offset = image.to(tl.int64) * rows * channels
    g = tl.load(factor + image * step + c, mask=inside, other=0.0).to(compute)
    b = tl.zeros((BLOCK_C,), compute)
    if BIASED:
        b = tl.load(bias + c, mask=inside, other=0.0).to(compute)
    end = tl.minimum((chunk + 1) * chunk_rows, rows)
    for first in range(chunk * chunk_rows, end, BLOCK_R):
        within, valid = _tile(first, end, c, inside, channels, BLOCK_R)
        place = offset + within
        added = g[None, :] * (tl.load(h + place, mask=valid, other=0.0).to(compute) + b[None, :])
        values = tl.load(x + place, mask=valid, other=0.0).to(compute) + added
        tl.store(y + place, values.to(y.dtype.element_ty), mask=valid)


@triton.jit
def gate_gradients(
    dy, h, factor, dh, sums, step, rows, channels, chunk_rows,
    DOUBLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dh = gate dy, and for each chunk and channel the sums of dy h and of dy: (2, B, chunks, channels)."""
    compute = tl.float64 if DOUBLE else tl.float32
    image, images = tl.program_id(0), tl.num_programs(0)
    chunk, chunks = tl.program_id(1), tl.num_programs(1)
    c, inside = _channels_of(tl.program_id(2), channels, BLOCK_C)
    offset = image.to(tl.int64) * rows * channels
    g = tl.load(factor + image * step + c, mask=inside, other=0.0).to(compute)
    end = tl.minimum((chunk + 1) * chunk_rows, rows)
    products = tl.zeros((BLOCK_C,), compute)
    slopes = tl.zeros((BLOCK_C,), compute)
    for first in range(chunk * chunk_rows, end, BLOCK_R):
        within, valid = _tile(first, end, c, inside, channels, BLOCK_R)
        place = offset + within
        slope = tl.load(dy + place, mask=valid, other=0.0).to(compute)
        products += tl.sum(slope * tl.load(h + place, mask=valid, other=0.0).to(compute), 0)
        slopes += tl.sum(slope, 0)
        tl.store(dh + place, (g[None, :] * slope).to(dh.dtype.element_ty), mask=valid)
    place = (image * chunks + chunk) * channels + c
    tl.store(sums + place, products, mask=inside)
    tl.store(sums + images * chunks * channels + place, slopes, mask=inside)
