// The C interface of qpass's CUDA kernels: one function an op, plain structs, no TensorRT.
//
// All pointers are device pointers, 16-byte aligned; rows are contiguous. Functions enqueue on `stream`, allocate nothing and
// synchronise nothing, so all of them can be captured into a CUDA graph. They return 0, or a cudaError_t. Zero rows are no
// error and launch nothing.
//
// Arithmetic, shared bit by bit with the ONNX bodies and NumPy references (qpass/ops): float32 throughout;
// q = clip(rint(y / smoother / scale) + zero, -128, 127) with true divisions, ties to even; scale = amax / 127; where a scale
// is 0, q is 0 (or the zero point).
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {  // the numbers of ONNX's TensorProto
  QPASS_FLOAT = 1,
  QPASS_INT8 = 3,
  QPASS_HALF = 10,
  QPASS_BFLOAT16 = 16,
} qpass_type;

// How the rows of a result read an operand that broadcasts: row r has the indices i (row-major over `extent`) and reads row
// sum(i[d] * stride[d]) of the operand. rank 0: row r reads row r.
typedef struct {
  int32_t rank;
  int64_t extent[7];
  int64_t stride[7];
} qpass_rows;

// What becomes of a float32 result y [rows, k] that is quantized.
typedef struct {
  const float* smoother;  // [k] or null
  const float* scale;     // [1]: static. null: a scale per token goes to `token_scale`
  const int8_t* zero;     // [1] or null; only with `scale`
  int8_t* q;              // [rows, k], or null: y alone
  float* token_scale;     // [rows]; only without `scale`
  void* y;                // [rows, k] of the op's type, unsmoothed, or null
} qpass_quantized;

// QuantizeTensor, QuantizePerToken: x [rows, k] of type `type`. result.y must be null.
typedef struct {
  qpass_type type;
  int64_t rows, k;
  const void* x;
  qpass_quantized result;
} qpass_quantize_args;
int qpass_quantize(const qpass_quantize_args* args, cudaStream_t stream);

// Layernorm, Rmsnorm (result.q is null) and LayernormQuantization, RmsnormQuantization: y = norm(x (+ residual)) * gamma (+ beta).
// x + residual is rounded to `type` before the norm; `sum` is that rounded value.
typedef struct {
  qpass_type type;
  int32_t rms;  // 1: RMSNorm, x / sqrt(mean(x^2) + eps); 0: LayerNorm, (x - mean) / sqrt(mean((x - mean)^2) + eps)
  float epsilon;
  int64_t rows, k;
  const void* x;
  const void* residual;  // or null
  qpass_rows x_rows, residual_rows;
  const void* gamma;  // [k] of `type`
  const void* beta;   // [k] or null
  void* sum;          // [rows, k] of `type` or null; only with residual
  qpass_quantized result;
} qpass_norm_args;
int qpass_norm(const qpass_norm_args* args, cudaStream_t stream);

// ActivationQuantization: y = activation(x) (* up). `activation` as in qpass/ops/activation_quantization.py.
typedef struct {
  qpass_type type;
  int32_t activation;  // 0 gelu (erf), 1 gelu_tanh, 2 quick_gelu, 3 relu, 4 silu, 5 relu2, 6 sigmoid
  int64_t rows, k;
  const void* x;
  const void* up;  // [rows, k] or null
  qpass_quantized result;
} qpass_activation_quantize_args;
int qpass_activation_quantize(const qpass_activation_quantize_args* args, cudaStream_t stream);

// Dequantize: x = q * scale.
typedef struct {
  qpass_type type;  // of x
  int64_t rows, k;
  const int8_t* q;     // [rows, k]
  const float* scale;  // [rows], or [1] where per_token is 0
  int32_t per_token;
  void* x;  // [rows, k]
} qpass_dequantize_args;
int qpass_dequantize(const qpass_dequantize_args* args, cudaStream_t stream);

// DequantizeWeight: w = (weight - zero) * scale.
typedef struct {
  qpass_type type;  // of w
  int64_t rows, k;
  const int8_t* weight;  // [rows, k], or int4 [rows, k / 2] with element 2i in the low nibble
  int32_t int4;
  int32_t group_size;  // 0: one scale a row
  const float* scale;  // [rows] or [rows, k / group_size]
  const int8_t* zero;  // like scale, or null
  void* w;             // [rows, k]
} qpass_dequantize_weight_args;
int qpass_dequantize_weight(const qpass_dequantize_weight_args* args, cudaStream_t stream);

