// The list of all ops. Each is declared in the file of its name.
#include "op.h"

namespace qpass {

const Op& quantize_tensor();
const Op& quantize_per_token();
const Op& dequantize();
const Op& dequantize_weight();
const Op& layernorm();
const Op& rmsnorm();
const Op& layernorm_quantization();
const Op& rmsnorm_quantization();
const Op& activation_quantization();
const Op& smooth_quant_gemm();
const Op& weight_only_quant_matmul();
const Op& weight_only_groupwise_quant_matmul();

namespace {

std::vector<const Op*>& registered() {
  static std::vector<const Op*> all;
  return all;
}

}  // namespace

Register::Register(const Op& op) { registered().push_back(&op); }

const std::vector<const Op*>& ops() {
  static const std::vector<const Op*> all = [] {
    std::vector<const Op*> own = {
        &quantize_tensor(),
        &quantize_per_token(),
        &dequantize(),
        &dequantize_weight(),
        &layernorm(),
        &rmsnorm(),
        &layernorm_quantization(),
        &rmsnorm_quantization(),
        &activation_quantization(),
        &smooth_quant_gemm(),
        &weight_only_quant_matmul(),
        &weight_only_groupwise_quant_matmul(),
    };
    own.insert(own.end(), registered().begin(), registered().end());
    return own;
  }();
  return all;
}

}  // namespace qpass
