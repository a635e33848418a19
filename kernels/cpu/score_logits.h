// What score_logits.cpp gives to dispatch.cpp.
#pragma once

#include <cstdint>

// One model's last step: logits[r][n] = sum_k hidden[r][k] w[n][k] + bias[n].
struct QkHead {
    const uint16_t* hidden;  // bfloat16, rows row_stride elements apart
    int64_t row_stride;
    const uint8_t* packed;  // w, as QK_PACKED_BFLOAT16
    const float* bias;      // [columns] or nullptr
    double* nll;            // [rows]: log(sum exp(logits)) - logits[target]
    int64_t* index;         // [rows]: of the largest logit, the lower of two alike
    double* extra;          // [rows]: of the base the probability of that one, of the candidate KL(base‖candidate)
};

struct QkScores {
    int64_t rows, inner, columns;
    const int64_t* targets;  // [rows]
    QkHead base, quant;      // quant.hidden nullptr: none
    int threads;
};