// The ways that a matrix product can go. Which is fastest depends on GPU, shape and number of tokens: a table of measurements
// (tuning.h) says so where there is one for the shape, else a rule. Tiles are tokens × channels.
typedef enum {
  QPASS_AUTO = 0,      // by the table, or where it has nothing that the call can take, by the rule
  QPASS_RULE,          // by the rule
  QPASS_SKINNY,        // weights stream once through mma.sync: few tokens
  QPASS_MMA,           // 128 × 128 on mma.sync: every shape and architecture
  QPASS_SM80_128X128,  // CUTLASS 2.x
  QPASS_SM90_64X64,    // CUTLASS 3.x, and so the next
  QPASS_SM90_64X128,
  QPASS_SM90_128X128,
  QPASS_SM90_128X256,
  QPASS_SM90_MIXED,    // integer weights on their way to wgmma become 16-bit floats; tiles by the number of tokens
  QPASS_SM90_SPLIT_K,  // int8 beside int8: 64 tokens at most × 256, K split among blocks
  QPASS_VARIANTS,  // how many there are
} qpass_variant;
const char* qpass_variant_name(qpass_variant variant);  // such as "sm90_128x256"
qpass_variant qpass_variant_of(const char* name);       // QPASS_VARIANTS: there is none of this name

// What a call can take on the current device, and what the rule takes for it.
typedef struct {
  uint32_t mask;  // of 1 << variant
  qpass_variant rule;
  int32_t kind;  // the ProductKind of tuning.h, by which tables know it
} qpass_choice;

// SmoothQuantGemm: y[m, n] = (sum_k q[m, k] * weight[n, k], in int32) * scale_a * scale_w (+ bias).
typedef struct {
  qpass_type type;  // of y and bias
  int64_t m, n, k;
  const int8_t* q;       // [m, k]
  const int8_t* weight;  // [n, k]
  const float* scale_a;  // [m], or [1] where per_token is 0
  const float* scale_w;  // [n], or [1] where per_channel is 0
  int32_t per_token, per_channel;
  const void* bias;  // [n] or null
  void* y;           // [m, n]
  void* workspace;   // of at least qpass_smooth_quant_gemm_workspace bytes, 256-byte aligned
  qpass_variant variant;  // one that the call cannot take is cudaErrorNotSupported
} qpass_smooth_quant_gemm_args;
int qpass_smooth_quant_gemm(const qpass_smooth_quant_gemm_args* args, cudaStream_t stream);
// An upper bound for every m up to this one and every variant. Reads no pointer of `args`.
size_t qpass_smooth_quant_gemm_workspace(const qpass_smooth_quant_gemm_args* args);
int qpass_smooth_quant_gemm_choice(const qpass_smooth_quant_gemm_args* args, qpass_choice* choice);  // reads none either

// WeightOnlyQuantMatmul (group_size 0) and WeightOnlyGroupwiseQuantMatmul:
// y[m, n] = sum_k (x[m, k] * pre_quant_scale[k]) * ((weight[n, k] - zero) * scale) (+ bias).
typedef struct {
  qpass_type type;  // of x, bias and y
  int64_t m, n, k;
  const void* x;                 // [m, k]
  const float* pre_quant_scale;  // [k] or null
  const int8_t* weight;          // [n, k], or int4 [n, k / 2]
  int32_t int4;
  int32_t group_size;  // 0, 32, 64 or 128
  const float* scale;  // [n] or [n, k / group_size]
  const int8_t* zero;  // like scale, or null
  const void* bias;    // [n] or null
  void* y;             // [m, n]
  void* workspace;     // of at least qpass_weight_only_matmul_workspace bytes, 256-byte aligned
  qpass_variant variant;  // all but skinny: of the 16-bit product on the expanded weight
} qpass_weight_only_matmul_args;
int qpass_weight_only_matmul(const qpass_weight_only_matmul_args* args, cudaStream_t stream);
// An upper bound for every m up to this one and every variant. Reads no pointer of `args`.
size_t qpass_weight_only_matmul_workspace(const qpass_weight_only_matmul_args* args);
int qpass_weight_only_matmul_choice(const qpass_weight_only_matmul_args* args, qpass_choice* choice);  // reads none either

// A kernel that does nothing, launched as the others are: what a launch alone costs.
int qpass_launch_nothing(cudaStream_t stream);

#ifdef __cplusplus
}
#endif
