// e^x of a vector, within 2 units in the last place of float32.
#pragma once

#include "lanes.h"

namespace QK_LEVEL {

// Between -87 and 88, and at those limits beyond them; NaN for NaN. 2^n e^r with n whole and |r| <= ln 2 / 2, e^r by Taylor's polynomial of degree 7.
inline lanes::Float exponential(lanes::Float x) {
    using namespace lanes;
    x = smaller(broadcast(88.0f), larger(broadcast(-87.0f), x));
    const Word n = nearest(multiply(x, broadcast(1.44269504f)));
    const Float whole = to_float(n);
    // ln 2 in two parts, of which the first has few bits: its products with n are exact.
    Float r = multiply_add(whole, broadcast(-0.693145751953125f), x);
    r = multiply_add(whole, broadcast(-1.42860677e-6f), r);
    Float p = broadcast(1.0f / 5040);
    p = multiply_add(p, r, broadcast(1.0f / 720));
    p = multiply_add(p, r, broadcast(1.0f / 120));
    p = multiply_add(p, r, broadcast(1.0f / 24));
    p = multiply_add(p, r, broadcast(1.0f / 6));
    p = multiply_add(p, r, broadcast(0.5f));
    p = multiply_add(p, r, broadcast(1.0f));
    p = multiply_add(p, r, broadcast(1.0f));
    return multiply(p, as_float(shift_left<23>(add(n, broadcast(127u)))));
}

}  // namespace QK_LEVEL
