// Registration under torch's CPU dispatch key.

#include <torch/csrc/stable/library.h>

#include "operators.h"

// The schemas these operators were written for. hal_kernels.backends reads them out of the file
// before it loads it: a binary of another version must not be called with this one's arguments.
extern "C" {
__attribute__((visibility("default"), used)) extern const char hal_kernels_schemas[] =
    "hal_kernels schemas\n"
    "hal::svd_linear(Tensor x, Tensor? weight, Tensor? base, Tensor p, Tensor lam, Tensor q, "
    "float scaling, float dropout, Tensor? seed) -> (Tensor, Tensor)\n"
    "hal::svd_linear_backward(Tensor dy, Tensor x, Tensor h, Tensor? weight, Tensor p, Tensor lam, "
    "Tensor q, float scaling, float dropout, Tensor? seed, float tangent, bool needs_dx, "
    "bool needs_factors) -> (Tensor, Tensor, Tensor, Tensor)\n"
    "hal::svd_linear_group(Tensor x, Tensor[] weight, Tensor?[] bias, Tensor[] p, Tensor[] lam, "
    "Tensor[] q, float scaling, float dropout, Tensor? seed) -> (Tensor[], Tensor)\n"
    "hal::svd_linear_group_backward(Tensor?[] dy, Tensor x, Tensor h, Tensor[] weight, "
    "Tensor[] p, Tensor[] lam, Tensor[] q, float scaling, float dropout, Tensor? seed, "
    "float tangent, bool needs_dx, bool needs_factors) -> (Tensor, Tensor, Tensor, Tensor[])\n"
    "hal::orthogonality_penalty(Tensor[] factors, Tensor[] offsets, int[] max_ranks, "
    "bool squared, float weight) -> (Tensor, Tensor[])\n"
    "hal::orthogonality_penalty_backward(Tensor dvalue, Tensor[] factors, Tensor[] residuals, "
    "Tensor[] offsets, int[] max_ranks, bool squared, float weight) -> Tensor[]\n";
}

STABLE_TORCH_LIBRARY_IMPL(hal, CPU, m) {
  m.impl("svd_linear", TORCH_BOX(&hal::svd_linear));
  m.impl("svd_linear_backward", TORCH_BOX(&hal::svd_linear_backward));
  m.impl("svd_linear_group", TORCH_BOX(&hal::svd_linear_group));
  m.impl("svd_linear_group_backward", TORCH_BOX(&hal::svd_linear_group_backward));
  m.impl("orthogonality_penalty", TORCH_BOX(&hal::orthogonality_penalty));
  m.impl("orthogonality_penalty_backward", TORCH_BOX(&hal::orthogonality_penalty_backward));
}
