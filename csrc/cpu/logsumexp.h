// Log-sum-exp of one row of logits on the CPU.
#pragma once

#include "../numerics.h"

namespace mpg::cpu {

template <class T>
LogSum<float> row_log_sum(const T* row, int64_t V, float inv_temperature);
LogSum<double> row_log_sum(const double* row, int64_t V, double inv_temperature);

}  // namespace mpg::cpu
