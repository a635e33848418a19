#pragma once

#include <cstdint>

// codes: [columns, inner] bytes, or bfloat16; packed: qk_rounded_up(columns, QK_PANEL) * qk_rounded_up(inner, QK_INNER_UNIT) of them.
void pack_weight(int packing, const void* codes, int64_t columns, int64_t inner, int64_t row_stride, void* packed);
