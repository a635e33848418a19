// output[m][n] = store( sum_g( sum_{k in g} a[m][k] w[n][k] ) scale_a[m][g] scale_w[g][n] + bias[n] ): sizes, side inputs and the end of every multiplication.
#pragma once

#include "numbers.h"

// Sizes are of tokens m, output features n and input features k. Pointers to codes are aligned to 16 bytes, `inner` and row_stride multiples of 16: Python
// sees to that. Steps are in elements, 0 where one value serves all.
struct Product {
    const void* activations;  // [tokens, inner] codes or bfloat16, rows row_stride elements apart
    const uint8_t* weight;    // [features, inner] codes, dense
    int tokens, features, inner, group;  // group: input features that share scales; inner, or a multiple of 32
    int64_t row_stride;
    const float* activation_scale;  // nullptr: 1
    int64_t activation_row_step, activation_group_step;
    const float* weight_scale;  // [groups or 1, features or blocks of `scale_columns` of them]
    int64_t weight_group_step;
    int scale_columns;          // features that share a scale: 1 or 128
    const float* bias;          // [features] or nullptr
    const int32_t* zero_point;  // of the activations, of INT8 with one group; nullptr: 0
    int64_t zero_point_step;
    const int32_t* weight_sums;  // [features], each the sum of a feature's codes; needed with zero_point
    void* output;                // [tokens, features], dense
    int output_type;             // QkInput

    QK_ANYWHERE bool is_grouped() const { return group < inner; }
    QK_ANYWHERE float scale_of_token(int token, int group_index) const {
        return activation_scale ? activation_scale[token * activation_row_step + group_index * activation_group_step] : 1.0f;
    }
    QK_ANYWHERE float scale_of_feature(int feature, int group_index) const {
        return weight_scale[group_index * weight_group_step + (scale_columns == 1 ? feature : feature >> 7)];  // blocks of 128
    }
};

namespace multiply {

// What the end of a sum needs of its token and of its feature. A group's sums have been scaled before: 1 then. The last token or feature stands for those beyond it.
struct TokenSide {
    float scale;
    int32_t zero_point;
};
struct FeatureSide {
    float scale, bias;
    int32_t codes;
};

QK_ANYWHERE TokenSide token_side(const Product& p, int token) {
    token = token < p.tokens ? token : p.tokens - 1;
    return {p.is_grouped() ? 1.0f : p.scale_of_token(token, 0), p.zero_point ? p.zero_point[token * p.zero_point_step] : 0};
}

QK_ANYWHERE FeatureSide feature_side(const Product& p, int feature) {
    feature = feature < p.features ? feature : p.features - 1;
    // Adding -0 changes nothing.
    return {p.is_grouped() ? 1.0f : p.scale_of_feature(feature, 0), p.bias ? p.bias[feature] : -0.0f, p.zero_point ? p.weight_sums[feature] : 0};
}

// One output before it is stored, in the reference's order, each step rounded.
QK_ANYWHERE float finished(int32_t sum, const TokenSide& token, const FeatureSide& feature) {
    sum -= token.zero_point * feature.codes;
    return hw::add(hw::multiply(hw::multiply(float(sum), token.scale), feature.scale), feature.bias);
}
QK_ANYWHERE float finished(float sum, const TokenSide& token, const FeatureSide& feature) {
    return hw::add(hw::multiply(hw::multiply(sum, token.scale), feature.scale), feature.bias);
}

QK_ANYWHERE void store(const Product& p, int token, int feature, float value) {
    numbers::store(p.output, p.output_type, int64_t(token) * p.features + feature, value);
}

// What a launcher was given, or false where it makes no sense. Strides and steps as Product has them.
inline bool is_whole(const Product& p) {
    const bool sizes = p.tokens >= 1 && p.features >= 1 && p.inner >= 16 && p.inner % 16 == 0 && p.row_stride % 16 == 0 && p.row_stride >= (p.tokens > 1 ? p.inner : 0);
    const bool groups = p.group == p.inner || (p.group > 0 && p.group % 32 == 0);
    const bool scales = p.weight_scale && (p.scale_columns == 1 || p.scale_columns == 128);
    const bool zeros = !p.zero_point || (p.weight_sums && !p.is_grouped());
    return sizes && groups && scales && zeros && p.output_type >= 0 && p.output_type < QK_INPUTS;
}

inline int count_of(int size, int unit) { return (size + unit - 1) / unit; }

}  // namespace multiply
